import sys

from wrinklefree_eval.cli import main

if __name__ == "__main__":
    sys.exit(main())
