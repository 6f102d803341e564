"""Forwards per token against threshold: tiny ternary models that count, made diffusion models by Fast-dLLM v2 training.

The task is synthetic: texts count up by 1 to 4 modulo 32, so that two tokens decide the rest and every token can be judged. For
each seed an autoregressive ternary model is trained, and from it one diffusion model with complementary views and one with single
views, in equally many steps on equally many rows: complementary views predict twice as many tokens of them. Figures are forwards
of the model, which no hardware changes; time is not measured.
"""

import copy
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bitnet_arch import ConversionConfig, convert_model
from bitnet_arch.generation import DecodeOptions, cache_agreement, decode
from bitnet_arch.testing import SMALL_SHAPE
from report import bar, finish, parser
from rich.progress import track
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from wrinklefree.diffusion import METHODS, DiffusionSettings, diffusion_bound, diffusion_step, scored_count
from wrinklefree.objective import token_loss_sum

NUMBERS, LENGTH, ROWS, PROMPT = 32, 32, 16, 4
THRESHOLDS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.0)
TEXTS = 16


def counting(rows: int, seed: int) -> Tensor:
    """Return texts, int64 `[rows, LENGTH]`."""
    generator = torch.Generator().manual_seed(seed)
    start, step = (torch.randint(low, high, (rows, 1), generator=generator) for low, high in ((0, NUMBERS), (1, 5)))
    return (start + step * torch.arange(LENGTH)) % NUMBERS


def batch(rows: int, seed: int) -> dict[str, Tensor]:
    """Return texts as the trainer gets them."""
    ids = counting(rows, seed)
    labels = ids.clone()
    labels[:, 0] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.arange(LENGTH).expand(rows, -1),
        "document_ids": torch.ones_like(ids),
        "sample_index": torch.arange(rows) + rows * seed,
    }


def train(model: PreTrainedModel, steps: int, seed: int, how: DiffusionSettings | None) -> PreTrainedModel:
    """Train in place, autoregressively or as a diffusion model."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        rows = batch(ROWS, seed * 10**5 + step)
        if how is None:
            loss, count = token_loss_sum(model(input_ids=rows["input_ids"], use_cache=False).logits, rows["labels"])
        else:
            loss, count = diffusion_step(model, rows, how)["dlm"], scored_count(rows, how)
        optimizer.zero_grad()
        (loss / count).backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        optimizer.step()
    return model.eval()


def pair(seed: int, steps: int) -> dict[str, PreTrainedModel]:
    """Return the diffusion models of a seed, by how their views were made."""
    torch.manual_seed(seed)
    llama = LlamaForCausalLM(LlamaConfig(**SMALL_SHAPE | {"vocab_size": NUMBERS + 1})).float()
    start = train(convert_model(llama, ConversionConfig(gain="one")), steps, seed, None)
    models = {}
    for name, complementary in (("complementary", True), ("single", False)):
        how = settings(complementary)
        models[name] = train(copy.deepcopy(start), steps, seed + 100, how)
        models[name].config.diffusion = {"mask_token_id": NUMBERS, "block_size": 8, "token_shift": True}
    return models


def settings(complementary: bool) -> DiffusionSettings:
    """Return Fast-dLLM v2's, with blocks of 8."""
    return DiffusionSettings(mask_token_id=NUMBERS, **METHODS["fast_dllm_v2"] | {"block_size": 8, "complementary": complementary})


def measure(model: PreTrainedModel, threshold: float) -> dict[str, float]:
    """Return a model's figures at a threshold."""
    options, found = DecodeOptions(max_tokens=LENGTH - PROMPT, threshold=threshold), defaultdict(float)
    for text in counting(TEXTS, 2 * 10**9):
        out = decode(model, text[:PROMPT], options)
        small = cache_agreement(model, text[:PROMPT], replace(options, sub_block_size=4))
        found["right"] += sum(a == b for a, b in zip(out.tokens, text[PROMPT:].tolist(), strict=True))
        found["forwards"] += out.statistics.forwards
        found["agreement"] += small.share * len(out.tokens)
        found["prefix positions"] += small.prefix.statistics.positions
        found["dual positions"] += small.dual.statistics.positions
    return {name: value / (TEXTS * (LENGTH - PROMPT)) for name, value in found.items()}


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw forwards per token, and the share of right tokens, against the threshold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for name, colour in (("complementary", "tab:blue"), ("single", "tab:orange")):
        lines = [row for row in rows if row["views"] == name]
        at = [row["threshold"] for row in lines]
        left.plot(at, [row["forwards"] for row in lines], colour, marker="o", label=f"{name} views")
        right.plot([row["forwards"] for row in lines], [row["right"] for row in lines], colour, marker="o", label=f"{name} views")
    left.set(xlabel="threshold", ylabel="forwards per token")
    right.set(xlabel="forwards per token", ylabel="share of right tokens")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out, dpi=120, bbox_inches="tight")


def main() -> None:
    """Train, decode, and print a line for each kind of views and threshold, means over seeds."""
    arguments = parser("Forwards per token against threshold.")
    arguments.add_argument("--seeds", type=int, default=5, help="models of each kind")
    arguments.add_argument("--steps", type=int, default=300, help="of each training")
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves there")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    sums: dict[tuple[str, float], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for seed in track(range(given.seeds), "seeds"):
        for name, model in pair(seed, given.steps).items():
            bound = diffusion_bound(model, [batch(64, 10**9)], settings(True), draws=4)
            for threshold in THRESHOLDS:
                figures = measure(model, threshold) | {"bound": bound}
                print(seed, name, threshold, figures, flush=True)
                for key, value in figures.items():
                    sums[name, threshold][key] += value / given.seeds
    rows = [{"views": name, "threshold": threshold} | dict(values) for (name, threshold), values in sums.items()]
    if given.plot:
        plot(rows, given.plot)
    kept = sums["complementary", 0.9]
    bars = [bar("forwards per token at 0.9", kept["forwards"], "<=", 0.75)]
    finish("decoding", rows, bars, ["torch", "transformers"], given.json)


if __name__ == "__main__":
    main()
