"""The error of everything that reads or writes GGUF."""


class GGUFError(ValueError):
    """A GGUF file that cannot be read or written: the message names what, where, and the remedy."""
