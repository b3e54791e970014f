"""What is measured of a checkpoint before a search."""
