"""Runs the command line: `python -m mmoe list` is `mmoe list`."""

import sys

from mmoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
