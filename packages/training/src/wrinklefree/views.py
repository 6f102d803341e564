"""What a forward pass lets others see: last hidden states, blocks' outputs, and queries, keys and values."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bitnet_arch.attention import attention_argument, head_logits
from bitnet_arch.families import family_of
from data_handler import document_attention_mask
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

Batch = dict[str, Tensor]
QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What is asked of a forward pass.

    Attributes:
        logits: the distribution of the next token.
        hidden: blocks whose output is wanted, from 0.
        qkv: blocks whose queries, keys and values are wanted.
        itself: of a teacher, the model itself, to be run on other texts.
    """

    logits: bool = False
    hidden: frozenset[int] = frozenset()
    qkv: frozenset[int] = frozenset()
    itself: bool = False

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            logits=self.logits or other.logits,
            hidden=self.hidden | other.hidden,
            qkv=self.qkv | other.qkv,
            itself=self.itself or other.itself,
        )

    def __bool__(self) -> bool:
        """Whether a forward pass is needed."""
        return self.logits or bool(self.hidden) or bool(self.qkv)


@dataclass(slots=True)
class Views:
    """What was seen.

    Attributes:
        last: hidden states after the final norm, `[B, T, d]`: what the head reads.
        hidden: block to its output, `[B, T, d]`.
        qkv: block to its queries, keys and values as attention takes them (after q/k norms and rotary positions, before keys and
            values are repeated for groups), `[B, H, T, D]` each.
    """

    last: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)
    qkv: dict[int, QKV] = field(default_factory=dict)


class Head:
    """A model's output layer, and what its family does to logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.module: nn.Module = model.get_output_embeddings()
        self.cap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.vocabulary = int(model.config.vocab_size)

    @property
    def plain(self) -> object:
        """Return the layer, if logits are what it gives, else itself."""
        return self.module if self.cap is None else self

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What gradients flow to."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map `[..., d]` to logits `[..., V]`."""
        return head_logits(self._model, hidden)


def forward_views(model: PreTrainedModel, batch: Batch, needs: Needs, inputs: Mapping[int, Tensor] | None = None) -> Views:
    """Run a decoder, without its head; attention and positions stay inside each document.

    Scaled dot product attention stays on: attention weights are never materialised.

    Args:
        model: any family of `bitnet_arch.families`.
        batch: `input_ids`, `position_ids` and `document_ids`.
        needs: what to keep.
        inputs: block to what it is to read in place of the output of the block before it, `[B, T, d]`.
    """
    blocks: Any = model.get_submodule(family_of(model.config).blocks)
    views = Views(last=batch["input_ids"])
    handles = [blocks[i].register_forward_hook(_keeping(views.hidden, i)) for i in sorted(needs.hidden)]
    handles += [blocks[i].register_forward_pre_hook(_replacing(states), with_kwargs=True) for i, states in (inputs or {}).items()]
    # A block that is computed once more in the backward pass would read what its hook no longer gives it.
    kept = [block for block in blocks if inputs and getattr(block, "gradient_checkpointing", False)]
    for block in kept:
        block.gradient_checkpointing = False
    try:
        with _seen_attention(model, views.qkv, needs.qkv):
            views.last = model.base_model(
                input_ids=batch["input_ids"],
                attention_mask=_document_mask(model, batch),
                position_ids=batch["position_ids"],
                use_cache=False,
            ).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
        for block in kept:
            block.gradient_checkpointing = True
    return views


def model_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return logits `[B, T, V]`; attention and positions stay inside each document."""
    logits: Tensor = model(
        input_ids=batch["input_ids"],
        attention_mask=_document_mask(model, batch),
        position_ids=batch["position_ids"],
        use_cache=False,
    ).logits
    return logits


def _document_mask(model: PreTrainedModel, batch: Batch) -> Tensor | dict[str, Tensor]:
    """Return who attends to whom; layers with a sliding window (Gemma 3) see no further than that."""
    at = batch["position_ids"]
    return attention_argument(model, document_attention_mask(batch["document_ids"])[:, 0], at, at)


def _keeping(kept: dict[int, Tensor], block: int) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        kept.setdefault(block, output[0] if isinstance(output, tuple) else output)  # a recomputation must not replace it

    return hook


def _replacing(states: Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": states}

    return hook


_SEEN = "wrinklefree_sdpa"
_KEPT = "_wrinklefree_qkv"


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    kept = getattr(module, _KEPT, None)
    if kept is not None:
        store, block = kept
        store.setdefault(block, (query, key, value))
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register(_SEEN, _sdpa)


@contextmanager
def _seen_attention(model: PreTrainedModel, store: dict[int, QKV], wanted: frozenset[int]) -> Iterator[None]:
    """Let the attention of some blocks leave what it takes."""
    if not wanted:
        yield
        return
    attentions = [m for m in model.modules() if getattr(m, "layer_idx", None) in wanted and hasattr(m, "q_proj")]
    config, before = model.config, model.config._attn_implementation
    config._attn_implementation = _SEEN
    for module in attentions:
        setattr(module, _KEPT, (store, module.layer_idx))
    try:
        yield
    finally:
        config._attn_implementation = before
        for module in attentions:
            delattr(module, _KEPT)
