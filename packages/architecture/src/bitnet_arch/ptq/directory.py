"""Post-training ternary from directory to directory, one decoder block in memory at a time."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from torch import Tensor

from bitnet_arch.block_stream import BlockStream, Progress, result_of
from bitnet_arch.configs import LinearClass
from bitnet_arch.errors import UserError
from bitnet_arch.lrc.covariance import Block
from bitnet_arch.modeling import form_of
from bitnet_arch.ptq.model import CORRECTED, check_method, quantize_block, quantize_layers
from bitnet_arch.ptq.quantizers import Method
from bitnet_arch.quant import Granularity
from bitnet_arch.shards import MAX_SHARD_SIZE
from bitnet_arch.stream import check_output
from bitnet_arch.weights import open_weights


def quantize_directory(
    source: Path | str,
    out: Path | str,
    method: Method,
    calibration: Iterable[Tensor] | None = None,
    *,
    granularity: Granularity | None = None,
    epsilon: float = 0.01,
    packed: bool = False,
    linear_class: LinearClass = "bitlinear",
    max_shard_size: int = MAX_SHARD_SIZE,
    provenance: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Make a model directory ternary without gradients.

    The result is bit for bit what `quantize_model` and then `save_master` or `save_packed` write. In memory are the embeddings of
    the calibration's tokens, a block in float32, the covariances of its inputs, the calibration's hidden states, and what the
    method takes for one layer: GPTQ holds some five matrices of a covariance's size.

    Args:
        source: a float model directory, or the master form of one that was converted (`convert_directory` chooses norms and
            rotation) and not trained since.
        out: where to write; created or replaced as a whole.
        method: see `bitnet_arch.ptq.quantizers`.
        calibration: as for `quantize_model`.
        granularity: how many weights share a scale, for a float source ("tensor" by default).
        epsilon: as for `quantize_model`.
        packed: write 2-bit weights instead of float masters.
        linear_class: the scale convention of packed weights, see `save_packed`.
        max_shard_size: bytes of tensors in a file, from which on there are several and an index.
        provenance: one line on where the weights come from; by default the source's own.
        progress: called with (blocks done, blocks in all).

    Raises:
        UserError: as for `quantize_model`; for a packed source, a granularity that the source denies, a weight that is NaN or
            infinite, or a full disk.
    """
    source, out = Path(source), Path(out)
    check_output(source, out, packed, linear_class)
    check_method(method, calibration, epsilon)
    with open_weights(source) as reader:
        stream = BlockStream(reader, granularity)
        if (form := form_of(stream.model.config)) is not None and form.lrc_rank:
            raise UserError(f"{source} {CORRECTED}")

        def by_weights(block: Block) -> None:
            quantize_layers(block.module, method)

        visit = by_weights if calibration is None else partial(quantize_block, stream.model, method, epsilon)
        rows = None if calibration is None else list(calibration)
        stream.write(out, result_of(stream, packed, linear_class), rows, visit, max_shard_size, provenance, progress)
