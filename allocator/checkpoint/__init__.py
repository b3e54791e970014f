"""A checkpoint as released: what it holds, its tensors and its tokenizer."""
