import sys

from wrinklefree_inference.cli import main

if __name__ == "__main__":
    sys.exit(main())
