"""The proxy loss: what a candidate's deployed forward pass loses against the original's."""
