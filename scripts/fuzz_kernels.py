"""Fuzz the Python face of bitnet-kernels with arrays of any dtype, shape, layout and content, and with what is no array.

    uv run python scripts/fuzz_kernels.py --seconds 60

Anything but a result or an exception that names an argument is a finding. After a crash, `--log` says which call it was, and
`--call NAME SEED` makes it again.
"""

import argparse
from pathlib import Path

from bitnet_kernels.fuzz import CALLS, fuzz, try_once


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first call (%(default)s)")
    parser.add_argument("--log", type=Path, help="file that holds the call that is made")
    parser.add_argument("--call", nargs=2, metavar=("NAME", "SEED"), help=f"one call: {', '.join(CALLS)}")
    arguments = parser.parse_args()
    if arguments.call is not None:
        print(try_once(arguments.call[0], int(arguments.call[1])))
        return
    ends = fuzz(arguments.seconds, arguments.seed, arguments.log)
    print(f"{sum(ends.values())} calls, no finding")
    for end, count in sorted(ends.items()):
        print(f"{count:9d} {end}")


if __name__ == "__main__":
    main()
