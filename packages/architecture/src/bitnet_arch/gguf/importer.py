"""`from_gguf`: a torch model with exactly a ternary file's codes and scales, ours or other people's."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from bitnet_arch.bitlinear import LAMBDA_KEY
from bitnet_arch.checkpoint import compute_buffers
from bitnet_arch.configs import check_shape, short_reason
from bitnet_arch.convert import replace_linears
from bitnet_arch.diffusion import DIFFUSION_KEY, diffusion_of
from bitnet_arch.errors import UserError
from bitnet_arch.families import Family, base_type, family_of, quantized_names
from bitnet_arch.gguf.architectures import ACTIVATIONS, OURS, STOCK
from bitnet_arch.gguf.names import deinterleave, gguf_name, rotary_heads
from bitnet_arch.gguf.reader import GgufFile, read_gguf
from bitnet_arch.gguf.rope import FACTORS, head_width, llama3_parameters
from bitnet_arch.gguf.ternary import TernaryMatrix, find_ternary
from bitnet_arch.lrc.adapters import check_rank
from bitnet_arch.modeling import Placement, TernaryForm, ternary_config
from bitnet_arch.norm import SubLN, check_epsilon
from bitnet_arch.packed import PackedBitLinear, PackedBitLinearLRC
from bitnet_arch.packing import CODES_PER_BYTE
from bitnet_arch.quant import Granularity, absmean_scale, expand_scale

MICROSOFT = ("bitnet-25", "bitnet-b1.58")
"""What bitnet.cpp calls BitNet b1.58 2B4T: `bitnet` with ReLU²."""

FAMILY_OF = {name: family for family, (name, _) in STOCK.items()} | dict.fromkeys(MICROSOFT, "bitnet")
_GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)


@dataclass(frozen=True)
class _Keys:
    """A file's keys under its architecture's name, checked as they are read."""

    file: GgufFile
    architecture: str

    def fail(self, why: str) -> UserError:
        return UserError(f"{self.file.path} cannot be imported ({why})")

    def get(self, key: str, kind: type[Any], default: Any = None) -> Any:
        value: Any = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise self.fail(f"it has no key {self.architecture}.{key}")
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise self.fail(f"its key {self.architecture}.{key} is {value!r:.40}")
        # 9.999999747378752e-06 in 32 bits was written as 1e-05.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        value: str = self.get(key, str, default)
        if value not in choices:
            raise self.fail(f"its key {self.architecture}.{key} is {value!r:.40}, none of {', '.join(choices)}")
        return value


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
    keys = _Keys(file, architecture)
    family = keys.choice("family", tuple(STOCK), "llama") if architecture == OURS else FAMILY_OF[architecture]
    try:
        base = _config(keys, family)
        form = _form(keys, base)
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


# ---------------------------------------------------------------------------------------------------- configuration


def _config(keys: _Keys, family: str) -> PreTrainedConfig:
    """Return the stock configuration of a file's keys, checked against the sizes of its tensors."""
    file, ours = keys.file, keys.architecture == OURS
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise keys.fail("it has no matrix token_embd.weight")
    layers, heads = keys.get("block_count", int), keys.get("attention.head_count", int)
    if not 1 <= layers <= len(file.tensors):
        raise keys.fail(f"it claims {layers} layers and has {len(file.tensors)} tensors")
    if heads < 1:
        raise keys.fail(f"it claims {heads} heads")
    hidden = keys.get("embedding_length", int)
    width = keys.get("attention.key_length", int, hidden // heads)
    if keys.get("attention.value_length", int, width) != width or keys.get("rope.dimension_count", int, width) != width:
        raise keys.fail("its heads have keys, values and rotary positions of different widths")
    relu2 = keys.architecture in MICROSOFT
    values: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.get("feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", int, heads),
        "max_position_embeddings": keys.get("context_length", int),
        "rms_norm_eps": keys.get("attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope(keys),
        **_token_ids(file, embedding.shape[0]),
    }
    if family in ("bitnet", "qwen2"):
        if width * heads != hidden:
            raise keys.fail(f"its {heads} heads of {width} do not fill its width of {hidden}, as a {family}'s do")
    else:
        values["head_dim"] = width
    activation = "relu2" if relu2 else "gelu_tanh" if family == "gemma3_text" else "silu"
    activation = keys.choice("activation", tuple(ACTIVATIONS.values()), activation) if ours else activation
    torch_name = {ours_: theirs for theirs, ours_ in ACTIVATIONS.items()}[activation]
    values["hidden_activation" if family == "gemma3_text" else "hidden_act"] = torch_name
    if family != "qwen2":
        values["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
    if family == "llama":
        values["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    values |= _sliding(keys, family, layers)
    if family == "gemma3_text":
        values |= _gemma(keys, values)
    if ours and f"{OURS}.diffusion.mask_token_id" in file.metadata:
        values[DIFFUSION_KEY] = {
            "mask_token_id": keys.get("diffusion.mask_token_id", int),
            "block_size": keys.get("diffusion.block_size", int, 0) or None,
            "token_shift": keys.get("diffusion.token_shift", bool),
        }
    config: PreTrainedConfig = AutoConfig.for_model(family, **values)
    check_shape(config, str(file.path))
    diffusion_of(config)
    return config


def _rope(keys: _Keys) -> dict[str, Any]:
    theta = keys.get("rope.freq_base", float, 10_000.0)
    if theta <= 0:
        raise keys.fail(f"its rotary base is {theta}")
    kind = keys.get("rope.scaling.type", str, "none")
    if FACTORS in keys.file.tensors and keys.architecture in ("llama", OURS):
        return llama3_parameters(keys.file.dequantize(FACTORS).reshape(-1), theta)
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": keys.get("rope.scaling.factor", float)}
    if kind != "none":
        raise keys.fail(f"it scales rotary positions by {kind!r:.40}, which is not known here")
    return {"rope_type": "default", "rope_theta": theta}


def _token_ids(file: GgufFile, vocabulary: int) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        found[name] = value if type(value) is int and 0 <= value < vocabulary else None
    return found


def _sliding(keys: _Keys, family: str, layers: int) -> dict[str, Any]:
    window = keys.get("attention.sliding_window", int, 0)
    if family in ("llama", "bitnet") or (window == 0 and family != "gemma3_text"):
        return {}
    pattern = [(layer + 1) % 6 != 0 and window > 0 for layer in range(layers)]
    if keys.architecture == OURS:
        pattern = keys.get("attention.sliding_window_pattern", list, pattern)
        if len(pattern) != layers or any(type(slides) is not bool for slides in pattern):
            raise keys.fail(f"its sliding_window_pattern does not say for each of {layers} layers whether it slides")
    found: dict[str, Any] = {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern]}
    if window:
        found["sliding_window"] = window
    if family != "gemma3_text":
        found["use_sliding_window"] = True
    return found


def _gemma(keys: _Keys, values: dict[str, Any]) -> dict[str, Any]:
    """Return what a Gemma 3 has beyond the others."""
    hidden, width = values["hidden_size"], values["head_dim"]
    if abs(keys.get("embedding_scale", float, float(hidden) ** 0.5) / hidden**0.5 - 1) > 1e-6:
        raise keys.fail("it scales its embeddings otherwise than by the root of their width")
    large = keys.architecture != OURS and values["num_hidden_layers"] == 62
    scale = keys.get("attention.scale", float, float(hidden // values["num_attention_heads"] if large else width) ** -0.5)
    if not 1e-6 < scale < 1e3:
        raise keys.fail(f"it scales attention by {scale}")
    local = keys.get("rope.freq_base_swa", float, 10_000.0)
    scalar = scale**-2
    found: dict[str, Any] = {
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-3 else scalar,
        "use_bidirectional_attention": False,
        "rope_parameters": {
            "full_attention": values["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }
    for name, key in (("final_logit_softcapping", "logit_softcap"), ("attn_logit_softcapping", "attention.logit_softcap")):
        if (cap := keys.get(key, float, 0.0)) > 0:
            found[name] = cap
    return found


def _form(keys: _Keys, base: PreTrainedConfig) -> TernaryForm:
    """Return the form that a file's keys ask for; scales may turn out finer."""
    if keys.architecture != OURS:
        return TernaryForm()
    if keys.get("activation_bits", int, 8) != 8:
        raise keys.fail("its activations have not 8 bits")
    norm = keys.choice("norm_placement", get_args(Placement), "none")
    if base_type(base) == "bitnet" and norm == "subln":  # its own, not added ones
        norm = "none"
    granularity = keys.choice("scale_granularity", _GRANULARITIES, "tensor")
    rotation, rank = keys.get("rotation", bool, False), _rank(keys)
    return TernaryForm(norm=norm, granularity=granularity, rotation=rotation, lrc_rank=rank)  # type: ignore[arg-type]


def _rank(keys: _Keys) -> int | float:
    """Return the rank of the low-rank correction: a whole number, a share of each layer's smaller side, or 0 for none."""
    share = isinstance(keys.file.metadata.get(f"{keys.architecture}.lrc.rank"), float)
    rank: int | float = keys.get("lrc.rank", float if share else int, 0)
    if rank:
        check_rank(rank)
    return rank


# ----------------------------------------------------------------------------------------------------------- tensors


def _meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _file_names(shell: PreTrainedModel, base: PreTrainedConfig) -> dict[str, str]:
    wanted = [name for name, _ in shell.named_parameters()]
    wanted += [name for name, _ in shell.named_buffers() if name.endswith(".in_norm.eps")]
    return {name: gguf_name(base_type(base), name) for name in wanted}


def _check_tensors(keys: _Keys, shell: PreTrainedModel, names: dict[str, str]) -> None:
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
    keys: _Keys,
    base: PreTrainedConfig,
    form: TernaryForm,
    matrices: dict[str, TernaryMatrix],
    names: dict[str, str],
    heads: _Rows,
) -> PreTrainedModel:
    finest = max((form.granularity, *(m.granularity for m in matrices.values())), key=_GRANULARITIES.index)
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


def _float(keys: _Keys, stored: str, heads: _Rows, name: str, family: Family) -> Tensor:
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
