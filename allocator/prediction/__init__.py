"""Predicted losses of a decision, and the decision of least predicted loss under a budget."""
