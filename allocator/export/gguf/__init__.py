"""GGUF files, and stock llama.cpp that runs them."""
