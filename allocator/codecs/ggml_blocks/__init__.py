"""What the blocks of ggml's formats are made of: scales, sub-scales and codes, read and written.

`scales` reads and writes the float16 scales of a block in numpy, `grid` and `scalar` all fields in
torch, `registry` knows which has which format. This module imports nothing, so that scales can be
read without torch; what needs torch is imported from the modules by name.
"""
