"""Block-diffusion decoding, for samples while training, evaluation and serving alike."""

from bitnet_arch.generation.decode import Decoded, DecodeOptions, EmitTokens, Statistics, cache_agreement, decode, decode_blocks
from bitnet_arch.generation.forwards import CACHES, BlockForwards, Cost
from bitnet_arch.generation.sampling import check_temperature

__all__ = [
    "CACHES",
    "BlockForwards",
    "Cost",
    "DecodeOptions",
    "Decoded",
    "EmitTokens",
    "Statistics",
    "cache_agreement",
    "check_temperature",
    "decode",
    "decode_blocks",
]
