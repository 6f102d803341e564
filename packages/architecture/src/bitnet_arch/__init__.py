"""1.58-bit language models: ternary layers, conversion, checkpoints, packing and proven GGUF export.

Importing this package reads no network and initialises no accelerator.
"""

from bitnet_arch.bitlinear import BitLinear, bitlinear_layers, get_lambda, lambda_schedule, set_lambda
from bitnet_arch.checkpoint import load_model, load_tokenizer, save_master, save_packed
from bitnet_arch.configs import load_config
from bitnet_arch.convert import ConversionConfig, check_family, convert_model
from bitnet_arch.errors import UserError
from bitnet_arch.families import FAMILIES, Family
from bitnet_arch.hub import write_model_card
from bitnet_arch.modeling import TernaryForm, register_family
from bitnet_arch.norm import SubLN
from bitnet_arch.packed import PackedBitLinear, pack_model
from bitnet_arch.pretrained import Pretrained, load_float_model, resolve_pretrained
from bitnet_arch.quant import (
    absmean_scale,
    fake_quant_activation,
    fake_quant_weight,
    quantize_activation,
    quantize_weight,
    ternary_codes,
)
from bitnet_arch.stream import convert_directory
from bitnet_arch.weights import WeightReader, open_weights

__all__ = [
    "FAMILIES",
    "BitLinear",
    "ConversionConfig",
    "Family",
    "PackedBitLinear",
    "Pretrained",
    "SubLN",
    "TernaryForm",
    "UserError",
    "WeightReader",
    "absmean_scale",
    "bitlinear_layers",
    "check_family",
    "convert_directory",
    "convert_model",
    "fake_quant_activation",
    "fake_quant_weight",
    "get_lambda",
    "lambda_schedule",
    "load_config",
    "load_float_model",
    "load_model",
    "load_tokenizer",
    "open_weights",
    "pack_model",
    "quantize_activation",
    "quantize_weight",
    "register_family",
    "resolve_pretrained",
    "save_master",
    "save_packed",
    "set_lambda",
    "ternary_codes",
    "write_model_card",
]
