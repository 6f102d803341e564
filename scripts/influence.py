"""Rank training examples by what they do for a set of probes: `uv run python scripts/influence.py [key=value ...]` (`--help`)."""

import sys

from wrinklefree.influence import main

if __name__ == "__main__":
    sys.exit(main())
