"""The ops on CPU and MPS, in plain PyTorch. Same functions and signatures as `_triton`."""
