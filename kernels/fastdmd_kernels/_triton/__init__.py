"""The kernels in Triton 3.6 and 3.7: one op per file, with its launcher and the variants to compile ahead of time."""
