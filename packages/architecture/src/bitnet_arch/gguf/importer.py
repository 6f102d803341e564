"""`from_gguf`: a torch model with exactly a ternary file's codes and scales, ours or other people's."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from bitnet_arch.bitlinear import LAMBDA_KEY
from bitnet_arch.checkpoint import compute_buffers
from bitnet_arch.configs import short_reason
from bitnet_arch.convert import replace_linears
from bitnet_arch.errors import UserError
from bitnet_arch.families import Family, base_type, family_of, quantized_names
from bitnet_arch.gguf.architectures import OURS, STOCK
from bitnet_arch.gguf.importer_keys import FAMILY_OF, GRANULARITIES, FileKeys, config_of, form_of_file
from bitnet_arch.gguf.names import deinterleave, gguf_name, rotary_heads
from bitnet_arch.gguf.reader import read_gguf
from bitnet_arch.gguf.rope import FACTORS, head_width
from bitnet_arch.gguf.ternary import TernaryMatrix, find_ternary
from bitnet_arch.modeling import TernaryForm, ternary_config
from bitnet_arch.norm import SubLN, check_epsilon
from bitnet_arch.packed import PackedBitLinear, PackedBitLinearLRC
from bitnet_arch.packing import CODES_PER_BYTE
from bitnet_arch.quant import Granularity, absmean_scale, expand_scale


def from_gguf(path: Path | str) -> PreTrainedModel:
    """Build a torch model from a ternary GGUF file.

    Files of this library (stock architectures and `wrinklefree`, low-rank corrections included), and other people's: `bitnet`,
    `bitnet-25`, `bitnet-b1.58`, `llama`, `qwen2`, `qwen3` and `gemma3` whose matrices are I2_S, TQ1_0, TQ2_0, Q2_0, or ternary
    values in any type that gguf-py can dequantise. Embeddings, head and norms can have any such type. Adapters are f16 in a file,
    whatever they were. The tokenizer is in `bitnet_arch.gguf.tokenizer`.

    The model rounds activations to 8 bits a token, as ternary models are trained. A file that was made from float weights by
    llama.cpp's own quantiser is computed likewise, which is not quite what llama.cpp computes.

    Returns:
        In evaluation mode, float32, with `PackedBitLinear` layers that hold the file's codes and scales; where some matrix has rows
        not divisible by 4, `BitLinear` layers that quantise to them. Files whose scales are finer than a tensor become a model in
        our own form, see `bitnet_arch.modeling`.

    Raises:
        UserError: if the file is damaged, not ternary, of another architecture, or holds what no such model has.
    """
    file = read_gguf(path)
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in (*FAMILY_OF, OURS):
        known = ", ".join((*FAMILY_OF, OURS))
        raise UserError(f"{path} has the architecture {architecture!r:.40}: only {known} can be imported")
    keys = FileKeys(file, architecture)
    family = keys.choice("family", tuple(STOCK), "llama") if architecture == OURS else FAMILY_OF[architecture]
    try:
        base = config_of(keys, family)
        form = form_of_file(keys, base)
        shell = _meta_model(ternary_config(base, form))
    except UserError as error:
        text = str(error)
        raise (error if str(path) in text else keys.fail(text)) from None
    except Exception as error:  # every class of transformers has exceptions of its own for what it cannot build
        raise keys.fail(f"no model can be built from its keys: {short_reason(error)}") from None
    heads = _Rows(base, architecture == "llama")
    names = _file_names(shell, base)
    _check_tensors(keys, shell, names)
    matrices = {}
    for name in quantized_names(shell):
        try:
            found = find_ternary(file, names[f"{name}.weight"])
        except UserError as error:
            raise keys.fail(str(error)) from None
        matrices[name] = found.reordered(lambda rows, name=name: heads.restore(rows, f"{name}.weight"))  # type: ignore[misc]
    return _assemble(keys, base, form, matrices, names, heads)


@dataclass(frozen=True)
class _Rows:
    """Puts rows of q and k back into Hugging Face's order."""

    config: PreTrainedConfig
    interleaved: bool

    def restore(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        return deinterleave(values, rotary_heads(self.config, name)) if self.interleaved else values


# ----------------------------------------------------------------------------------------------------------- tensors


def _meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _file_names(shell: PreTrainedModel, base: PreTrainedConfig) -> dict[str, str]:
    wanted = [name for name, _ in shell.named_parameters()]
    wanted += [name for name, _ in shell.named_buffers() if name.endswith(".in_norm.eps")]
    return {name: gguf_name(base_type(base), name) for name in wanted}


def _check_tensors(keys: FileKeys, shell: PreTrainedModel, names: dict[str, str]) -> None:
    """Compare every tensor's name and shape with what the keys ask for, before anything large is allocated."""
    tensors = keys.file.tensors
    shapes = {name: tuple(p.shape) for name, p in shell.named_parameters()}
    for name, stored in names.items():
        info, expected = tensors.get(stored), shapes.get(name, (1,))
        if info is None:
            raise keys.fail(f"it has no tensor {stored}")
        if info.shape != expected:
            raise keys.fail(f"its tensor {stored} is {list(info.shape)}, but its keys ask for {list(expected)}")
    factors = tensors.get(FACTORS)
    if factors is not None and factors.shape != (head_width(shell.config) // 2,):
        raise keys.fail(f"its tensor {FACTORS} is {list(factors.shape)}, but its heads are {head_width(shell.config)} wide")
    scales = {f"{names[f'{name}.weight'].removesuffix('weight')}scale" for name in quantized_names(shell)}
    if unknown := sorted(
        set(tensors) - set(names.values()) - scales - ({FACTORS} if keys.architecture in ("llama", OURS) else set())
    ):
        raise keys.fail(f"it holds {unknown[0]!r:.80}, which a {keys.architecture} model of its keys has not")


def _assemble(
    keys: FileKeys,
    base: PreTrainedConfig,
    form: TernaryForm,
    matrices: dict[str, TernaryMatrix],
    names: dict[str, str],
    heads: _Rows,
) -> PreTrainedModel:
    finest = max((form.granularity, *(m.granularity for m in matrices.values())), key=GRANULARITIES.index)
    if keys.architecture == OURS and finest != form.granularity:
        raise keys.fail(f"its key {OURS}.scale_granularity is {form.granularity}, but it has scales by {finest}")
    packed = all(len(m.codes) % CODES_PER_BYTE == 0 for m in matrices.values())
    form = replace(form, granularity=finest, packed=packed)
    own = form != TernaryForm(packed=packed)
    family = family_of(base)
    with torch.no_grad():
        model = _meta_model(ternary_config(base, form) if own else base)
        if not own:
            replace_linears(model)
        state: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            scale = torch.from_numpy(matrix.scales(finest))
            codes = torch.from_numpy(np.ascontiguousarray(matrix.codes))
            linear = model.get_submodule(name)
            bias = None
            if f"{name}.bias" in names:
                bias = _float(keys, names[f"{name}.bias"], heads, f"{name}.bias", family)
            norm, rotation = linear.in_norm, bool(linear.rotation)
            if packed:
                layer = PackedBitLinear(codes, scale, bias, in_norm=norm, rotation=rotation)  # type: ignore[arg-type]
                if form.lrc_rank:
                    u, v = (_float(keys, names[f"{name}.{key}"], heads, name, family) for key in ("lrc_u", "lrc_v"))
                    layer = PackedBitLinearLRC(layer, u, v)
                model.set_submodule(name, layer)
                continue
            state |= {f"{name}.weight": master_of(codes, scale), f"{name}.{LAMBDA_KEY}": torch.ones(())}
            if bias is not None:
                state[f"{name}.bias"] = bias
        for name, _ in model.named_parameters():
            if name not in state:
                state[name] = _float(keys, names[name], heads, name, family)
        for name, module in model.named_modules():
            if isinstance(module, SubLN):
                stored = names[f"{name}.eps"]
                state[f"{name}.eps"] = _float(keys, stored, heads, f"{name}.eps", family).reshape(())
                check_epsilon(f"{keys.file.path}: tensor {stored}", float(state[f"{name}.eps"]))
        compute_buffers(model)
    loaded = model.load_state_dict(state, strict=False, assign=True)
    assert not loaded.unexpected_keys
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    model.config.dtype = torch.float32
    model.eval()
    return model


def _float(keys: FileKeys, stored: str, heads: _Rows, name: str, family: Family) -> Tensor:
    values = keys.file.dequantize(stored)
    if not np.isfinite(values).all():
        raise keys.fail(f"its tensor {stored} holds values that are no numbers")
    gain = name.endswith("norm.weight") and ".in_norm." not in name
    values = heads.restore(values, name) - np.float32(family.norm_offset if gain else 0.0)
    return torch.from_numpy(np.ascontiguousarray(values))


def master_of(codes: Tensor, scale: Tensor) -> Tensor:
    """Return a float matrix that the absmean quantiser turns into these codes and, up to rounding, this scale.

    Non-zero weights are scale / (share of non-zero codes in the group), whose mean magnitude is the scale.

    Args:
        codes: int8 `[out, in]`.
        scale: in a shape of `bitnet_arch.quant.absmean_scale`.
    """
    shape: Granularity = "tensor" if scale.ndim < 2 else "row" if scale.shape[1] == 1 else "group128"
    share = absmean_scale(codes.float(), shape)
    return codes.float() * expand_scale(scale / share, codes.shape[1])
