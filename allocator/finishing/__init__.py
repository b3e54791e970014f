"""Finishing: what the same bytes and formats can still give after the search.

In: an allocation, its encoded weights, calibration documents. Out: finished weights, in the same
formats and bytes: codes chosen anew against the second moments of the inputs, then norms, routers
and block scales tuned end to end. Invariant: no tensor changes its size, and what is scored is what
the runtime decodes.
"""
