"""Owns `python -m ramet`, which is the console script `ramet`."""

import sys

from ramet.cli import main

if __name__ == "__main__":
    sys.exit(main())
