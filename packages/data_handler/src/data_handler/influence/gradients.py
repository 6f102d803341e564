"""Per-sample gradients over named layers by `torch.func`: no loop over samples, memory under a bound, on disk if asked."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm  # type: ignore[import-untyped]

from data_handler.cache import SHOW_PROGRESS_AFTER
from data_handler.errors import UserError
from data_handler.influence.layers import select_parameters
from data_handler.influence.objectives import Objective, next_token_loss
from data_handler.influence.projection import ProjectionKind, Projector, make_projector

MIB = 2**20
FLOAT = 4
ROW_BLOCK = 256
"""Rows of a gradient matrix that an estimator reads at a time."""

Examples = Mapping[str, Tensor]
"""Tensors whose first dimension counts the examples."""

Transform = Callable[[Tensor], Tensor]
"""What is done to gradients [b, d] before they are projected, such as Adam's preconditioner."""


@dataclass(frozen=True)
class Layer:
    """A parameter's columns in a gradient matrix.

    Attributes:
        name: the parameter's name, or what a joint projection covers.
        start: first column.
        stop: one past the last.
        size: numbers before projection.
    """

    name: str
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Gradients:
    """Gradients of n examples.

    Attributes:
        values: float32 [n, d]; where spilled, a view of the mapped file.
        layers: the columns' meaning, in order, without gaps.
    """

    values: Tensor
    layers: tuple[Layer, ...]

    def blocks(self) -> Iterator[Tensor]:
        """Yield the rows, `ROW_BLOCK` at a time: what estimators read, so that a spilled matrix stays on disk."""
        yield from self.values.split(ROW_BLOCK)

    def joint(self) -> "Gradients":
        """Return the same matrix as one layer, for curvature that couples all parameters."""
        return Gradients(self.values, (Layer("all", 0, self.values.shape[1], sum(layer.size for layer in self.layers)),))

    def times(self, vectors: Tensor) -> Tensor:
        """Return the inner products with `vectors` [k, d], [n, k]."""
        return torch.cat([block @ vectors.T for block in self.blocks()])

    def squared_norms(self) -> Tensor:
        """Return ‖g‖² of each example and layer, [n, layers]."""
        return torch.cat(
            [torch.stack([block[:, a.start : a.stop].square().sum(1) for a in self.layers], 1) for block in self.blocks()]
        )


@dataclass(frozen=True, kw_only=True)
class Collection:
    """How gradients are collected.

    Attributes:
        memory_mib: bound on what one chunk of examples needs beside the model and the result: its gradients, projections and
            saved activations. It decides how many examples go through `vmap` at once and changes no result.
        projection: "none", "rademacher" or "hadamard".
        projection_dimension: numbers that are kept.
        per_layer: whether each parameter is projected by itself, as block-wise curvature needs; otherwise all together.
        seed: of the projection.
        spill: a file (.npy) that holds the matrix instead of memory; it gets its name when complete.
    """

    memory_mib: int = 1024
    projection: ProjectionKind = "none"
    projection_dimension: int = 4096
    per_layer: bool = False
    seed: int = 0
    spill: Path | None = None


class PerSampleGradients:
    """A model's losses and gradients, example by example.

    Works on any module that `torch.func` can differentiate: `BitLinear` layers give their straight-through gradient, and
    attention runs in its "math" form, which can be batched and differentiated forward. The model is left as it is; it should be
    in evaluation mode (dropout is refused by `vmap`).

    Attributes:
        names: the selected parameters.
        sizes: how many numbers each has.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective = next_token_loss,
        layers: Sequence[str] = ("*",),
        parameters: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Bind a model.

        Args:
            model: the model.
            objective: an example's loss.
            layers: see `select_parameters`.
            parameters: values that stand in for the model's, by parameter name: another checkpoint.

        Raises:
            UserError: if the patterns name nothing, or `parameters` names something the model has not.
        """
        self.model = model
        self.objective = objective
        # Detached: an outer autograd graph would otherwise be recorded beside the one that `grad` makes.
        self.state = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        for name, tensor in (parameters or {}).items():
            if name not in self.state or self.state[name].shape != tensor.shape:
                raise UserError(f"the checkpoint's {name} does not fit the model: give checkpoints of this model")
            self.state[name] = tensor.detach()
        self.selected = {name: self.state[name] for name in select_parameters(model, layers)}
        self.names = tuple(self.selected)
        self.sizes = tuple(tensor.numel() for tensor in self.selected.values())
        self._activations: dict[tuple[int, ...], int] = {}

    def loss(self, selected: Mapping[str, Tensor], example: Examples) -> Tensor:
        """Return one example's loss as a function of the selected parameters."""
        return self.objective(self.bound(selected), example)

    def bound(self, selected: Mapping[str, Tensor]) -> Callable[..., Any]:
        """Return the model as a function of its inputs alone."""

        def forward(*inputs: Any, **named: Any) -> Any:
            return functional_call(self.model, {**self.state, **selected}, inputs, named)

        return forward

    @torch.no_grad()
    def losses(self, examples: Examples, *, memory_mib: int = 1024, title: str | None = None) -> Tensor:
        """Return every example's loss, float32 [n]."""
        run = vmap(self.loss, in_dims=(None, 0), randomness="error")
        step = self._chunk(examples, memory_mib, 0)
        with math_attention(), _bar(title, examples) as bar:
            return torch.cat([_counted(bar, run(self.selected, part)).float().cpu() for part in self._parts(examples, step)])

    def collect(
        self,
        examples: Examples,
        how: Collection | None = None,
        *,
        transform: Transform | None = None,
        title: str | None = None,
    ) -> Gradients:
        """Compute the gradients of every example's loss.

        Args:
            examples: tensors [n, ...] on any device.
            how: memory, projection, spilling.
            transform: applied to the gradients [b, d] before projection.
            title: of the progress bar; None shows none.

        Raises:
            UserError: if one example does not fit under the memory bound, or the file cannot be written.
        """
        how = how or Collection()
        layers, projectors = self._plan(how)
        # By name and joined; what a transform makes on the way; and what the projector holds of one layer while it works.
        copies = 2 + 2 * (transform is not None)
        working = max(projector.working for projector in projectors) + layers[-1].stop
        step = self._chunk(examples, how.memory_mib, copies * sum(self.sizes) + working)
        run = vmap(grad(self.loss), in_dims=(None, 0), randomness="error")
        out = _Matrix(_count(examples), layers[-1].stop, how.spill)
        with math_attention(), torch.no_grad(), out, _bar(title, examples) as bar:
            for part in self._parts(examples, step):
                found = run(self.selected, part)
                flat = torch.cat([found.pop(name).flatten(1).float() for name in self.names], 1)
                if transform is not None:
                    flat = transform(flat)
                if not flat.isfinite().all():
                    raise UserError("a gradient is not finite: leave out the example, or check the model's weights")
                out.append(_project(flat, projectors))
                _counted(bar, flat)
                del flat  # else it would live until the next chunk's is there: a copy more than `copies` says
        return Gradients(out.values(), layers)

    def mean(self, examples: Examples, groups: Tensor, count: int, **options: Any) -> Gradients:
        """Return each group's mean gradient: `collect` with rows averaged by `groups`, int64 [n] in [0, count)."""
        found = self.collect(examples, **options)
        return Gradients(group_means(found.values, groups, count), found.layers)

    def _plan(self, how: Collection) -> tuple[tuple[Layer, ...], list[Projector]]:
        sizes, names = self.sizes, self.names
        if how.projection != "none" and not how.per_layer:
            sizes, names = (sum(sizes),), ("all",)
        seeds = range(how.seed, how.seed + len(sizes))
        projectors = [
            make_projector(how.projection, size, how.projection_dimension, seed) for size, seed in zip(sizes, seeds, strict=True)
        ]
        layers, start = [], 0
        for name, size, projector in zip(names, sizes, projectors, strict=True):
            layers.append(Layer(name, start, start + projector.dimension, size))
            start += projector.dimension
        return tuple(layers), projectors

    def _chunk(self, examples: Examples, memory_mib: int, numbers: int) -> int:
        """Return how many examples fit: each needs `numbers` floats, and thrice what autograd saves for a whole pass."""
        each = FLOAT * numbers + 3 * self._activation_bytes(examples)
        if each > memory_mib * MIB:
            raise UserError(
                f"one example needs {-(-each // MIB)} MiB and memory_mib is {memory_mib}: raise it, or choose fewer layers or "
                "shorter rows"
            )
        return max(1, memory_mib * MIB // max(1, each))

    def _activation_bytes(self, examples: Examples) -> int:
        """Return how many bytes autograd saves for one example, measured by running it."""
        one = {name: value[0].to(self.device) for name, value in examples.items()}
        key = tuple(n for value in one.values() for n in value.shape)
        if key not in self._activations:
            self._activations[key] = self.saved_bytes(lambda leaves: self.loss(leaves, one), self.selected)
        return self._activations[key]

    def saved_bytes(self, run: Callable[[dict[str, Tensor]], Tensor], parameters: Mapping[str, Tensor]) -> int:
        """Return how many bytes autograd saves in `run(parameters)`, the model's own tensors apart."""
        owned = {tensor.untyped_storage().data_ptr() for tensor in self.state.values()}
        seen: dict[int, int] = {}
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.enable_grad(), math_attention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(leaves)
        return sum(seen.values())

    @property
    def device(self) -> torch.device:
        """Where the selected parameters are."""
        return next(iter(self.selected.values())).device

    def _parts(self, examples: Examples, step: int) -> Iterator[dict[str, Tensor]]:
        for start in range(0, _count(examples), step):
            yield {name: value[start : start + step].to(self.device) for name, value in examples.items()}


def group_means(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Average rows [n, d] by group, [count, d]; a group without rows is zero."""
    sums = values.new_zeros(count, values.shape[1])
    for block, part in zip(values.split(ROW_BLOCK), groups.split(ROW_BLOCK), strict=True):
        sums.index_add_(0, part, block)
    return sums / torch.bincount(groups, minlength=count).clamp(min=1)[:, None]


def math_attention() -> AbstractContextManager[None]:
    """Make SDPA use its plain form: the fused CPU and GPU kernels have no forward-mode derivative and no batching rule."""
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context


def _count(examples: Examples) -> int:
    counts = {len(value) for value in examples.values()}
    if len(counts) != 1 or not max(counts):
        raise UserError(f"examples must be tensors of one length above 0, not {sorted(counts)}: give at least one example")
    return counts.pop()


def _project(flat: Tensor, projectors: Sequence[Projector]) -> Tensor:
    parts = flat.split([projector.size for projector in projectors], 1)
    return torch.cat([projector(part) for projector, part in zip(projectors, parts, strict=True)], 1)


def _bar(title: str | None, examples: Examples) -> Any:
    disable = True if title is None else None
    return tqdm(desc=title, total=_count(examples), unit=" examples", delay=SHOW_PROGRESS_AFTER, disable=disable, leave=False)


def _counted(bar: Any, rows: Tensor) -> Tensor:
    bar.update(len(rows))
    return rows


class _Matrix:
    """A matrix that is filled from the top: in memory, or in a file that gets its name when the block ends without an error."""

    def __init__(self, rows: int, columns: int, file: Path | None) -> None:
        self._file, self._at = file, 0
        self._temporary = file.with_name(f".{file.name}.partial") if file else None
        if self._temporary is None:
            self._array = np.empty((rows, columns), np.float32)
            return
        need = rows * columns * FLOAT
        try:
            self._temporary.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._temporary.parent).free
            if need > free:
                raise UserError(
                    f"{file} needs {need // MIB} MiB and {free // MIB} are free: spill elsewhere, or project the gradients"
                )
            self._array = np.lib.format.open_memmap(self._temporary, mode="w+", dtype=np.float32, shape=(rows, columns))
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error.strerror or error}): spill elsewhere") from None

    def append(self, rows: Tensor) -> None:
        self._array[self._at : self._at + len(rows)] = rows.cpu().numpy()
        self._at += len(rows)

    def values(self) -> Tensor:
        return torch.from_numpy(self._array)

    def __enter__(self) -> "_Matrix":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._temporary is None or self._file is None:
            return
        if kind is None:
            assert isinstance(self._array, np.memmap)
            self._array.flush()
            os.replace(self._temporary, self._file)
        else:
            self._temporary.unlink(missing_ok=True)
