"""qjax: functional quantization for JAX and Flax."""
