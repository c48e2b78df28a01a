"""Packed matmul kernels in Triton, called through jax-triton, for NVIDIA GPUs before Hopper.

This package is imported without Triton; its modules with kernels are not: `versions.missing` says
what has to be installed.
"""
