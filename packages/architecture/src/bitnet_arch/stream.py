"""Convert a model from directory to directory without ever holding it: the largest tensor at a time.

Calibration holds one decoder block and sees what `measure_inputs` sees of the whole model: the model's own forward pass is run once
with its blocks taken out, which yields what it hands to each of them (masks, positions, rotary tables, whatever the family
needs); then the blocks are run one after the other.
"""

import copy
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from bitnet_arch.bitlinear import LAMBDA_KEY
from bitnet_arch.calibration import check_calibration, max_positions
from bitnet_arch.checkpoint import (
    Companions,
    check_layers,
    config_text,
    load_tokenizer,
    own_names,
    read_generation_config,
    read_provenance,
    skeleton,
)
from bitnet_arch.configs import LinearClass, quantization_block
from bitnet_arch.convert import ConversionConfig, ConversionPlan, check_family, check_needs, plan_conversion, with_layers
from bitnet_arch.directories import write_directory
from bitnet_arch.errors import UserError
from bitnet_arch.families import Family, checked_names, family_of, quantized_names
from bitnet_arch.modeling import form_of
from bitnet_arch.packing import CODES_PER_BYTE, pack_codes
from bitnet_arch.quant import GROUP, Granularity, quantize_weight
from bitnet_arch.shards import MAX_SHARD_SIZE, ShardWriter, TensorSpec, check_finite
from bitnet_arch.subln import InputStatistics, recording
from bitnet_arch.weights import WeightReader, open_weights, stored_scale


def convert_directory(
    source: Path | str,
    out: Path | str,
    config: ConversionConfig | None = None,
    calibration: Iterable[Tensor] | None = None,
    *,
    packed: bool = False,
    linear_class: LinearClass = "bitlinear",
    max_shard_size: int = MAX_SHARD_SIZE,
    provenance: str | None = None,
) -> None:
    """Convert a float model directory to a ternary one, tensor by tensor.

    The result is what `convert_model` and then `save_master` or `save_packed` write: float32 masters, or 2-bit codes.

    Args:
        source: a float model directory.
        out: where to write; created or replaced as a whole.
        config: what to do; the default inserts calibrated SubLN.
        calibration: token ids, each int64 `[batch, time]`; needed when norms are inserted with calibrated gains.
        packed: write 2-bit weights instead of float masters.
        linear_class: the scale convention of packed weights, see `save_packed`.
        max_shard_size: bytes of tensors in a file, from which on there are several and an index.
        provenance: one line on where the weights come from; by default the source's own.

    Raises:
        UserError: for a source that cannot be converted so, a weight that is NaN or infinite, calibration that is missing or has no
            effect, or a full disk.
    """
    config, source, out = config or ConversionConfig(), Path(source), Path(out)
    check_output(source, out, packed, linear_class)
    check_source(source, config)
    check_needs(config, calibration)
    rows = [] if calibration is None else list(calibration)
    with open_weights(source) as reader:
        model = skeleton(reader)
        check_layers(model, reader)
        checked_names(model)  # before it is run
        companions = companions_of(source, model, provenance)
        plan = plan_conversion(model.config, config, Floats(reader), partial(measure_stream, reader, calibration=rows))
        result = DirectoryResult(plan.target, packed, linear_class)

        def fill(target: Path) -> None:
            (target / "config.json").write_text(result.config_text())
            with ShardWriter(target, result.specs(), max_shard_size) as writer:
                _write(reader, writer, plan, result)
            companions.write(target)

        write_directory(out, fill)


def check_output(source: Path, out: Path, packed: bool, linear_class: str) -> None:
    """Refuse an output that cannot be written so.

    Raises:
        UserError: if it is the source, or for a scale convention that is unknown or without effect.
    """
    if linear_class not in get_args(LinearClass):
        raise UserError(f"unknown scale convention {linear_class!r}: choose {' or '.join(get_args(LinearClass))}")
    if linear_class != "bitlinear" and not packed:
        raise UserError(f"linear_class={linear_class!r} has no effect on float masters: leave it out or pass packed=True")
    if out.resolve() == source.resolve():
        raise UserError(f"{out} is the source itself, whose weights would be lost: choose another output")


def companions_of(source: Path, model: PreTrainedModel, provenance: str | None) -> Companions:
    """Return what goes beside the result of a directory: what lies beside the source.

    Args:
        source: the directory.
        model: its skeleton, for the way of generating that it has by default.
        provenance: replaces the source's own.
    """
    return Companions(
        generation=read_generation_config(source) or model.generation_config,
        tokenizer=load_tokenizer(source) if (source / "tokenizer.json").is_file() else None,
        provenance=provenance or read_provenance(source),
    )


def check_source(source: Path | str, config: ConversionConfig) -> None:
    """Refuse a directory that cannot be converted, before anything of it is computed.

    Raises:
        UserError: if it is ternary already, of a family that is not known, or its sizes do not allow the conversion.
    """
    with open_weights(source) as reader:
        if reader.form != "float":
            raise UserError(f"{source} is ternary already ({reader.form}): there is nothing to convert")
        check_family(reader.model_config, config)


class Floats:
    """A directory's tensors in float32; one with a value that is no number is refused."""

    def __init__(self, reader: WeightReader) -> None:
        self.reader = reader

    def get(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            UserError: naming it, if a value is NaN or infinite.
        """
        tensor = self.reader.get(name).float()
        check_finite(name, tensor)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.reader.shape(name)


class DirectoryResult:
    """What a directory will hold: its configuration, and the names, types and shapes of its tensors.

    Attributes:
        model: the model in master form, on the meta device.
        packed: whether ternary weights are 2-bit codes.
        linear_class: the scale convention of codes.
        ternary: names of the ternary weights.
    """

    def __init__(self, config: PreTrainedConfig, packed: bool, linear_class: LinearClass) -> None:
        with torch.device("meta"):
            self.model: PreTrainedModel = with_layers(AutoModelForCausalLM.from_config(config))
        self.packed = packed
        self.form = form_of(config)
        self.linear_class: LinearClass = "autobitlinear" if self.form else linear_class
        self.ternary = {f"{name}.weight" for name in quantized_names(self.model)}

    @property
    def granularity(self) -> Granularity:
        """How many weights share a scale."""
        return self.form.granularity if self.form else "tensor"

    def config_text(self) -> str:
        """Return the `config.json`."""
        block = None
        if not self.form:
            head = family_of(self.model.config).head
            master = quantization_block("autobitlinear", "online", head)
            block = quantization_block(self.linear_class, "offline", head) if self.packed else master
        return config_text(self.model.config, type(self.model).__name__, block, self.packed)

    def specs(self) -> dict[str, TensorSpec]:
        """Return what the files will hold.

        Raises:
            UserError: if a matrix cannot be packed.
        """
        found = {}
        for name, tensor in own_names(self.model):
            if name.endswith(f".{LAMBDA_KEY}"):
                continue
            shape = tuple(tensor.shape)
            if self.packed and name in self.ternary:
                if shape[0] % CODES_PER_BYTE:
                    need = f"a packed weight needs rows divisible by {CODES_PER_BYTE}, not {shape[0]}"
                    raise UserError(f"{name.removesuffix('.weight')}: {need}: save the master form")
                found[name] = TensorSpec(torch.uint8, (shape[0] // CODES_PER_BYTE, shape[1]))
                scales = {"tensor": (1,), "row": (shape[0], 1), "group128": (shape[0], -(-shape[1] // GROUP))}
                found[_scale_name(name)] = TensorSpec(torch.float32, scales[self.granularity])
            else:
                found[name] = TensorSpec(self._float_type(name), shape)
        return found

    def _float_type(self, name: str) -> torch.dtype:
        halves = self.packed and self.form is not None and self.form.lrc_rank and self.form.lrc_dtype == "float16"
        return torch.float16 if halves and name.endswith((".lrc_u", ".lrc_v")) else torch.float32

    def write(self, name: str, tensor: Tensor, writer: ShardWriter) -> None:
        """Write a tensor, or the next rows of one that is not ternary, from its master: float32."""
        if not self.packed or name not in self.ternary:
            writer.write(name, tensor.to(writer.specs[name].dtype))
            return
        codes, scale = quantize_weight(tensor, self.granularity)
        del tensor
        writer.write(name, pack_codes(codes))
        writer.write(_scale_name(name), stored_scale(scale, self.linear_class))


@torch.no_grad()
def _write(reader: WeightReader, writer: ShardWriter, plan: ConversionPlan, result: DirectoryResult) -> None:
    """Write every tensor of a conversion."""
    for name in writer.specs:
        if name in plan.added:
            result.write(name, plan.added[name].float(), writer)
        elif name in result.ternary:
            weight = reader.get(name).float()
            check_finite(name, weight)
            result.write(name, plan.master(name, weight), writer)
        elif name in reader:  # else a scale, which comes with its matrix
            for piece in reader.pieces(name):
                result.write(name, plan.edit(name, piece.float()), writer)


def _scale_name(weight: str) -> str:
    return weight.removesuffix("weight") + "weight_scale"


# -------------------------------------------------------------------------------------------------------- calibration


@torch.no_grad()
def measure_stream(reader: WeightReader, layers: Iterable[str], calibration: Iterable[Tensor]) -> dict[str, InputStatistics]:
    """Measure what goes into layers of a float directory's model, with one of its blocks in memory at a time.

    Args:
        reader: a float directory.
        layers: dotted names of layers inside blocks.
        calibration: token ids, each int64 `[batch, time]`.

    Returns:
        Layer name to statistics: those of `measure_inputs` on the whole model in float32.

    Raises:
        UserError: for tokens that the model does not have, a weight that is NaN or infinite, or a family whose blocks cannot be run
            one by one.
    """
    model = skeleton(reader)
    model.eval()
    family = family_of(model.config)
    blocks = list(model.get_submodule(family.blocks).children())
    hidden, calls = _enter(model, family, reader, list(calibration))
    layers, floats = list(layers), Floats(reader)
    found: dict[str, InputStatistics] = {}
    for index, block in enumerate(blocks):
        prefix = f"{family.blocks}.{index}."
        live = copy.deepcopy(block)
        live.load_state_dict({name: floats.get(prefix + name) for name in live.state_dict()}, assign=True)
        inside = [name.removeprefix(prefix) for name in layers if name.startswith(prefix)]
        with recording(live, inside) as statistics:
            for row, states in enumerate(hidden):
                arguments, keywords = calls[row][index]
                result = live(states, *arguments, **keywords)
                hidden[row] = result[0] if isinstance(result, tuple) else result
        found |= {prefix + name: values for name, values in statistics.items()}
    return found


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keywords of a block beside the hidden states: masks, positions, rotary tables, whatever its family hands to it."""
Seen = list[tuple[Tensor, Call]]
"""What went into each block: hidden states and the rest."""


def probe_blocks(model: PreTrainedModel, family: Family, seen: Seen) -> tuple[nn.Module, int]:
    """Take a skeleton's blocks and final norm out, so that its own forward pass says what each block is called with.

    Args:
        model: changed in place.
        family: where its parts are.
        seen: receives an entry a block whenever the trunk runs.

    Returns:
        The trunk, to be called with `input_ids` and `use_cache=False`, and how many blocks it has.
    """
    blocks: nn.ModuleList = model.get_submodule(family.blocks)  # type: ignore[assignment]
    for index, block in enumerate(blocks):
        blocks[index] = _Probe(block, seen)
    model.set_submodule(family.final_norm, nn.Identity())
    return model.get_submodule(family.blocks.rpartition(".")[0]), len(blocks)


def is_complete(seen: Seen, blocks: int) -> bool:
    """Say whether every block was called once, on hidden states of one shape: else they cannot be run one by one."""
    return len(seen) == blocks and all(states.shape == seen[0][0].shape for states, _ in seen)


def _enter(
    model: PreTrainedModel, family: Family, reader: WeightReader, calibration: list[Tensor]
) -> tuple[list[Tensor], list[list[Call]]]:
    """Return what goes into the first block for every row of tokens, and what else goes into each block."""
    rows = embed_used(model, family, reader, calibration)
    seen: Seen = []
    trunk, blocks = probe_blocks(model, family, seen)
    hidden, calls = [], []
    for ids in rows:
        seen.clear()
        trunk(input_ids=ids, use_cache=False)
        if not is_complete(seen, blocks):
            raise UserError(f"the blocks of {model.config.model_type} cannot be run one by one: convert the model in memory")
        hidden.append(seen[0][0])
        calls.append([call for _, call in seen])
    return hidden, calls


def embed_used(model: PreTrainedModel, family: Family, reader: WeightReader, calibration: list[Tensor]) -> list[Tensor]:
    """Give the embedding the rows of the calibration's tokens only; return the tokens by their places among them.

    Raises:
        UserError: for no tokens, tokens that the model does not have, or an embedding of one that is NaN or infinite.
    """
    name = f"{family.embedding}.weight"
    calibration = check_calibration(calibration, reader.shape(name)[0], max_positions(model.config))
    used, places = torch.cat([ids.flatten() for ids in calibration]).unique(return_inverse=True)
    embedding: Any = model.get_submodule(family.embedding)
    table = torch.cat([reader.get(name, slice(token, token + 1)) for token in used.tolist()]).float()
    check_finite(name, table)
    embedding.weight = nn.Parameter(table, requires_grad=False)
    embedding.num_embeddings, embedding.padding_idx = len(table), None
    parts = places.split([ids.numel() for ids in calibration])
    return [part.reshape(ids.shape) for part, ids in zip(parts, calibration, strict=True)]


class _Probe(nn.Module):
    """Stands for a block: notes what it is called with and hands its input on. It has the block's attributes."""

    def __init__(self, block: nn.Module, seen: list[tuple[Tensor, Call]]) -> None:
        super().__init__()
        self.__dict__["block"], self.__dict__["seen"] = block, seen  # not as a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        self.seen.append((hidden, (arguments, keywords)))
        return hidden
