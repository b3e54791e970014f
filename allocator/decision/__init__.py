"""The decision that is searched, what may be chosen, and the limits it is held to."""
