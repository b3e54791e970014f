"""Target `gguf`: stock llama.cpp."""
