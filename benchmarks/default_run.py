"""The README's first command, timed: a tiny ternary model and its unquantised twin, trained, exported and proven.

uv run python benchmarks/default_run.py --json default_run.json
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import bar, finish, parser

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_lightning.py"


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.set_defaults(rounds=1, threads=2)
    chosen = arguments.parse_args()
    rows = []
    for number in range(chosen.rounds):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            run = [sys.executable, str(SCRIPT), f"output_dir={folder}/run", f"training.threads={chosen.threads}"]
            subprocess.run(run, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            seconds = time.perf_counter() - start
            summary = json.loads(Path(folder, "run", "summary.json").read_text())
            curves = {arm: Path(folder, "run", arm, "metrics.jsonl").read_text().splitlines() for arm in (".", "fp")}
            speed = {arm: [json.loads(line)["tokens_per_s"] for line in lines] for arm, lines in curves.items()}
            rows.append(
                {
                    "round": number,
                    "seconds": seconds,
                    "tokens": summary["tokens"],
                    "ternary tokens/s": sorted(speed["."])[len(speed["."]) // 2],
                    "unquantised tokens/s": sorted(speed["fp"])[len(speed["fp"]) // 2],
                    "ternary perplexity": summary["ppl_ternary"],
                    "unquantised perplexity": summary["ppl_fp"],
                    "gguf": summary["gguf"]["status"],
                }
            )
    bars = [
        bar("seconds, slowest round", max(row["seconds"] for row in rows), "<=", 300),
        bar(
            "perplexity: ternary / unquantised",
            max(row["ternary perplexity"] / row["unquantised perplexity"] for row in rows),
            "<=",
            1.1,
        ),
        bar("rounds whose GGUF file is proven", sum(row["gguf"] == "proven" for row in rows), ">=", len(rows)),
    ]
    finish("the default run", rows, bars, ("torch", "pytorch-lightning", "transformers", "wrinklefree"), chosen.json)


if __name__ == "__main__":
    main()
