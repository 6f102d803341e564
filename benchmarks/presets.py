"""Every preset as a real command on the tiny model, three steps each, with its export: seconds of its start-up and of the rest.

uv run python benchmarks/presets.py --json presets.json
uv run python benchmarks/presets.py --presets dlm sft        # a part of it

A command has started when it names its run directory: behind that are imports, Hydra and the checks of the configuration. Its
export is a process of its own, whose imports count with it. "cpu s" is the processor time of all of a command's processes after its
start-up: on a machine that does other things it says more than the clock.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import bar, finish, parser

ROOT = Path(__file__).parents[1]
PRESETS = sorted(path.stem for path in (ROOT / "packages" / "training" / "configs" / "training").glob("*.yaml"))
CHAT = "sft data=chat"
"""The preset for conversations, on made-up ones."""
LIMIT = 15.0
"""Seconds after the start-up."""


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process that runs, its threads included (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children_seconds() -> float:
    """Return the processor time of all processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def write_conversations(folder: Path) -> None:
    """Write made-up conversations where `data=chat` looks for them."""
    folder.mkdir()
    with (folder / "sums.jsonl").open("w") as file:
        for i in range(600):
            turns = [
                {"role": "user", "content": f"What is {i} and {i % 7}?"},
                {"role": "assistant", "content": f"It is {i + i % 7}."},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def timed(preset: str, folder: Path, threads: int) -> dict[str, Any]:
    """Run a preset; return its row of the table."""
    command = [sys.executable, str(ROOT / "scripts" / "train_lightning.py"), "model=tiny", *f"training={preset}".split()]
    command += ["training.max_steps=3", f"training.threads={threads}", f"output_dir={folder}"]
    if preset == CHAT:
        write_conversations(folder.parent / "data")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    before, start, marks, load = children_seconds(), time.perf_counter(), {}, os.getloadavg()[0]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder.parent
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        for mark in ("run directory:", "exporting model.gguf"):
            if line.startswith(mark):
                marks[mark] = time.perf_counter() - start, processor_seconds(process.pid)
    if process.wait() != 0:
        raise SystemExit(f"{preset} failed:\n{''.join(lines)}")
    end, used = time.perf_counter() - start, children_seconds() - before
    (started, own), (exporting, _) = marks["run directory:"], marks["exporting model.gguf"]
    return {
        "preset": preset,
        "start": started,
        "train": exporting - started,
        "export": end - exporting,
        "after": end - started,
        "cpu s": used - own,
        "gguf": json.loads((folder / "summary.json").read_text())["gguf"]["status"],
        "load": load,
    }


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--presets", nargs="*", choices=[*PRESETS, CHAT], default=[*PRESETS, CHAT], help="which to run")
    arguments.set_defaults(rounds=1)
    chosen = arguments.parse_args()
    rows = []
    for number in range(chosen.rounds):
        for preset in chosen.presets:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(timed(preset, Path(folder, f"run-{number}"), chosen.threads))
            print(
                " ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in rows[-1].values()), file=sys.stderr
            )
    bars = [bar("seconds after start-up, slowest", max(row["after"] for row in rows), "<=", LIMIT)]
    finish("presets, three steps", rows, bars, ("torch", "pytorch-lightning", "transformers", "wrinklefree"), chosen.json)


if __name__ == "__main__":
    main()
