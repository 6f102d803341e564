"""GGUF: ternary block types, the writer and a bounds-checked reader."""

from bitnet_arch.gguf.reader import GgufFile, read_gguf
from bitnet_arch.gguf.types import TYPES
from bitnet_arch.gguf.writer import GgufReport, export_gguf

__all__ = ["TYPES", "GgufFile", "GgufReport", "export_gguf", "read_gguf"]
