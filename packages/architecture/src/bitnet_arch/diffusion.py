"""What makes a decoder a diffusion language model: a mask token of its own, a block size, and where predictions are read.

A directory says so with one key of `config.json`, `diffusion`, which holds the fields of `DiffusionForm`; the tokenizer names the
same token as its `mask_token`. Everything else is the family's ordinary decoder.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

from bitnet_arch.errors import UserError

DIFFUSION_KEY = "diffusion"
MASK_TOKEN = "<|mask|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionForm:
    """How a model fills in masked tokens.

    Attributes:
        mask_token_id: the token that stands for what is not known yet; no text contains it and no prediction is it.
        block_size: D: attention is bidirectional inside blocks of D positions, counted from a document's start, and causal between
            them (BD3-LM, arXiv 2503.09573; Fast-dLLM v2, arXiv 2509.26328). None: bidirectional throughout (MDLM, LLaDA).
        token_shift: whether token i is read from position i - 1, as autoregressive models have it (Fast-dLLM v2), or from i.

    Raises:
        UserError: for a value of another type or out of range.
    """

    mask_token_id: int
    block_size: int | None
    token_shift: bool

    def __post_init__(self) -> None:
        if type(self.mask_token_id) is not int or self.mask_token_id < 0:
            raise UserError(f"diffusion.mask_token_id is {self.mask_token_id!r:.40}: it must be a token's number")
        if self.block_size is not None and (type(self.block_size) is not int or self.block_size < 1):
            raise UserError(f"diffusion.block_size is {self.block_size!r:.40}: it must be at least 1, or null for the whole text")
        if not isinstance(self.token_shift, bool):
            raise UserError(f"diffusion.token_shift is {self.token_shift!r:.40}: it must be true or false")


def diffusion_of(config: PreTrainedConfig) -> DiffusionForm | None:
    """Return how a model diffuses, None for one that does not.

    Raises:
        UserError: if the configuration's `diffusion` is damaged, or its mask token is none of the vocabulary.
    """
    fields = getattr(config, DIFFUSION_KEY, None)
    if fields is None:
        return None
    if not isinstance(fields, dict) or set(fields) != set(DiffusionForm.__dataclass_fields__):
        raise UserError(f"the configuration's key {DIFFUSION_KEY!r} is damaged or of a newer version: {fields!r:.80}")
    form = DiffusionForm(**fields)
    if form.mask_token_id >= config.vocab_size:
        raise UserError(
            f"diffusion.mask_token_id is {form.mask_token_id}, and the vocabulary has {config.vocab_size} tokens: mend it"
        )
    return form


def add_mask_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int | None,
    token_shift: bool,
    token: str = MASK_TOKEN,
) -> DiffusionForm:
    """Make a decoder a diffusion model, in place: give it and its tokenizer a mask token.

    The token is new to the tokenizer, and its embedding (and row of an untied head, which is never read) is the mean of those of
    the tokenizer's tokens, so that a trained model meets an input of the usual kind. A row that the embedding has beyond the
    tokenizer's tokens is used before the embedding is made longer. A model that has a mask token keeps it.

    Args:
        model: any causal language model of transformers, ternary or not.
        tokenizer: its tokenizer; gets `mask_token`.
        block_size: as in `DiffusionForm`.
        token_shift: as in `DiffusionForm`.
        token: its spelling.

    Returns:
        What the model's configuration then says.

    Raises:
        UserError: if `token` is a real token of the tokenizer, the tokenizer is of another model, or the model has another mask
            token.
    """
    known, had = diffusion_of(model.config), tokenizer.get_vocab().get(token)
    if known is not None and had != known.mask_token_id:
        raise UserError(
            f"the model's mask token is number {known.mask_token_id}, and the tokenizer's {token!r} is {had}: use the tokenizer of "
            "the model's own directory"
        )
    if known is None and had is not None:
        raise UserError(
            f"{token!r} is a real token of the tokenizer (number {had}), which texts may contain: choose another mask token"
        )
    if known is None:
        tokens = max(tokenizer.get_vocab().values()) + 1
        if tokens > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokens} tokens, and the model {model.config.vocab_size}: use the model's own tokenizer"
            )
        tokenizer.add_special_tokens({"mask_token": token})
        mask = tokenizer.convert_tokens_to_ids(token)
        assert isinstance(mask, int)
        if mask >= model.config.vocab_size:
            model.resize_token_embeddings(mask + 1, mean_resizing=False)
        for table in {id(t): t for t in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
            _set_to_mean(table, mask, tokens)
    else:
        mask = known.mask_token_id
    form = DiffusionForm(mask_token_id=mask, block_size=block_size, token_shift=token_shift)
    model.config.diffusion = asdict(form)
    return form


@torch.no_grad()
def _set_to_mean(table: nn.Module, row: int, tokens: int) -> None:
    """Set a row of an embedding or a head to the mean of the first `tokens` rows."""
    weight = table.weight
    assert isinstance(weight, Tensor)
    weight[row] = weight[:tokens].float().mean(dim=0).to(weight.dtype)
