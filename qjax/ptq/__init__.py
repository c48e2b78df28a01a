"""Post-training quantization with data: solvers on one weight and its input statistics."""
