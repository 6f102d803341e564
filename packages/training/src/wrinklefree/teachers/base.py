"""What a teacher is to the objectives."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from bitnet_arch.diffusion import diffusion_of
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.views import QKV, Batch, Needs


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes of a model that objectives depend on.

    Attributes:
        vocabulary: how many tokens it has logits of.
        texts: how many of them texts are made of: without the mask token that a diffusion model has behind all others.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    texts: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Shape":
        """Return a model's."""
        config: Any = model.config
        heads, form = int(config.num_attention_heads), diffusion_of(model.config)
        vocabulary = int(config.vocab_size)
        return cls(
            layers=int(config.num_hidden_layers),
            hidden=int(config.hidden_size),
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_size=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            vocabulary=vocabulary,
            texts=vocabulary - (form is not None and form.mask_token_id == vocabulary - 1),
        )


class Targets(Protocol):
    """A teacher's distributions of the next token at the positions of a batch, which are counted row by row (B * T of them)."""

    def full(self, positions: Tensor) -> Tensor:
        """Return logits at some positions (int64 `[n]`), float32 `[n, V]`."""
        ...

    def top(self, positions: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the k largest log-probabilities at a temperature, float32 `[n, k]`, their tokens, int64 `[n, k]`, and the rest.

        The rest is the logarithm of the mass of all other tokens, float32 `[n]`; None where nobody has summed it.
        """
        ...


@dataclass(kw_only=True, slots=True)
class Lesson:
    """What a teacher says of a batch; nothing in it needs a gradient.

    Attributes:
        targets: where logits were needed.
        hidden: block to its output, `[B, T, d]`.
        qkv: block to its queries, keys and values, `[B, H, T, D]` each.
        model: the teacher itself, frozen and in evaluation mode, where it was asked for.
    """

    targets: Targets | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    qkv: dict[int, QKV] = field(default_factory=dict)
    model: PreTrainedModel | None = None


class Teacher(Protocol):
    """Answers batches."""

    @property
    def note(self) -> str:
        """Return one line for people: what it is, and anything that limits what a result may claim."""
        ...

    @property
    def digest(self) -> str:
        """Return what changes with its weights."""
        ...

    @property
    def shape(self) -> Shape | None:
        """Return its sizes; None where it shows nothing but distributions."""
        ...

    def lesson(self, batch: Batch, needs: Needs) -> Lesson:
        """Return what is needed of a batch, in one forward pass."""
        ...
