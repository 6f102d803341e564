"""What a finished run leaves behind beside the model and its file: the plot and the sample."""

import math
from pathlib import Path

import torch
from bitnet_arch.bitlinear import constant_weights
from bitnet_arch.diffusion import diffusion_of
from bitnet_arch.generation import DecodeOptions, decode
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from wrinklefree.callbacks import read_metrics
from wrinklefree.files import complete

SAMPLE_TOKENS = 48


def plot_losses(out: Path, arms: dict[str, Path]) -> None:
    """Draw training and held-out loss of every arm against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for (name, path), colour in zip(arms.items(), ("tab:blue", "tab:orange"), strict=False):
        lines = read_metrics(path)
        axes.plot(
            [x["tokens"] for x in lines],
            [x.get("objective/ce", x["loss"]) for x in lines],
            colour,
            alpha=0.6,
            lw=1,
            label=f"{name}, training",
        )
        held = [x for x in lines if "heldout_loss" in x]
        axes.plot([x["tokens"] for x in held], [x["heldout_loss"] for x in held], colour, marker="o", label=f"{name}, held-out")
    axes.set(xlabel="tokens", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with complete(out) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")
    plt.close(figure)


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    """Return `prompt` continued by the model: temperature 0.8, and top-k 40 or, of a diffusion model, a threshold of 0.9."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    if diffusion_of(model.config) is not None:
        options = DecodeOptions(max_tokens=SAMPLE_TOKENS, temperature=0.8, seed=seed)
        found = decode(model, ids[0], options, ends={tokenizer.eos_token_id}).tokens
        return str(tokenizer.decode([*ids[0].tolist(), *found], skip_special_tokens=True))
    with torch.random.fork_rng(devices=[]), constant_weights(model):
        torch.manual_seed(seed)
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=True,
            temperature=0.8,
            top_k=40,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def finite(value: float) -> float | None:
    """Return `value`, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None
