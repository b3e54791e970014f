"""Searchers side by side: the same forward tokens, several seeds, held-out figures."""
