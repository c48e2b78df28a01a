"""Functional quantization for JAX and Flax."""
