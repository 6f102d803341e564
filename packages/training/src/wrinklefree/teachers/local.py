"""A teacher that runs here."""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from bitnet_arch import UserError
from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree.losses.divergence import top_log_probabilities
from wrinklefree.teachers.base import Lesson, Shape
from wrinklefree.views import Batch, Head, Needs, forward_views

NOT_COMPUTED = frozenset(("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"))
"""Keys of a configuration that say where a model lies and what wrote it; what its tensors are is in the tensors."""


class LocalTeacher:
    """A model whose distributions and states are learnt from; its parameters never are.

    Attributes:
        note: one line on what it is.
        shape: its sizes.
    """

    def __init__(
        self, model: PreTrainedModel, note: str, *, device: str | None = None, offload: bool = False, compiled: bool = False
    ) -> None:
        """Take over a model.

        Args:
            model: any decoder; set to evaluation mode and frozen.
            note: one line on what it is.
            device: where it runs; None where the batches are.
            offload: move its weights to main memory after every batch, all but the head's.
            compiled: run it through `torch.compile`.
        """
        self.model = model.eval().requires_grad_(False)
        self.note = note
        self.shape: Shape | None = Shape.of(model)
        self.offload, self.compiled = offload, compiled
        self._device = None if device is None else torch.device(device)
        self._head = Head(model)
        if compiled:
            self.model.base_model.compile()

    @cached_property
    def digest(self) -> str:
        """A digest of its configuration (not `NOT_COMPUTED`) and, of every tensor, name, type, shape, sum and a thousand elements.

        Equal weights do not make equal answers: rotary base, window, caps and the like are in the configuration alone.
        """
        digest = hashlib.sha256(json.dumps(_computed(self.model.config.to_dict()), sort_keys=True, default=str).encode())
        for name, tensor in self.model.state_dict().items():
            flat = tensor.detach().flatten()
            some = flat[:: max(1, flat.numel() // 1024)].double().cpu()
            total = float(flat.sum(dtype=torch.float64))
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total!r}".encode())
            digest.update(some.numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def lesson(self, batch: Batch, needs: Needs) -> Lesson:
        """Return what is needed of a batch, in one forward pass in the teacher's own precision."""
        device = self._device or batch["input_ids"].device
        self.model.to(device)
        if not needs:
            return Lesson(model=self.model)
        moved = {key: batch[key].to(device) for key in ("input_ids", "position_ids", "document_ids")}
        with torch.autocast(device.type, enabled=False):
            seen = forward_views(self.model, moved, needs)
        if self.offload and not needs.itself:
            _move_all_but(self.model, self._head.module, "cpu")
        targets = HeadTargets(seen.last, self._head) if needs.logits else None
        return Lesson(targets=targets, hidden=seen.hidden, qkv=seen.qkv, model=self.model if needs.itself else None)


class HeadTargets:
    """Distributions that are made where they are asked for, from the last hidden states: logits of all tokens never exist."""

    def __init__(self, last: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        """Keep hidden states `[B, T, d]` and what makes logits of them."""
        self._last, self._head = last.flatten(0, 1), head

    @torch.no_grad()
    def full(self, positions: Tensor) -> Tensor:
        """Return logits at some positions, float32 `[n, V]`, on the positions' device."""
        rows = self._last[positions.to(self._last.device)]
        with torch.autocast(rows.device.type, enabled=False):
            return self._head(rows).float().to(positions.device)

    def top(self, positions: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the k largest log-probabilities, their tokens, and the logarithm of the mass of all others."""
        return top_log_probabilities(self.full(positions), top_k, temperature)


def check_device(device: str | None, offload: bool) -> None:
    """Refuse a device that is not there.

    Raises:
        UserError: naming it.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        known = found.type == "cpu" or (found.type == "cuda" and torch.cuda.is_available())
        known = known and (found.index is None or found.type == "cpu" or found.index < torch.cuda.device_count())
    except RuntimeError:
        known = False
    if not known:
        raise UserError(f"teacher.device={device} is no device of this machine: leave it out, or give cpu, cuda or cuda:N")
    if offload and found.type == "cpu":
        raise UserError("teacher.offload has no effect on a CPU, where weights are in main memory anyway: leave it out")


def _computed(value: Any) -> Any:
    if isinstance(value, dict):  # keys as text, since not all can be sorted as they are
        return {str(key): _computed(inner) for key, inner in value.items() if key not in NOT_COMPUTED}
    return [_computed(inner) for inner in value] if isinstance(value, list | tuple) else value


def _move_all_but(model: nn.Module, kept: nn.Module, device: str) -> None:
    stays: set[int] = {id(tensor) for tensor in kept.parameters()}
    for module in model.modules():
        held: Any = module
        for name, parameter in held._parameters.items():
            if parameter is not None and id(parameter) not in stays:
                held._parameters[name].data = parameter.data.to(device)
        for name, buffer in held._buffers.items():
            if buffer is not None:
                held._buffers[name] = buffer.to(device)
