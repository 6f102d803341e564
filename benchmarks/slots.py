"""What slots cost: memory of unused and used ones, and the time of copying a prefix beside that of computing it.

uv run python benchmarks/slots.py FILE.gguf --tokens 512
"""

import argparse
import itertools
import resource
import statistics
import time
from pathlib import Path

from bitnet_kernels import Engine

SLOTS = 512


def resident() -> float:
    """Return this process's memory in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("--tokens", type=int, default=512, help="of the prefix (%(default)s)")
    parser.add_argument("--copies", type=int, default=15, help="of it (%(default)s)")
    arguments = parser.parse_args()
    memory = [resident()]
    kept = []
    for slots in (1, SLOTS):
        kept.append(Engine(arguments.file, slots=slots))
        memory.append(resident())
    engine = kept[1]
    start = time.perf_counter()
    engine.prefill([token % engine.vocabulary for token in range(arguments.tokens)])
    computed = time.perf_counter() - start
    memory.append(resident())
    times = []
    for slot in range(1, 1 + arguments.copies):
        start = time.perf_counter()
        engine.copy(0, slot, arguments.tokens)
        times.append(time.perf_counter() - start)
    memory.append(resident())
    one, many, used, copied = (after - before for before, after in itertools.pairwise(memory))
    print(f"opened with 1 slot of {engine.context} positions: {one:.1f} MiB, with {SLOTS}: {many:.1f} MiB")
    print(f"{arguments.tokens} tokens: {used:.1f} MiB, a copy: {copied / arguments.copies:.1f} MiB")
    print(f"computed in {computed * 1e3:.0f} ms, copied in {statistics.median(times) * 1e3:.1f} ms (median)")


if __name__ == "__main__":
    main()
