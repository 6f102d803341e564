"""What the solvers need of calibration: covariances of a layer's inputs, accumulated while a decoder's blocks run one by one."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.calibration import check_calibration, max_positions
from bitnet_arch.errors import UserError
from bitnet_arch.families import family_of
from bitnet_arch.packed import PackedBitLinear
from bitnet_arch.quant import fake_quant_activation


@dataclass(kw_only=True)
class Covariances:
    """Sums of outer products of a layer's inputs X and their 8-bit rounding Y = Qa(X), over tokens, in float64.

    Attributes:
        sxx: XXᵀ, `[in, in]`.
        sxy: XYᵀ, `[in, in]`; YXᵀ is its transpose.
        syy: YYᵀ, `[in, in]`.
    """

    sxx: Tensor
    sxy: Tensor
    syy: Tensor

    @classmethod
    def zeros(cls, features: int, device: torch.device | None = None) -> "Covariances":
        """Return empty sums for a layer of that many inputs."""
        sxx, sxy, syy = (torch.zeros(features, features, dtype=torch.float64, device=device) for _ in range(3))
        return cls(sxx=sxx, sxy=sxy, syy=syy)

    def add(self, x: Tensor) -> None:
        """Add inputs `[..., in]`: prepared (normed, rotated), not quantised."""
        rows = x.detach().reshape(-1, x.shape[-1])
        exact, rounded = rows.double(), fake_quant_activation(rows).double()
        self.sxx.addmm_(exact.T, exact)
        self.sxy.addmm_(exact.T, rounded)
        self.syy.addmm_(rounded.T, rounded)

    def regularized(self, epsilon: float) -> "Covariances":
        """Add `ε tr(Sxx) / in · I` to each of the three sums.

        It is as if calibration had seen a little of every direction, and rounding had left that as it was. Deviation: the paper
        adds to Sxx and Syy alone, each its own trace, which makes the solution for Ŵ shrink where calibration saw nothing.

        Args:
            epsilon: at least 0; 0 gives the sums as they are.

        Raises:
            UserError: if the sums are not finite, or empty.
        """
        extra = _ridge(self.sxx, epsilon)
        sxx, sxy, syy = (_with_diagonal(matrix.clone(), extra) for matrix in (self.sxx, self.sxy, self.syy))
        return Covariances(sxx=sxx, sxy=sxy, syy=syy)


@dataclass(kw_only=True)
class Hessian:
    """Syy of `Covariances` alone, which is all that a quantiser needs.

    Attributes:
        syy: YYᵀ, float64 `[in, in]`.
    """

    syy: Tensor

    @classmethod
    def zeros(cls, features: int, device: torch.device | None = None) -> "Hessian":
        """Return an empty sum for a layer of that many inputs."""
        return cls(syy=torch.zeros(features, features, dtype=torch.float64, device=device))

    def add(self, x: Tensor) -> None:
        """Add inputs `[..., in]`: prepared (normed, rotated), not quantised."""
        rounded = fake_quant_activation(x.detach().reshape(-1, x.shape[-1])).double()
        self.syy.addmm_(rounded.T, rounded)

    def regularize(self, epsilon: float) -> None:
        """Make it `Syy + ε tr(Syy) / in · I`, in place; errors as in `Covariances.regularized`."""
        _with_diagonal(self.syy, _ridge(self.syy, epsilon))


def _with_diagonal(matrix: Tensor, extra: float) -> Tensor:
    """Add a number to a matrix's diagonal, in place: a wide layer's covariance need not be there twice."""
    matrix.diagonal().add_(extra)
    return matrix


def _ridge(matrix: Tensor, epsilon: float) -> float:
    trace = float(matrix.trace())
    if not 0 < trace < float("inf"):
        raise UserError("a layer's calibration inputs are all zero or not finite: calibrate on other tokens")
    return epsilon * trace / len(matrix)


Sums = TypeVar("Sums", Covariances, Hessian)


@dataclass
class Block:
    """One block of a decoder during `run_blocks`.

    Attributes:
        prefix: its dotted name and a dot.
        module: the block.
        run: sends every calibration row through it as it is now.
    """

    prefix: str
    module: nn.Module
    run: Callable[[], list[Tensor]]

    def covariances(self, names: Iterable[str]) -> dict[str, Covariances]:
        """Run the block and accumulate the covariances of some of its ternary layers.

        Args:
            names: dotted names in the whole model, all in this block.

        Returns:
            Name to covariances of the layer's prepared inputs; layers that read the same tensor share one object.
        """
        return self._record(names, Covariances.zeros)

    def hessians(self, names: Iterable[str], epsilon: float) -> dict[str, Hessian]:
        """Run the block and accumulate Syy alone, regularised, at a third of the cost of `covariances`.

        Args:
            names: as for `covariances`.
            epsilon: damping, see `Hessian.regularize`; layers that share their sums are damped once.
        """
        found = self._record(names, Hessian.zeros)
        for sums in {id(sums): sums for sums in found.values()}.values():
            sums.regularize(epsilon)
        return found

    def _record(self, names: Iterable[str], zeros: Callable[[int, torch.device], Sums]) -> dict[str, Sums]:
        recorders: dict[str, _Recorder[Sums]] = {}
        latest = _Latest[Sums]()
        with ExitStack() as hooks:
            for name in names:
                layer = self.module.get_submodule(name.removeprefix(self.prefix))
                assert isinstance(layer, BitLinear | PackedBitLinear)
                recorders[name] = _Recorder(zeros(layer.in_features, layer.weight.device), latest)
                hooks.callback(layer.register_forward_pre_hook(recorders[name]).remove)
            self.run()
        return {name: recorder.sums for name, recorder in recorders.items()}


@dataclass
class _Latest(Generic[Sums]):
    """The tensor that was added last, and where to."""

    x: Tensor | None = None
    sums: Sums | None = None


@dataclass
class _Recorder(Generic[Sums]):
    sums: Sums
    latest: _Latest[Sums]

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = layer.prepare(inputs[0])  # type: ignore[operator]
        if x is self.latest.x and self.latest.sums is not None:  # queries, keys and values read the same tensor
            self.sums = self.latest.sums
            return
        self.sums.add(x)
        self.latest.x, self.latest.sums = x, self.sums


Hold = Callable[[str, nn.Module], AbstractContextManager[object]]
"""Called with a block's dotted name and a dot, and the block: its tensors are needed, and as they are, until the context ends."""


@torch.no_grad()
def run_blocks(
    model: PreTrainedModel, calibration: Iterable[Tensor], visit: Callable[[Block], None], hold: Hold | None = None
) -> None:
    """Call `visit` with one block after the other; what a visit makes of a block is what the next one's inputs come from.

    The model runs in evaluation mode and is left in the mode it was in.

    Args:
        model: a decoder of a known family; with `hold`, its blocks may have no values outside of it.
        calibration: token ids, each int64 `[batch, time]`.
        visit: may run the block, look at its layers and change them.
        hold: brings a block's tensors and takes them away again: see `bitnet_arch.block_stream`. By default they are there.

    Raises:
        UserError: for calibration that `check_calibration` refuses, or a family whose blocks cannot be run one by one.
    """
    family = family_of(model.config)
    embedding: Any = model.get_submodule(family.embedding)
    rows = check_calibration(calibration, embedding.num_embeddings, max_positions(model.config))
    was_training = model.training
    model.eval()
    try:
        streams = [_enter(model, ids) for ids in rows]
        blocks = list(model.get_submodule(family.blocks).children())
        for index, module in enumerate(blocks):

            def run(module: nn.Module = module, index: int = index) -> list[Tensor]:
                return [stream.through(module, index) for stream in streams]

            prefix = f"{family.blocks}.{index}."
            with hold(prefix, module) if hold is not None else nullcontext():
                visit(Block(prefix, module, run))
                if index + 1 == len(blocks):  # nobody reads what the last one hands on
                    break
                for stream, hidden in zip(streams, run(), strict=True):
                    stream.hidden = hidden
    finally:
        model.train(was_training)


@dataclass
class _Stream:
    """One row of tokens on its way through the blocks, and what else each block is called with."""

    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def through(self, block: nn.Module, index: int) -> Tensor:
        arguments, keywords = self.calls[index]
        result = block(self.hidden, *arguments, **keywords)
        hidden: Tensor = result[0] if isinstance(result, tuple) else result
        return hidden


class _Note(nn.Module):
    """Stands for a block: notes what it is called with and hands its input on. It has the block's attributes."""

    def __init__(self, block: nn.Module, stream: _Stream) -> None:
        super().__init__()
        self.__dict__["block"], self.__dict__["stream"] = block, stream  # not as submodules

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if not self.stream.calls:
            self.stream.hidden = hidden
        self.stream.calls.append((arguments, keywords))
        return hidden


def _enter(model: PreTrainedModel, ids: Tensor) -> _Stream:
    """Run the model with its blocks taken out, which yields what it hands to each of them, whatever the family needs."""
    family, stream = family_of(model.config), _Stream()
    blocks: nn.ModuleList = model.get_submodule(family.blocks)  # type: ignore[assignment]
    kept, norm = list(blocks), model.get_submodule(family.final_norm)
    try:
        for index, block in enumerate(kept):
            blocks[index] = _Note(block, stream)
        model.set_submodule(family.final_norm, nn.Identity())
        model.get_submodule(family.blocks.rpartition(".")[0])(input_ids=ids, use_cache=False)
    finally:
        for index, block in enumerate(kept):
            blocks[index] = block
        model.set_submodule(family.final_norm, norm)
    if len(stream.calls) != len(kept):
        raise UserError(f"the blocks of {model.config.model_type} cannot be run one by one: its adapters can only be trained")
    return stream
