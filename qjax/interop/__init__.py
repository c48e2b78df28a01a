"""The file formats of other tools, one module each."""
