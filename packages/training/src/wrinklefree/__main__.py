import sys

from wrinklefree.cli import main

if __name__ == "__main__":
    sys.exit(main())
