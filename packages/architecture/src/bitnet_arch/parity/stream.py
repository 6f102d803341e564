"""Run a model directory in several ways at once, holding one decoder layer in memory at a time."""

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_arch.bitlinear import BitLinear, BitLinearLRC
from bitnet_arch.checkpoint import skeleton
from bitnet_arch.errors import UserError
from bitnet_arch.families import family_of
from bitnet_arch.gguf.floats import decode_float, encode_float
from bitnet_arch.gguf.types import F16
from bitnet_arch.memory import return_memory
from bitnet_arch.norm import SubLN
from bitnet_arch.packed import PackedBitLinear, PackedBitLinearLRC
from bitnet_arch.parity.activations import BY_WEIGHT_TYPE
from bitnet_arch.parity.forwards import Dress, Forward, Late, Perturbed, TernaryWeight, use_half_cache
from bitnet_arch.parity.layerwise import LayerDifference, compare_linear
from bitnet_arch.stream import Call, is_complete, probe_blocks
from bitnet_arch.weights import WeightReader

LogProbs = NDArray[np.float64]


class LayerStream:
    """Hidden states of several forwards over the same token windows, advanced layer by layer.

    What enters the first block, and what each block is called with (its mask, sliding or not, and its rotary table), comes from the
    model's own forward pass, run once with its blocks taken out; so every family of `bitnet_arch.families` whose blocks map hidden
    states to hidden states can be run.

    Peak memory is one layer as the directory stores it beside one of its matrices in the widest form, or the head as the file
    stores it; and the hidden states.

    Attributes:
        windows: int64 `[windows, time]`, each a context of its own.
        forwards: what to compute, by name.
    """

    def __init__(
        self,
        reader: WeightReader,
        types: dict[str, int],
        windows: Tensor,
        forwards: dict[str, Forward],
        only: dict[str, int] | None = None,
    ) -> None:
        """Enter the model.

        Args:
            reader: the opened model directory.
            types: the ggml type of each quantised matrix, of the embedding and of the head in the file, by their names in the
                directory; F16 where a name is missing.
            windows: int64 `[windows, time]`.
            forwards: what to compute.
            only: forwards that are computed for so many windows alone, the first ones.

        Raises:
            UserError: for tokens that the model does not have, or a family whose blocks cannot be run one by one.
        """
        self.reader, self.windows, self.forwards, self.types = reader, windows, forwards, types
        self._skeleton: Any = skeleton(reader)
        self._skeleton.eval()
        self._family = family_of(self._skeleton.config)
        self._noise = {
            name: torch.Generator().manual_seed(forward.noise_seed)
            for name, forward in forwards.items()
            if forward.noise_seed is not None
        }
        self._counts = dict.fromkeys(forwards, len(windows)) | (only or {})
        self._calls: dict[tuple[torch.dtype, int], list[Call]] = {}
        self.hidden: dict[str, Tensor] = {}
        entered: dict[tuple[bool, torch.dtype, int], Tensor] = {}
        for name, forward in forwards.items():
            form = forward.stored_embedding, forward.dtype, self._counts[name]
            if form not in entered:
                entered[form] = self._enter(*form)
            self.hidden[name] = entered[form]
        self._encoded_head: list[NDArray[np.uint8]] = []

    @torch.no_grad()
    def run(self, code_edge: float, progress: Callable[[int, int], None] | None = None) -> LayerDifference:
        """Advance every forward through all layers; compare "packed" with "training" layer by layer on training's inputs.

        Args:
            code_edge: see `compare_linear`.
            progress: called with (layers done, layers in all).
        """
        found, layers = LayerDifference(), len(self._blocks())
        for index in range(layers):
            found = found.merge(self._advance(index, code_edge))
            return_memory()
            if progress:
                progress(index + 1, layers)
        return found

    def _advance(self, index: int, code_edge: float) -> LayerDifference:
        """Take every forward through one layer; nothing of the layer outlives the call."""
        weights, recorded = self._matrices(index), dict[str, Tensor]()
        for name, forward in self.forwards.items():
            layer = self._build(index, name, weights, recorded if name == "training" else None)
            arguments, keywords = self._calls[forward.dtype, self._counts[name]][index]
            result = layer(self.hidden[name], *arguments, **keywords)
            self.hidden[name] = result[0] if isinstance(result, tuple) else result
        found = LayerDifference()
        for module, inputs in recorded.items():
            label = f"{self._family.blocks}.{index}.{module}"
            reference, candidate = (self.forwards[name].linear(weights[module]) for name in ("training", "packed"))
            found = found.merge(compare_linear(label, inputs, reference, candidate, code_edge))
        return found

    @torch.no_grad()
    def logprobs(self, names: Iterable[str], window: int, rows: slice) -> dict[str, LogProbs]:
        """Return finished forwards' log-probabilities at some positions of a window, `[rows, vocabulary]` each.

        The head is applied in float32 in every forward: only an engine rounds its input, and only in some types. Its pieces are
        the same for all forwards, and read once.
        """
        head, vocabulary = self._head_name(), int(self._skeleton.config.vocab_size)
        states = {name: self._final_states(name, head, window, rows) for name in names}
        logits = {name: torch.empty(len(found), vocabulary) for name, found in states.items()}
        for stored in (False, True):
            sharing = [name for name in states if self.forwards[name].stored_embedding == stored]
            start = 0
            for piece in self._head(head, stored) if sharing else ():
                for name in sharing:
                    logits[name][:, start : start + len(piece)] = F.linear(states[name], piece)
                start += len(piece)
        cap = getattr(self._skeleton.config, "final_logit_softcapping", None)
        result: dict[str, LogProbs] = {}
        for name in states:
            found = logits.pop(name)
            found = torch.tanh(found / cap) * cap if cap else found
            result[name] = found.double().log_softmax(-1).numpy()
        return result

    def _final_states(self, name: str, head: str, window: int, rows: slice) -> Tensor:
        """Return what a forward gives the head, float32 `[rows, width]`."""
        forward, family = self.forwards[name], self._family
        norm = copy.deepcopy(self._skeleton.get_submodule(family.final_norm))
        _load(norm, self.reader, f"{family.final_norm}.", forward.dtype)
        states: Tensor = norm(self.hidden[name][window][rows]).float()
        return BY_WEIGHT_TYPE[self.types.get(head, F16)](states) if forward.rounded_head else states

    def _blocks(self) -> list[nn.Module]:
        return list(self._skeleton.get_submodule(self._family.blocks).children())

    def _head_name(self) -> str:
        tied = self._skeleton.config.tie_word_embeddings
        return f"{self._family.embedding if tied else self._family.head}.weight"

    def _head(self, name: str, stored: bool) -> Iterator[Tensor]:
        """Yield the head's rows in float32, some at a time: the float matrix is the largest there is."""
        if not stored:
            yield from (rows.float() for rows in self.reader.pieces(name))
            return
        if not self._encoded_head:
            self._encoded_head = [self._encode(name, rows) for rows in self.reader.pieces(name)]
        yield from (self._decode(name, encoded) for encoded in self._encoded_head)

    def _encode(self, name: str, rows: Tensor) -> NDArray[np.uint8]:
        """Return rows of the embedding or head as the file stores them, `[rows, bytes]`."""
        encoded = encode_float(rows.float().numpy(), self.types.get(name, F16))
        return np.ascontiguousarray(encoded).view(np.uint8).reshape(len(rows), -1)

    def _decode(self, name: str, encoded: NDArray[np.uint8]) -> Tensor:
        shape = len(encoded), self.reader.shape(name)[1]
        return torch.from_numpy(decode_float(encoded, self.types.get(name, F16), shape).copy())

    @torch.no_grad()
    def _enter(self, stored: bool, dtype: torch.dtype, count: int) -> Tensor:
        """Return what goes into the first block, of the first `count` windows, and note what the blocks are called with."""
        model, family = skeleton(self.reader), self._family
        model.eval()
        name = f"{family.embedding}.weight"
        used, places = self.windows[:count].unique(return_inverse=True)
        if int(used.min()) < 0 or int(used.max()) >= self.reader.shape(name)[0]:
            raise UserError(f"a probe has a token id outside the vocabulary of {self.reader.shape(name)[0]}: use other windows")
        rows = torch.cat([self.reader.get(name, slice(token, token + 1)) for token in used.tolist()])
        embedding: Any = model.get_submodule(family.embedding)
        rows = self._decode(name, self._encode(name, rows)) if stored else rows
        embedding.weight = nn.Parameter(rows.to(dtype), requires_grad=False)
        embedding.num_embeddings, embedding.padding_idx = len(rows), None
        seen: list[tuple[Tensor, Call]] = []
        trunk, blocks = probe_blocks(model, family, seen)
        trunk(input_ids=places, use_cache=False)
        if not is_complete(seen, blocks):
            raise UserError(
                f"the blocks of {model.config.model_type} cannot be run one by one, so that no file of it can be proven"
            )
        self._calls[dtype, count] = [call for _, call in seen]
        return seen[0][0]

    def _matrices(self, index: int) -> dict[str, TernaryWeight]:
        block, prefix = self._blocks()[index], f"{self._family.blocks}.{index}."
        return {name: self._matrix(prefix + name, block.get_submodule(name)) for name in self._family.linears}

    def _matrix(self, name: str, module: nn.Module) -> TernaryWeight:
        source = f"{name}.weight"
        codes, scale = self.reader.ternary(source)
        master = self.reader.get(source) if self.reader.form == "master" else None
        bias = self.reader.get(f"{name}.bias").float() if f"{name}.bias" in self.reader else None
        kind = self.types.get(source, F16)
        return TernaryWeight(codes, scale, master, kind, bias, self.reader.granularity, _dress(self.reader, name, module))

    def _build(
        self, index: int, name: str, weights: dict[str, TernaryWeight], recorded: dict[str, Tensor] | None = None
    ) -> nn.Module:
        """Return a block as a forward computes it; what its ternary products read is kept in `recorded`, by their names."""
        forward = self.forwards[name]
        config = self._skeleton.config  # larger than a block without values, and nobody's to change
        layer: nn.Module = copy.deepcopy(self._blocks()[index], {id(config): config})
        for module, weight in weights.items():
            record = None if recorded is None else partial(recorded.__setitem__, module)
            linear = Late(forward, weight, record)
            layer.set_submodule(module, Perturbed(linear, self._noise[name]) if name in self._noise else linear)
        inside = tuple(f"{module}." for module in weights)
        _load(layer, self.reader, f"{self._family.blocks}.{index}.", forward.dtype, inside)
        if forward.half_cache:
            use_half_cache(layer.get_submodule("self_attn"))
        return layer


def _dress(reader: WeightReader, name: str, module: nn.Module) -> Dress:
    """Return what a layer of a skeleton does around its product, with the directory's values."""
    if not isinstance(module, BitLinear | PackedBitLinear):
        return Dress()
    norm = None
    if module.in_norm is not None:
        norm = SubLN(module.in_features, float(reader.get(f"{name}.in_norm.eps")))
        norm.weight = nn.Parameter(reader.get(f"{name}.in_norm.weight").float(), requires_grad=False)
    adapters = None
    if isinstance(module, BitLinearLRC | PackedBitLinearLRC):
        adapters = reader.get(f"{name}.lrc_u").float(), reader.get(f"{name}.lrc_v").float(), module.lrc_dtype
    return Dress(in_norm=norm, rotation=module.rotation, adapters=adapters)


def _load(module: nn.Module, reader: WeightReader, prefix: str, dtype: torch.dtype, without: tuple[str, ...] = ()) -> None:
    """Give a part of a skeleton its stored values."""
    names = [name for name, _ in module.named_parameters() if not without or not name.startswith(without)]
    values = {name: reader.get(prefix + name).to(dtype) for name in names}
    module.load_state_dict(values, strict=False, assign=True)
