"""The error of parameters that cannot be quantized as asked."""


class QuantizationError(ValueError):
    """Parameters and policy do not fit together; the message names the parameter path."""
