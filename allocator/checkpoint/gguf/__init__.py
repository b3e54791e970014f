"""GGUF files, read: their headers, and a model in floats or Q8_0 as a checkpoint."""
