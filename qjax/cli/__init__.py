"""The command line, one file a command; `qjax --help` lists them."""

from qjax.cli.app import app, main

__all__ = ["app", "main"]
