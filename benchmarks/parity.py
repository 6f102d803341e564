"""How far llama.cpp, running an exported file, is from its torch emulation and from training's own forward, for every type.

uv run python benchmarks/parity.py --json parity.json
uv run python benchmarks/parity.py --smollm2

A tiny ternary model (bitnet, 256 wide, two layers) is trained for 100 steps and exported in each type that llama.cpp runs, then
with each type of embeddings. Distances are KL divergences in nats over the next-token distributions of 1,000 positions of Python's
documentation; those "training" are, with embeddings in 8 bits or fewer, to training's forward with the file's embeddings.
"embedding KL" and "embedding %" are what the embedding's type alone changes, in distributions and in perplexity, everything else as
in training. With --smollm2, the latter for SmolLM2-135M with every other weight float, on 4x512 tokens of the documentation.
"""

import argparse
import math
import pydoc_data.topics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitnet_arch import load_float_model, load_model, load_tokenizer, open_weights, resolve_pretrained, save_master
from bitnet_arch.gguf import EMBEDDING_TYPES, export_gguf
from bitnet_arch.gguf.floats import SIZES, decode_float, encode_float
from bitnet_arch.parity import EngineInfo, ParityBounds, ParityReport, run_gate
from bitnet_arch.testing import tiny_bitnet, tiny_tokenizer, train_tiny
from report import bar, finish
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from wrinklefree_inference.export import MAX_WINDOW, probe_windows
from wrinklefree_inference.llamacpp import NAME, LlamaCpp

TYPES = ("f16", "bf16", "tq1_0", "tq2_0", "q2_0")
EMBEDDINGS = tuple(name for name in EMBEDDING_TYPES if name != "f16")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGES = ("torch", "transformers", "gguf", "xllamacpp", "bitnet-arch", "wrinklefree-inference")


@torch.no_grad()
def nll(model: PreTrainedModel, ids: Tensor) -> float:
    """Return the loss of token windows int64 `[windows, time]` in nats a token."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def stored(values: Tensor, kind: str) -> Tensor:
    """Return a matrix as a type of embeddings holds it; one whose rows the type cannot have is cut into rows that it can."""
    ggml_id = EMBEDDING_TYPES[kind]
    block = SIZES[ggml_id][0]
    rows = values.numpy() if values.shape[1] % block == 0 else values.numpy().reshape(-1, block)
    encoded = np.ascontiguousarray(encode_float(rows, ggml_id)).view(np.uint8).reshape(len(rows), -1)
    return torch.from_numpy(decode_float(encoded, ggml_id, rows.shape).copy()).reshape(values.shape)


@torch.no_grad()
def embedding_costs(model: PreTrainedModel, ids: Tensor) -> dict[str, tuple[float, float]]:
    """Return for each type of (tied) embeddings, and for float32, the loss and the relative change of perplexity."""
    weight: Any = model.get_input_embeddings().weight  # type: ignore[union-attr]
    original, base = weight.detach().clone(), nll(model, ids)
    found = {"f32": (base, 0.0)}
    for kind in track(EMBEDDING_TYPES, "embeddings", console=Console(stderr=True), transient=True):
        weight.copy_(stored(original, kind))
        loss = nll(model, ids)
        found[kind] = loss, math.expm1(loss - base)
    weight.copy_(original)
    return found


def row(what: str, report: ParityReport, size: int, cost: float, seconds: float) -> dict[str, Any]:
    """Return a line of the table."""
    emulation, training = (report.measurements[f"engine against {name}"] for name in ("emulation", "training"))
    return {
        "what": what,
        "status": report.status,
        "bytes": size,
        "mean KL": emulation["mean_kl"],
        "max KL": emulation["max_kl"],
        "top-1": emulation["top1"],
        "mean KL, training": training["mean_kl"],
        "max KL, training": training["max_kl"],
        "top-1, training": training["top1"],
        "embedding KL": report.measurements.get("embeddings against training", {}).get("mean_kl", "-"),
        "embedding %": 100 * cost,
        "seconds": seconds,
    }


def measure(folder: Path, positions: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the table's lines and the bars of a tiny model."""
    directory = folder / "tiny"
    save_master(train_tiny(tiny_bitnet()), directory, tiny_tokenizer())
    with open_weights(directory) as reader:
        windows = probe_windows(reader, positions)
    costs = embedding_costs(load_model(directory), torch.tensor(windows))
    rows, bars, bounds = [], [], ParityBounds(min_positions=positions)
    cases = [(kind, "f16") for kind in TYPES] + [("tq2_0", embedding) for embedding in EMBEDDINGS]
    for kind, embedding in track(cases, "files", console=Console(stderr=True), transient=True):
        path, start = folder / f"{kind}-{embedding}.gguf", time.perf_counter()
        size = export_gguf(directory, path, kind, embedding=embedding).bytes
        with LlamaCpp(path, context=2 * MAX_WINDOW) as engine:
            info = EngineInfo(engine.logprobs, NAME, engine.version, engine.tokenize)
            report = run_gate(directory, path, info, windows, bounds)
        what = kind if embedding == "f16" else f"{kind}, {embedding} embeddings"
        rows.append(row(what, report, size, costs[embedding][1], time.perf_counter() - start))
        limit = bounds.f16_mean_kl if {kind, embedding} <= {"f16", "bf16"} else bounds.ternary_mean_kl
        bars.append(bar(f"{what}: mean KL / its bound", abs(rows[-1]["mean KL"]) / limit, "<=", 1.0))
    return rows, bars


def measure_smollm2() -> tuple[str, list[dict[str, Any]]]:
    """Return where the weights come from, and what embeddings cost a real model whose other weights are float."""
    source = resolve_pretrained(SMOLLM2)
    topics = pydoc_data.topics.topics
    ids = load_tokenizer(source.path)("\n".join(topics[key] for key in sorted(topics))).input_ids[40_000:42_052]
    model = load_float_model(source)
    lines = []
    for kind, (loss, cost) in embedding_costs(model, torch.tensor(ids).view(4, 513)).items():
        cut = kind in EMBEDDING_TYPES and model.config.hidden_size % SIZES[EMBEDDING_TYPES[kind]][0]
        name = f"{kind} (no file can: rows cut to fit)" if cut else kind
        lines.append({"embeddings": name, "NLL": round(loss, 5), "perplexity": math.exp(loss), "cost %": round(100 * cost, 4)})
    return source.note, lines


def main() -> None:
    """Run the benchmark."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments.add_argument("--positions", type=int, default=1000, help="next-token distributions to compare (default 1000)")
    arguments.add_argument("--threads", type=int, default=1, help="torch's CPU threads (default 1)")
    arguments.add_argument("--smollm2", action="store_true", help="measure SmolLM2-135M's embeddings instead")
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.smollm2:
        note, rows = measure_smollm2()
        finish(f"embeddings, everything else float, 4x512 tokens, {note}", rows, [], PACKAGES, chosen.json)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows, bars = measure(Path(folder), chosen.positions)
    title = f"llama.cpp against its emulation and against training, {chosen.positions} positions of a tiny trained model"
    finish(title, rows, bars, PACKAGES, chosen.json)


if __name__ == "__main__":
    main()
