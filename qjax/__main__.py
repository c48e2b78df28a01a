"""`python -m qjax`: the command line where the `qjax` program is not on the path."""

from qjax.cli import main

if __name__ == "__main__":
    main()
