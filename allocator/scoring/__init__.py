"""The loss of a decision, measured on documents with the weights that its file would hold."""
