"""Our safetensors checkpoints, and their loader for transformers."""
