"""The decision that is searched: what may be chosen, its bytes, and the limits on them."""
