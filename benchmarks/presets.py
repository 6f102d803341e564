"""Every preset as a real command on the tiny model, three steps each, offline: seconds of its parts.

uv run python benchmarks/presets.py --json presets.json
uv run python benchmarks/presets.py --presets dlm sft        # a part of it

Start-up ends when the command names its run directory: imports, Hydra, and the checks of the configuration. "imports" is what
`python -c "import torch, pytorch_lightning, transformers, hydra"` takes, once a round. Training ends when the export begins: it has
the tokenizer, the teacher that is made on the spot, wandb's start, both evaluations, checkpoints and the model directory. The
export lasts until its report lies beside the file; the plot and the sample are made before it. The rest is what of these is left,
the summary and the end of the processes.

The data cache is filled by the first command, as it is for a user; `--cold` gives every command an empty one. "cpu" columns are
processor seconds of the command and its processes: on a machine that does other things they say more than the clock.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from report import bar, finish, parser, write

ROOT = Path(__file__).parents[1]
PRESETS = sorted(path.stem for path in (ROOT / "packages" / "training" / "configs" / "training").glob("*.yaml"))
CHAT = "sft data=chat"
"""The preset for conversations, on made-up ones: about 4,000 tokens a step, without a bar."""
LIMIT = 15.0
"""Seconds after the start-up."""
STARTED, EXPORTING = "run directory:", "exporting model.gguf"
PACKAGES = ("torch", "pytorch-lightning", "transformers", "wrinklefree")
IMPORTS = "import torch, pytorch_lightning, transformers, hydra"


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


def run(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Run a command to its end; return its seconds and its processor seconds."""
    before, start = children_seconds(), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, check=True)
    return time.perf_counter() - start, children_seconds() - before


def timed(preset: str, folder: Path, threads: int, environment: dict[str, str]) -> dict[str, Any]:
    """Run a preset; return its row of the table."""
    command = [sys.executable, str(ROOT / "scripts" / "train_lightning.py"), "model=tiny", *f"training={preset}".split()]
    command += ["training.max_steps=3", f"training.threads={threads}", f"output_dir={folder}"]
    if preset == CHAT:
        write_conversations(folder.parent / "data")
    before, start, began, marks, load = children_seconds(), time.perf_counter(), time.time(), {}, os.getloadavg()[0]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder.parent
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        for mark in (STARTED, EXPORTING):
            if line.startswith(mark):
                marks[mark] = time.perf_counter() - start, processor_seconds(process.pid)
    if process.wait() != 0:
        raise SystemExit(f"{preset} failed:\n{''.join(lines)}")
    end, used = time.perf_counter() - start, children_seconds() - before
    exported = (folder / "model.gguf.parity.json").stat().st_mtime - began
    (started, started_cpu), (exporting, exporting_cpu) = marks[STARTED], marks[EXPORTING]
    return {
        "preset": preset,
        "start": started,
        "train": exporting - started,
        "export": exported - exporting,
        "rest": end - exported,
        "after start": end - started,
        "start cpu": started_cpu,
        "train cpu": exporting_cpu - started_cpu,
        "after start cpu": used - started_cpu,
        "gguf": json.loads((folder / "summary.json").read_text())["gguf"]["status"],
        "load": load,
    }


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--presets", nargs="*", choices=[*PRESETS, CHAT], default=[*PRESETS, CHAT], help="which to run")
    arguments.add_argument("--cold", action="store_true", help="give every command an empty data cache")
    arguments.set_defaults(rounds=1)
    chosen = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(chosen.threads)}
    with tempfile.TemporaryDirectory() as kept:
        for number, preset in product(range(chosen.rounds), chosen.presets):
            if preset == chosen.presets[0]:
                imports, imports_cpu = run([sys.executable, "-c", IMPORTS], environment)
            with tempfile.TemporaryDirectory() as folder:
                cache = Path(folder, "cache") if chosen.cold else Path(kept)
                row = timed(preset, Path(folder, f"run-{number}"), chosen.threads, environment | {"WF_CACHE": str(cache)})
            rows.append(row | {"imports": imports, "imports cpu": imports_cpu})
            line = " ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in rows[-1].values())
            print(line, file=sys.stderr, flush=True)
            if chosen.json:
                write(rows, [], PACKAGES, chosen.json)
    named = [row["after start"] for row in rows if row["preset"] != CHAT]
    bars = [bar("after start, slowest", max(named), "<=", LIMIT)] if named else []
    finish("presets, three steps", rows, bars, PACKAGES, chosen.json)


if __name__ == "__main__":
    main()
