"""Encoding and decoding of formats, by the libraries that define them."""
