"""Adapters in a file of their own, for people who have the ternary model already.

A safetensors file with `LAYER.lrc_u` `[out, rank]` and `LAYER.lrc_v` `[in, rank]` in float16, or int8 with float32
`LAYER.lrc_u_scale` and `LAYER.lrc_v_scale` `[rank]`; its metadata names the form and the base it belongs to.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from bitnet_arch.bitlinear import BitLinear, BitLinearLRC
from bitnet_arch.configs import short_reason
from bitnet_arch.errors import UserError
from bitnet_arch.lrc.adapters import AdapterDtype, check_rank, int8_adapter, layer_rank
from bitnet_arch.modeling import change_form, form_of
from bitnet_arch.packed import PackedBitLinear, PackedBitLinearLRC
from bitnet_arch.ptq.model import ternary_layers
from bitnet_arch.quant import quantize_weight

FORMAT = "bitnet_arch.lrc.1"

SCALE_TOLERANCE = 1e-4
"""Relative; what reciprocals of float32 scales round by is far below."""


def base_digest(model: PreTrainedModel) -> str:
    """Return what tells one ternary model from another: a SHA-256 of its layers' names, shapes and codes.

    A master and what it packs to have the same; adapters do not enter, and scales neither (`base_scales`): a stock packed
    directory stores reciprocals, which round.
    """
    digest = hashlib.sha256()
    for name, layer in sorted(ternary_layers(model).items()):
        digest.update(f"{name} {layer.out_features} {layer.in_features}\n".encode())
        if isinstance(layer, PackedBitLinear):
            codes = layer.codes()
        else:
            codes, _ = quantize_weight(layer.weight.detach(), layer.granularity)
        digest.update(codes.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def base_scales(model: PreTrainedModel) -> list[float]:
    """Return the mean scale of every ternary layer, in the order of their names."""
    scales = []
    for _, layer in sorted(ternary_layers(model).items()):
        if isinstance(layer, PackedBitLinear):
            scale = layer.weight_scale
        else:
            _, scale = quantize_weight(layer.weight.detach(), layer.granularity)
        scales.append(float(scale.double().mean()))
    return scales


def save_adapters(model: PreTrainedModel, file: Path | str) -> None:
    """Write a model's adapters, without its base.

    Args:
        model: with a low-rank correction.
        file: where to write, ending in `.safetensors`; replaced when complete.

    Raises:
        UserError: if the model has no correction, or the file cannot be written.
    """
    form, file = form_of(model.config), Path(file)
    if form is None or not form.lrc_rank:
        raise UserError("the model has no low-rank correction to save: add one with add_lrc or start_lrc")
    if file.suffix != ".safetensors":
        raise UserError(f"{file} does not end in .safetensors, which is what adapters are written as: choose such a name")
    state: dict[str, Tensor] = {}
    for name, layer in ternary_layers(model).items():
        assert isinstance(layer, BitLinearLRC | PackedBitLinearLRC)
        for key in ("lrc_u", "lrc_v"):
            values = getattr(layer, key).detach().cpu()
            if form.lrc_dtype == "float16":
                state[f"{name}.{key}"] = values.half().contiguous()
            else:
                codes, scale = int8_adapter(values)
                state |= {f"{name}.{key}": codes.contiguous(), f"{name}.{key}_scale": scale}
    metadata = {"format": FORMAT, "base": base_digest(model), "form": json.dumps([form.lrc_rank, form.lrc_dtype])}
    metadata["scales"] = json.dumps(base_scales(model))
    temporary = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, temporary, metadata)
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or short_reason(error)
        raise UserError(f"writing {file} failed ({reason}): free some space or choose another output") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_adapters(model: PreTrainedModel, file: Path | str) -> PreTrainedModel:
    """Put adapters on the model that they were made for.

    Args:
        model: master or packed; a correction that it has already is replaced. Its modules move to the result.
        file: what `save_adapters` wrote.

    Returns:
        The model with its correction; masters are frozen.

    Raises:
        UserError: for a file that is missing, damaged or no adapter file, and for adapters of another model.
    """
    file = Path(file)
    rank, dtype, base, scales, state = _read(file)
    found = base_scales(model)
    alike = len(scales) == len(found) and all(
        math.isclose(a, b, rel_tol=SCALE_TOLERANCE) for a, b in zip(scales, found, strict=True)
    )
    if base != base_digest(model) or not alike:
        raise UserError(
            f"{file} belongs to another model (its ternary weights or their scales differ): load the model that it was saved from"
        )
    layers = ternary_layers(model)
    corrected = {name: _corrected(layer, state, name, file, rank, dtype) for name, layer in layers.items()}
    if state:
        raise UserError(f"{file} holds {min(state)!r}, which is no adapter of this model: save the adapters again")
    packed = any(isinstance(layer, PackedBitLinear) for layer in layers.values())
    model = change_form(model, packed=packed, lrc_rank=rank, lrc_dtype=dtype)
    for name, layer in corrected.items():
        model.set_submodule(name, layer)
    return model


def _read(file: Path) -> tuple[int | float, AdapterDtype, str, list[float], dict[str, Tensor]]:
    if not file.is_file():
        raise UserError(f"{file} does not exist: name a file that save_adapters wrote")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is truncated or damaged ({short_reason(error)}): download or save it again") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{file} is no adapter file of this library: name one that save_adapters wrote")
    try:
        rank, dtype = json.loads(metadata.get("form", ""))
        check_rank(rank)
        scales = [float(scale) for scale in json.loads(metadata.get("scales", ""))]
    except (ValueError, TypeError, RecursionError):
        rank, dtype, scales = 0, None, []
    if dtype not in get_args(AdapterDtype):
        raise UserError(f"{file} is damaged (its metadata names no rank and dtype): download or save it again")
    return rank, dtype, metadata.get("base", ""), scales, state


def _corrected(
    layer: BitLinear | PackedBitLinear, state: dict[str, Tensor], name: str, file: Path, rank: int | float, dtype: AdapterDtype
) -> BitLinearLRC | PackedBitLinearLRC:
    """Take a layer's adapters out of `state` and put them on it."""

    def take(key: str) -> Tensor:
        if key not in state:
            raise UserError(f"{file} has no {key!r}: download or save it again")
        return state.pop(key)

    like = layer.weight if isinstance(layer, BitLinear) else layer.weight_scale
    adapters = []
    for key in (f"{name}.lrc_u", f"{name}.lrc_v"):
        values = take(key).float()
        if values.shape[1:] != (layer_rank(rank, layer.in_features, layer.out_features, name),):
            raise UserError(f"{file} contradicts itself on the rank of {name}: download or save it again")
        if dtype == "int8":
            scale = take(f"{key}_scale")
            if scale.shape != values.shape[1:]:
                raise UserError(f"{file} contradicts itself on the rank of {name}: download or save it again")
            values = values * scale
        if not torch.isfinite(values).all():
            raise UserError(f"{file} holds values in {key} that are not finite: download or save it again")
        adapters.append(values.to(like.device, like.dtype))
    u, v = adapters
    if isinstance(layer, PackedBitLinear):
        return PackedBitLinearLRC(layer, u, v, dtype)
    layer.weight.requires_grad_(False)
    return BitLinearLRC(layer, u, v, dtype)
