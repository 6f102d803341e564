"""A model directory on its way to another one, one decoder block in memory at a time: for methods that run the model on the way.

`lrc.covariance.run_blocks` walks through a model whose tensors are on the meta device; a block gets its values when it is reached,
is written as the method leaves it, and loses them again. What is measured and computed is what it is on the whole model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitnet_arch.bitlinear import LAMBDA_KEY, get_lambda
from bitnet_arch.checkpoint import check_layers, compute_buffers, skeleton
from bitnet_arch.configs import LinearClass
from bitnet_arch.convert import ConversionConfig, ConversionPlan, check_family, plan_conversion
from bitnet_arch.directories import write_directory
from bitnet_arch.errors import UserError
from bitnet_arch.families import family_of
from bitnet_arch.lrc.covariance import Block, run_blocks
from bitnet_arch.memory import return_memory
from bitnet_arch.quant import Granularity
from bitnet_arch.shards import ShardWriter, check_finite
from bitnet_arch.stream import DirectoryResult, Floats, companions_of, embed_used
from bitnet_arch.weights import WeightReader

Progress = Callable[[int, int], None]
"""Called with (blocks done, blocks in all)."""


class BlockStream:
    """A directory's ternary model, block by block.

    Attributes:
        reader: the directory.
        model: its model with `BitLinear` layers, on the meta device; it changes as a method changes it.
        converting: whether the directory is a float one and is made ternary here, without norms.
    """

    def __init__(self, reader: WeightReader, granularity: Granularity | None = None) -> None:
        """Plan what is read.

        Args:
            reader: a float directory, or the master form of one that was converted and not trained since.
            granularity: how many weights share a scale, for a float directory ("tensor" by default); a master has its own.

        Raises:
            UserError: for a packed directory, a granularity that a master denies, or a family that is not known.
        """
        self.reader = reader
        if reader.form == "packed":
            raise UserError(f"{reader.directory} is packed and has no float weights to quantise: use its master or float form")
        self.converting = reader.form == "float"
        if not self.converting and granularity is not None:
            raise UserError(
                f"{reader.directory} is ternary already and has its granularity, {reader.granularity}: leave granularity out"
            )
        self.source = skeleton(reader)
        check_layers(self.source, reader)
        config = self.source.config
        self._plan = ConversionPlan(target=config, granularity=reader.granularity)
        if self.converting:
            conversion = ConversionConfig(norm="none", granularity=granularity or "tensor")
            check_family(config, conversion)
            self._plan = plan_conversion(config, conversion, Floats(reader), lambda names: {})
        self._read = DirectoryResult(self._plan.target, False, "bitlinear")
        self.model: PreTrainedModel = self._read.model
        compute_buffers(self.model)

    def write(
        self,
        out: Path,
        result: DirectoryResult,
        calibration: list[Tensor] | None,
        visit: Callable[[Block], None],
        max_shard_size: int,
        provenance: str | None,
        progress: Progress | None = None,
    ) -> None:
        """Write the result's directory.

        Args:
            out: where to.
            result: what is written.
            calibration: token ids, each int64 `[batch, time]`; without, blocks do not run.
            visit: called with each block; what it leaves is written.
            max_shard_size: bytes of tensors in a file.
            provenance: one line on where the weights come from, by default the source's.
            progress: told of the blocks that are done.
        """
        companions = companions_of(self.reader.directory, self.source, provenance)

        def fill(target: Path) -> None:
            (target / "config.json").write_text(result.config_text())
            with ShardWriter(target, result.specs(), max_shard_size) as writer:
                self._write_outside(writer, result)
                self._walk(calibration, visit, writer, result, progress)
            companions.write(target)

        write_directory(out, fill)

    @torch.no_grad()
    def _walk(
        self,
        calibration: list[Tensor] | None,
        visit: Callable[[Block], None],
        writer: ShardWriter,
        result: DirectoryResult,
        progress: Progress | None,
    ) -> None:
        family = family_of(self.model.config)
        blocks = list(self.model.get_submodule(family.blocks).named_children())
        done = 0

        @contextmanager
        def hold(prefix: str, block: nn.Module) -> Iterator[None]:
            nonlocal done
            values = {name: self._tensor(prefix + name) for name in block.state_dict()}
            block.load_state_dict(values, assign=True)
            del values
            yield
            assert get_lambda(block) == 1.0, f"{prefix} was left at another lambda"
            for name, tensor in block.state_dict().items():
                if not name.endswith(LAMBDA_KEY):
                    result.write(prefix + name, tensor, writer)
            block.to("meta")
            return_memory()
            done += 1
            if progress:
                progress(done, len(blocks))

        if calibration is not None:
            rows = embed_used(self.model, family, self.reader, calibration)
            run_blocks(self.model, rows, visit, hold)
            return
        for name, block in blocks:
            prefix = f"{family.blocks}.{name}."
            with hold(prefix, block):
                visit(Block(prefix, block, list))

    def _tensor(self, name: str) -> Tensor:
        """Return a tensor of the model, in float32."""
        if name.endswith(f".{LAMBDA_KEY}"):
            return self.reader.get(name).float() if name in self.reader else torch.ones(())
        if name in self._plan.added:
            return self._plan.added[name].float()
        tensor = self.reader.get(name).float()
        check_finite(name, tensor)
        if name in self._read.ternary and self.converting:
            return self._plan.master(name, tensor)
        return self._plan.edit(name, tensor)

    def _write_outside(self, writer: ShardWriter, result: DirectoryResult) -> None:
        """Write what is in no block: embedding, final norm, head."""
        blocks = f"{family_of(self.model.config).blocks}."
        for name in writer.specs:
            if not name.startswith(blocks):
                for piece in self.reader.pieces(name):
                    result.write(name, self._plan.edit(name, piece.float()), writer)


def result_of(stream: BlockStream, packed: bool, linear_class: LinearClass) -> DirectoryResult:
    """Return what a stream is written as if its form stays what it is."""
    return DirectoryResult(stream.model.config, packed, linear_class)
