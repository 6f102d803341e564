"""Run a model directory in several ways at once, holding one decoder layer in memory at a time."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitnet_arch.checkpoint import WeightReader, skeleton
from bitnet_arch.convert import is_quantized_linear
from bitnet_arch.gguf.plan import plan_tensors
from bitnet_arch.gguf.reader import read_gguf
from bitnet_arch.gguf.types import BY_ID, F16
from bitnet_arch.parity.forwards import Forward, Perturbed, TernaryWeight, use_half_cache
from bitnet_arch.parity.layerwise import LayerDifference, compare_linear

LogProbs = NDArray[np.float64]


class LayerStream:
    """Hidden states of several forwards over the same token windows, advanced layer by layer.

    Peak memory is one layer in its widest form, the embedding twice, and the hidden states. The embedding is the head, as in every
    model that a file can hold.

    Attributes:
        windows: int64 `[windows, time]`, each a context of its own.
        forwards: what to compute, by name.
    """

    def __init__(self, reader: WeightReader, gguf_path: Path | str, windows: Tensor, forwards: dict[str, Forward]) -> None:
        self.reader, self.windows, self.forwards = reader, windows, forwards
        self.types = matrix_types(reader, gguf_path)
        self._skeleton: Any = skeleton(reader)
        self._skeleton.eval()
        self._rotary = self._skeleton.model.rotary_emb
        embedding = reader.get("model.embed_tokens.weight").float()
        # By whether they are rounded to f16.
        self._embedding = {False: embedding, True: embedding.half().float()}
        self._noise = {
            name: torch.Generator().manual_seed(forward.noise_seed)
            for name, forward in forwards.items()
            if forward.noise_seed is not None
        }
        self.hidden = {
            name: self._embedding[forward.half_embedding][windows].to(forward.dtype) for name, forward in forwards.items()
        }

    @torch.no_grad()
    def run(self, code_edge: float, progress: Callable[[int, int], None] | None = None) -> LayerDifference:
        """Advance every forward through all layers; compare "packed" with "training" layer by layer on training's inputs.

        Args:
            code_edge: see `compare_linear`.
            progress: called with (layers done, layers in all).
        """
        found = LayerDifference()
        layers = self._skeleton.config.num_hidden_layers
        for index in range(layers):
            weights = self._matrices(index)
            for name in self.forwards:
                layer = self._build(index, name, weights)
                recorded = _record_inputs(layer) if name == "training" else {}
                self.hidden[name] = self._advance(layer, self.hidden[name])
                for module, inputs in recorded.items():
                    candidate = self.forwards["packed"].linear(weights[module])
                    label = f"model.layers.{index}.{module}"
                    found = found.merge(compare_linear(label, inputs, layer.get_submodule(module), candidate, code_edge))
            if progress:
                progress(index + 1, layers)
        return found

    @torch.no_grad()
    def logprobs(self, name: str, window: int, rows: slice) -> LogProbs:
        """Return a finished forward's log-probabilities at some positions of a window, `[rows, vocabulary]`.

        The head is applied in float32 in every forward: nothing is rounded to codes behind it.
        """
        forward = self.forwards[name]
        norm = copy.deepcopy(self._skeleton.model.norm)
        norm.load_state_dict({"weight": self.reader.get("model.norm.weight").to(forward.dtype)}, assign=True)
        states = norm(self.hidden[name][window][rows]).float()
        head = self._embedding[forward.half_embedding]
        result: LogProbs = (states @ head.T).double().log_softmax(-1).numpy()
        return result

    def _matrices(self, index: int) -> dict[str, TernaryWeight]:
        found = {}
        for name, module in self._skeleton.model.layers[index].named_modules():
            if isinstance(module, nn.Linear):
                source = f"model.layers.{index}.{name}.weight"
                codes, scale = self.reader.ternary(source)
                master = self.reader.get(source).float() if self.reader.form == "master" else None
                found[name] = TernaryWeight(codes, scale, master, self.types[source])
        return found

    def _build(self, index: int, name: str, weights: dict[str, TernaryWeight]) -> nn.Module:
        forward = self.forwards[name]
        layer: nn.Module = copy.deepcopy(self._skeleton.model.layers[index])
        for module, weight in weights.items():
            linear = forward.linear(weight).to(forward.dtype)
            layer.set_submodule(module, Perturbed(linear, self._noise[name]) if name in self._noise else linear)
        for module, submodule in layer.named_modules():
            if module.endswith("norm"):
                values = self.reader.get(f"model.layers.{index}.{module}.weight").to(forward.dtype)
                submodule.load_state_dict({"weight": values}, assign=True)
        if forward.half_cache:
            use_half_cache(layer.get_submodule("self_attn"))
        return layer

    def _advance(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1])[None]
        embeddings = self._rotary(hidden, positions)
        result: Tensor = layer(hidden, position_embeddings=embeddings, use_cache=False)
        return result


def matrix_types(reader: WeightReader, gguf_path: Path | str) -> dict[str, int]:
    """Return the ggml type that a file gives each quantised matrix, by its name in the checkpoint (F16 where the file lacks it)."""
    tensors = read_gguf(gguf_path).tensors
    types = {}
    for plan in plan_tensors(reader, "f16"):
        info = tensors.get(plan.name)
        types[plan.source] = info.ggml_id if info and info.ggml_id in BY_ID else F16
    return types


def _record_inputs(layer: nn.Module) -> dict[str, Tensor]:
    recorded: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            recorded[name] = inputs[0]

        return record

    for name, module in layer.named_modules():
        if is_quantized_linear(name):
            module.register_forward_pre_hook(recorder(name))
    return recorded
