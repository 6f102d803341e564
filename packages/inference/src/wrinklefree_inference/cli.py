"""The command line: `python -m wrinklefree_inference export|generate|serve`."""

import argparse
import atexit
import gc
import sys
from collections.abc import Sequence

from bitnet_arch import UserError

from wrinklefree_inference import export, generate, server


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (0 done, 1 failed, 2 the user's mistake, 75 interrupted).

    Without `argv` it is this process's own, which then ends.
    """
    if argv is None:
        # Python's last collection would look at everything that was imported, for seconds, before the system takes it anyway.
        atexit.register(gc.freeze)
    parser = argparse.ArgumentParser(prog="wrinklefree_inference", description="Export, run and serve 1.58-bit models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (export, generate, server):
        module.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the command again", file=sys.stderr)
        return 75
