"""Function transforms: one walk over a jaxpr, with a handler for each thing done to weights."""
