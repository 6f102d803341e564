"""Domain probes: held-out rows of each source by itself, to ask a model (or an influence score) about one domain at a time."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_handler.config import DataConfig
from data_handler.stream import PackedStream


def probe_rows(config: DataConfig, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Mapping[str, list[dict[str, Tensor]]]:
    """Return held-out rows of every source, equally many tokens of each whatever the weights.

    Args:
        config: the sources; `heldout_share` says which of their documents training never sees.
        tokenizer: as for `PackedStream`.
        tokens: of each source at most.

    Returns:
        Source name to rows as `PackedStream.rows` gives them; their `domain` is the source's index in `config`.

    Raises:
        UserError: if nothing is held out, or a source cannot be read.
    """
    probes = {}
    for index, source in enumerate(config.sources):
        stream = PackedStream(replace(config, sources=(source,), heldout_tokens=tokens), tokenizer, split="heldout")
        probes[source.name] = [{**row, "domain": row["domain"] + index} for row in stream.rows()]
    return probes
