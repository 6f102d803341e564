"""Train a 1.58-bit language model: `uv run python scripts/train_lightning.py [key=value ...]` (`--help` says more)."""

import sys

from wrinklefree.cli import main

if __name__ == "__main__":
    sys.exit(main())
