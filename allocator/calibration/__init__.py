"""Calibration text, and what one pass over it says about a model."""
