import sys

from wf_deployer.cli import main

if __name__ == "__main__":
    sys.exit(main())
