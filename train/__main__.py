"""`python -m train ...` is `mmoe train ...`, for launchers such as `accelerate launch -m train`."""

import sys

from mmoe.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    sys.exit(main())
