"""Block-diffusion decoding, for samples while training, evaluation and serving alike."""

from bitnet_arch.generation.decode import Decoded, DecodeOptions, Statistics, cache_agreement, decode, decode_blocks
from bitnet_arch.generation.forwards import CACHES, BlockForwards, Cost

__all__ = [
    "CACHES",
    "BlockForwards",
    "Cost",
    "DecodeOptions",
    "Decoded",
    "Statistics",
    "cache_agreement",
    "decode",
    "decode_blocks",
]
