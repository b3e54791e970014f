"""Runs the command line: `python -m allocator.cli VERB`."""

import sys

from allocator.cli import main

if __name__ == "__main__":
    sys.exit(main())
