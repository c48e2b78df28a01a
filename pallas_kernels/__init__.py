"""Packed matmul kernels on raw arrays. This package imports JAX alone."""
