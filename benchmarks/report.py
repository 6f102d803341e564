"""What every benchmark shares: interleaved timing, hardware and versions, bars, one table and one JSON form."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

OPERATORS: dict[str, Callable[[float, float], bool]] = {"<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b}


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments.add_argument("--rounds", type=int, default=7, help="interleaved rounds that are counted, after one that is not")
    arguments.add_argument("--threads", type=int, default=1, help="CPU threads")
    return arguments


def interleaved(
    contenders: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Time the contenders in turn, A B C A B C ..., so that a drift of the machine meets all of them.

    Args:
        contenders: what to run, by name.
        rounds: how often, after once that is not counted.
        clock: of seconds. `time.thread_time` leaves out what a neighbour on the same processor takes, for contenders of one thread.

    Returns:
        Seconds of each counted round by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in track(range(rounds + 1), "rounds", console=Console(stderr=True), transient=True):
        for name, run in contenders.items():
            start = clock()
            run()
            if number:
                seconds[name].append(clock() - start)
    return seconds


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the median over rounds of a / b: robust where single times are not."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def bar(name: str, value: float, op: str, limit: float) -> dict[str, Any]:
    """Return one bar: a measured value, what it is held against, and whether it holds."""
    return {"name": name, "value": round(value, 4), "op": op, "bar": limit, "holds": OPERATORS[op](value, limit)}


def finish(title: str, rows: list[dict[str, Any]], bars: list[dict[str, Any]], packages: Sequence[str], out: Path | None) -> None:
    """Print the tables and write the JSON.

    Raises:
        SystemExit: with code 1 if a bar is missed, once everything is written.
    """
    console = Console()
    for name, lines in ((title, rows), ("bars", bars)):
        if lines:
            table = Table(*map(str, lines[0]), title=name)
            for line in lines:
                table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in line.values()))
            console.print(table)
    if out is not None:
        write(rows, bars, packages, out)
    if missed := [line["name"] for line in bars if not line["holds"]]:
        raise SystemExit(f"missed: {', '.join(missed)}")


def write(rows: list[dict[str, Any]], bars: list[dict[str, Any]], packages: Sequence[str], out: Path) -> None:
    """Write the JSON; a benchmark that runs long may do so after every result, too."""
    result = {"hardware": hardware(), "versions": versions(packages), "commit": commit(), "rows": rows, "bars": bars}
    temporary = out.with_name(f".{out.name}.partial")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, out)


def hardware() -> dict[str, Any]:
    """Return the processor's name and how many of it there are."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "system": platform.system()}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return Python's and the packages' versions."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """Return the checked-out commit, marked where the tree differs from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
