"""What a profile predicts of a decision, and the decision of least predicted loss."""
