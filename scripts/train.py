"""Train with hand-derived gradients: `python scripts/train.py --help`."""

import sys

from lightning_gd.cli import main

if __name__ == "__main__":
    sys.exit(main())
