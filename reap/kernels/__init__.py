"""Scoring on a GPU, in Triton. Imported only where tensors are on CUDA."""
