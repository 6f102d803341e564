"""Which tokens are masked, and how the loss weighs them."""

from dataclasses import dataclass
from typing import Any, Literal

from bitnet_arch import UserError
from bitnet_arch.diffusion import DiffusionForm

Weighting = Literal["none", "inverse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionSettings:
    """How a diffusion model is trained.

    Attributes:
        mask_token_id: the model's mask token.
        block_size: D of `bitnet_arch.diffusion.DiffusionForm`; None for no blocks.
        token_shift: whether token i is read from position i - 1.
        complementary: train on two views of every row, the second masking exactly what the first leaves, so that every token is
            predicted once.
        weighting: "inverse" divides a masked token's loss by its probability of being masked, which makes the sum an upper bound of
            the negative log-likelihood (MDLM, arXiv 2406.07524, eq. 10; but see `diffusion_bound` on token shift); "none" takes the
            plain mean (Fast-dLLM v2).
        seed: of masks and noise levels, with a row's sample index.
        epsilon: smallest probability of being masked; 1 masks every token.

    Raises:
        UserError: for a value out of range, or a combination that means nothing.
    """

    mask_token_id: int
    block_size: int | None = 32
    token_shift: bool = True
    complementary: bool = True
    weighting: Weighting = "none"
    seed: int = 0
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        self.form()
        if self.weighting not in ("none", "inverse"):
            raise UserError(f"unknown weighting {self.weighting!r}: choose none or inverse")
        if self.complementary and self.weighting == "inverse":
            raise UserError(
                "complementary views predict every token once, and weighting=inverse would divide by numbers near 0: choose one"
            )
        if not 0 < self.epsilon <= 1:
            raise UserError(f"epsilon is {self.epsilon}: it must lie in (0, 1]")
        if self.complementary and self.epsilon == 1:
            raise UserError("epsilon=1 masks every token, and leaves nothing for the complementary view: leave one of them out")
        if self.seed < 0:
            raise UserError(f"the seed is {self.seed}: it must not be negative")

    def form(self) -> DiffusionForm:
        """Return what a model that is trained so says of itself."""
        return DiffusionForm(mask_token_id=self.mask_token_id, block_size=self.block_size, token_shift=self.token_shift)


METHODS: dict[str, dict[str, Any]] = {
    "fast_dllm_v2": {"block_size": 32, "token_shift": True, "complementary": True, "weighting": "none"},
    "bd3lm": {"block_size": 32, "token_shift": False, "complementary": False, "weighting": "inverse"},
    "mdlm": {"block_size": None, "token_shift": False, "complementary": False, "weighting": "inverse"},
}
"""Maps a paper's name to its settings: Fast-dLLM v2 (arXiv 2509.26328), BD3-LM (2503.09573, without its clipped noise schedule),
MDLM (2406.07524; LLaDA, 2502.09992, trains the same loss)."""
