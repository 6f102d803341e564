"""Perplexity of SmolLM2-135M, ternary and briefly trained, in the native engine and in training's own forward.

uv run python benchmarks/native_perplexity.py --json native.json
uv run python benchmarks/native_perplexity.py --directory outputs/RUN/model      # any master directory

Without --directory the packaged 4-bit copy of the instruct model is converted (softened, calibrated SubLN) and trained on Python's
documentation (AdamW, 3e-4, two rows of 64 tokens a step): a stand-in for a trained model, of which it is far. The exported file is
run on windows of 256 tokens of the same documentation that were not trained on. What float64 in place of float32 does to
training's forward is measured in the same run: rounding moves codes across their edges, and 30 layers carry that on.
"""

import argparse
import math
import pydoc_data.topics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitnet_arch import (
    ConversionConfig,
    convert_model,
    load_float_model,
    load_model,
    load_tokenizer,
    resolve_pretrained,
    save_master,
)
from bitnet_arch.gguf import export_gguf
from bitnet_arch.parity import native_engine
from numpy.typing import NDArray
from report import bar, finish
from torch import Tensor
from torch.nn import functional as F

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
CALIBRATION, TRAINED, WINDOW = 2048, 39_000, 256
PACKAGES = ("torch", "transformers", "bitnet-arch", "bitnet-kernels")
LogProbs = NDArray[np.float64]


def text_ids(directory: Path) -> Tensor:
    """Return Python's documentation as tokens of a directory's tokenizer, int64 `[tokens]`."""
    topics = pydoc_data.topics.topics
    return torch.tensor(load_tokenizer(directory)("\n".join(topics[key] for key in sorted(topics))).input_ids)


def train(folder: Path, steps: int) -> Path:
    """Convert SmolLM2-135M and train it for some steps; return its master directory."""
    source = resolve_pretrained(SMOLLM2)
    ids = text_ids(Path(source.path))
    model = convert_model(load_float_model(source), ConversionConfig(), [ids[:CALIBRATION].view(4, -1)]).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    for _ in range(steps):
        rows = torch.stack([ids[start : start + 65] for start in torch.randint(0, TRAINED, (2,)).tolist()])
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    save_master(model.eval(), folder / "model", load_tokenizer(source.path), provenance=source.note)
    return folder / "model"


def negative_logprobs(run: Callable[[list[int]], LogProbs], windows: Tensor) -> LogProbs:
    """Return -log p of every window's tokens but its first, float64 `[windows, time - 1]`."""
    found = []
    for window in windows.tolist():
        found.append(-run(window[:-1])[np.arange(len(window) - 1), window[1:]])
    return np.stack(found)


def torch_run(directory: Path, dtype: torch.dtype) -> Callable[[list[int]], LogProbs]:
    """Return training's forward of a directory as an engine."""
    model: Any = load_model(directory).to(dtype)

    @torch.no_grad()
    def run(ids: list[int]) -> LogProbs:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        found: LogProbs = logits.double().log_softmax(-1).numpy()
        return found

    return run


def main() -> None:
    """Run the benchmark."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--directory", type=Path, help="a master directory instead of SmolLM2-135M")
    arguments.add_argument("--steps", type=int, default=40, help="of training (40)")
    arguments.add_argument("--windows", type=int, default=60, help="of 256 tokens (60)")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments.add_argument("--threads", type=int, default=1, help="torch's CPU threads (1)")
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        directory = chosen.directory or train(folder, chosen.steps)
        ids = text_ids(directory)[TRAINED + 1000 :]
        windows = ids[: chosen.windows * (WINDOW + 1)].view(chosen.windows, WINDOW + 1)
        export_gguf(directory, folder / "model.gguf")
        rows, found = [], {}
        for name, run in (
            ("training, float32", lambda: torch_run(directory, torch.float32)),
            ("training, float64", lambda: torch_run(directory, torch.float64)),
            ("native engine", lambda: native_engine(folder / "model.gguf", WINDOW).run),
        ):
            start = time.process_time()
            found[name] = negative_logprobs(run(), windows)
            off = found[name] - found["training, float32"]
            error = off.std() / math.sqrt(off.size)
            rows.append(
                {
                    "forward": name,
                    "perplexity": math.exp(found[name].mean()),
                    "off %": 100 * math.expm1(off.mean()),
                    "standard error %": 100 * error,
                    "largest, nats": float(np.abs(off).max()),
                    "cpu s": time.process_time() - start,
                }
            )
    bars = [bar("native engine's perplexity, off by %", abs(rows[-1]["off %"]), "<=", 0.1)]
    finish(f"perplexity on {windows[:, 1:].numel()} tokens", rows, bars, PACKAGES, chosen.json)


if __name__ == "__main__":
    main()
