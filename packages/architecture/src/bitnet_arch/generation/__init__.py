"""Block-diffusion decoding, for samples while training, evaluation and serving alike."""

from bitnet_arch.generation.decode import Decoded, DecodeOptions, Statistics, cache_agreement, decode
from bitnet_arch.generation.forwards import CACHES

__all__ = ["CACHES", "DecodeOptions", "Decoded", "Statistics", "cache_agreement", "decode"]
