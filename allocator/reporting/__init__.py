"""A study as one page that can be mailed: what it found, measured, and did not measure yet.

In: a study folder. Out: one HTML file. Invariant: nothing is measured, no weight is read, torch is
never loaded, and the same study gives the same bytes.
"""
