"""What a written checkpoint is worth on text that no search has seen."""
