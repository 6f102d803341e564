"""Which tokens a distribution gives, how sure of them it is, and which of them are taken."""

import torch
from torch import Tensor

from bitnet_arch.errors import UserError

COLDEST, HOTTEST = 1e-5, 1e5
"""The least and the greatest temperature but 0, well inside float32, in which engines of files hold it: colder draws nothing but
the likeliest token, hotter draws any."""


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that not everything that samples computes right.

    Raises:
        UserError: unless it is 0 or from `COLDEST` to `HOTTEST`.
    """
    if not (temperature == 0 or COLDEST <= temperature <= HOTTEST):
        raise UserError(f"temperature is {temperature}: give 0 (greedy) or a number from {COLDEST} to {HOTTEST:.0f}")


def propose(logits: Tensor, mask_token_id: int, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return a token for every position and its probability.

    Args:
        logits: float `[N, V]`.
        mask_token_id: never proposed.
        temperature: 0 takes the likeliest token and its probability at temperature 1; above, draws from the distribution at that
            temperature and takes the probability in it (Fast-dLLM v2's code).
        generator: of the draws, on the CPU.

    Returns:
        int64 `[N]` and float64 `[N]`, on the CPU.
    """
    logits = logits.double().cpu()  # so that a threshold of 0.999 is not decided by rounding
    logits[:, mask_token_id] = -torch.inf
    if temperature == 0:
        confidence, tokens = logits.softmax(-1).max(-1)
        return tokens, confidence
    probabilities = (logits / temperature).softmax(-1)
    tokens = torch.multinomial(probabilities, 1, generator=generator)
    return tokens[:, 0], probabilities.gather(1, tokens)[:, 0]


def accept(confidence: Tensor, candidates: Tensor, threshold: float) -> Tensor:
    """Return which candidates are taken: those above the threshold, and in any case the surest (Fast-dLLM, arXiv 2505.22618).

    Args:
        confidence: float `[N]`.
        candidates: bool `[N]`, at least one.
        threshold: 1 takes exactly one.

    Returns:
        bool `[N]`.
    """
    scores = confidence.masked_fill(~candidates, -torch.inf)
    chosen = scores > threshold
    chosen[scores.argmax()] = True
    return chosen
