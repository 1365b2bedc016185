"""Microbenchmarks of the kernels: `make bench` on a CPU, `make gpu` on a GPU.

LOG.md has what was predicted and found.
"""
