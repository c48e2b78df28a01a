"""Quantization-aware training: everything beside `qjax.fake_quant` itself."""
