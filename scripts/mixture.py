"""Look for a data mixture on small proxies: `uv run python scripts/mixture.py METHOD [key=value ...]` (`--help` says more)."""

import sys

from wrinklefree.mixture import main

if __name__ == "__main__":
    sys.exit(main())
