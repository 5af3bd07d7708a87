"""Triton kernels of the forward pass, imported where tensors are on a GPU and nowhere else."""
