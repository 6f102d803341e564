"""Can the parity gate tell a right file of a real model from wrong ones? An engine runs the right file, then wrong ones.

uv run python benchmarks/gate_controls.py outputs/RUN/model --json controls.json

Each wrong file differs from the right one in what a faulty exporter or engine gets wrong: the rows of the query matrix of one
middle layer permuted as for the other kind of rotary positions, another rotary base, the weights of one norm left out. The gate
compares the engine's distributions with the directory; the bytes that it compares, too, are those of the right file, so that only
distributions can tell. The last wrong one, Q4_0 in place of ternary, is computed in torch by every gate.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitnet_arch import load_model, load_tokenizer, open_weights, save_master
from bitnet_arch.families import family_of
from bitnet_arch.gguf import export_gguf
from bitnet_arch.parity import EngineInfo, ParityBounds, ParityReport, run_gate
from report import bar, finish
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import PreTrainedModel
from wrinklefree_inference.export import MAX_WINDOW, probe_windows
from wrinklefree_inference.llamacpp import NAME, LlamaCpp

PACKAGES = ("torch", "transformers", "xllamacpp", "bitnet-arch", "wrinklefree-inference")


def middle_block(model: PreTrainedModel) -> nn.Module:
    """Return the block in the middle."""
    blocks: Any = model.get_submodule(family_of(model.config).blocks)
    return blocks[len(blocks) // 2]  # type: ignore[no-any-return]


def permute_queries(model: PreTrainedModel) -> None:
    """Reorder the rows of one query matrix as for interleaved rotary positions."""
    weight: Any = middle_block(model).get_submodule("self_attn.q_proj").weight
    halves = weight.view(model.config.num_attention_heads, 2, -1, weight.shape[1])
    weight.copy_(halves.transpose(1, 2).reshape(weight.shape).clone())


def change_base(model: PreTrainedModel) -> None:
    """Give rotary positions a tenth of their base."""
    model.config.rope_parameters["rope_theta"] /= 10


def drop_norm(model: PreTrainedModel) -> None:
    """Leave out the weights of one norm."""
    norm: Any = middle_block(model).get_submodule(next(reversed(family_of(model.config).pre_norms)))
    norm.weight.fill_(1.0)


WRONG: dict[str, Callable[[PreTrainedModel], None]] = {
    "query rows permuted in one layer": permute_queries,
    "rotary base / 10": change_base,
    "one norm's weights left out": drop_norm,
}


@torch.no_grad()
def export_wrong(directory: Path, wrong: Callable[[PreTrainedModel], None], folder: Path) -> Path:
    """Write the file that a faulty exporter would make of a master directory."""
    model = load_model(directory)
    wrong(model)
    save_master(model, folder / "wrong", load_tokenizer(directory))
    export_gguf(folder / "wrong", folder / "wrong.gguf")
    return folder / "wrong.gguf"


def row(what: str, report: ParityReport) -> dict[str, Any]:
    """Return a line of the table."""
    engine, training = (report.measurements[f"engine against {name}"] for name in ("emulation", "training"))
    return {
        "engine runs": what,
        "status": report.status,
        "mean KL": engine["mean_kl"],
        "top-1": engine["top1"],
        "mean KL, training": training["mean_kl"],
        "perplexity %, training": 100 * (training["perplexity_ratio"] - 1),
        "missed": ", ".join(report.failed_checks()) or "-",
        "undecided": ", ".join(report.undecided_checks()) or "-",
    }


def main() -> None:
    """Run the benchmark."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("directory", type=Path, help="a master directory")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments.add_argument("--positions", type=int, default=64, help="next-token distributions to compare (default 64)")
    arguments.add_argument("--threads", type=int, default=1, help="torch's CPU threads (default 1)")
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    with open_weights(chosen.directory) as reader:
        windows = probe_windows(reader, chosen.positions)
    rows, bars, bounds = [], [], ParityBounds(min_positions=chosen.positions)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        right = folder / "right.gguf"
        export_gguf(chosen.directory, right)
        for what in track(["the right file", *WRONG], "engines", console=Console(stderr=True), transient=True):
            path = right if what not in WRONG else export_wrong(chosen.directory, WRONG[what], folder)
            with LlamaCpp(path, context=2 * MAX_WINDOW) as engine:
                info = EngineInfo(engine.logprobs, NAME, engine.version, engine.tokenize)
                report = run_gate(chosen.directory, right, info, windows, bounds)
            rows.append(row(what, report))
            expected = what not in WRONG
            bars.append(bar(f"{what}: proven", float(report.status == "proven"), ">=" if expected else "<=", float(expected)))
            limit = next(check.bound for check in report.checks if check.name == "engine.mean_kl")
        control = report.measurements["control: Q4_0"]
        rows.append({"engine runs": "Q4_0 (in torch)", "status": "-", "mean KL": control["mean_kl"], "top-1": control["top1"]})
        bars.append(bar("Q4_0 in torch: mean KL / its bound", control["mean_kl"] / limit, ">=", 1.0))
    finish(f"the gate against wrong files, {chosen.positions} positions", rows, bars, PACKAGES, chosen.json)


if __name__ == "__main__":
    main()
