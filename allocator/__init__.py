"""moe-allocator: fit a Mixture-of-Experts model into a memory budget, changing it least."""

__version__ = "0.1.0"
