"""Files on disk: written whole, checked by checksum, and named by content."""
