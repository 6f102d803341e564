"""Low-rank corrections from directory to directory, one decoder block in memory at a time."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig

from bitnet_arch.bitlinear import LAMBDA_KEY
from bitnet_arch.block_stream import BlockStream, Progress
from bitnet_arch.errors import UserError
from bitnet_arch.families import base_type, quantized_names
from bitnet_arch.lrc.model import LRCConfig, check_model_rank, correct_block
from bitnet_arch.modeling import TernaryForm, form_of, ternary_config
from bitnet_arch.quant import Granularity
from bitnet_arch.shards import MAX_SHARD_SIZE
from bitnet_arch.stream import DirectoryResult, check_output
from bitnet_arch.weights import WeightReader, open_weights


def lrc_directory(
    source: Path | str,
    out: Path | str,
    config: LRCConfig,
    calibration: Iterable[Tensor],
    *,
    granularity: Granularity | None = None,
    packed: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    provenance: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Make a model directory ternary and give every layer a low-rank correction.

    The result is bit for bit what `add_lrc` and then `save_master` or `save_packed` write: a model in our own form. Memory is as
    for `quantize_directory`, with three covariances in place of one.

    Args:
        source: a float model directory, or the master form of one that was converted and not trained since.
        out: where to write; created or replaced as a whole.
        config: what to solve for.
        calibration: token ids, each int64 `[batch, time]`.
        granularity: how many weights share a scale, for a float source ("tensor" by default).
        packed: write 2-bit weights instead of float masters.
        max_shard_size: bytes of tensors in a file, from which on there are several and an index.
        provenance: one line on where the weights come from; by default the source's own.
        progress: called with (blocks done, blocks in all).

    Raises:
        UserError: as for `add_lrc`; for a packed source, a granularity that the source denies, a weight that is NaN or infinite, or
            a full disk.
    """
    source, out = Path(source), Path(out)
    check_output(source, out, packed, "bitlinear")
    with open_weights(source) as reader:
        stream = BlockStream(reader, granularity)
        form = form_of(stream.model.config) or TernaryForm()
        if form.lrc_rank:
            raise UserError(f"{source} has a low-rank correction already: start from the model without it")
        check_model_rank(stream.model, config.rank)
        _check_lambda(reader, quantized_names(stream.model))
        values = stream.model.config.to_dict()
        for name in ("model_type", "ternary", "quantization_config"):
            values.pop(name, None)
        base = AutoConfig.for_model(base_type(stream.model.config), **values)
        target = ternary_config(base, replace(form, lrc_rank=config.rank, lrc_dtype=config.dtype))
        result = DirectoryResult(target, packed, "autobitlinear")
        visit = partial(correct_block, stream.model, config)
        stream.write(out, result, list(calibration), visit, max_shard_size, provenance, progress)


def _check_lambda(reader: WeightReader, layers: list[str]) -> None:
    for name in layers:
        key = f"{name}.{LAMBDA_KEY}"
        if key in reader and (value := float(reader.get(key))) != 1.0:
            raise UserError(f"{reader.directory} was saved at lambda {value:g}: train it to lambda 1 before adding a correction")
