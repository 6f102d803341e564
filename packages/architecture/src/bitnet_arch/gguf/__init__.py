"""GGUF: ternary block types, the writer, the check against the source and a bounds-checked reader."""

from bitnet_arch.gguf.annotate import annotate_gguf
from bitnet_arch.gguf.architectures import check_architecture
from bitnet_arch.gguf.importer import from_gguf
from bitnet_arch.gguf.plan import PROVENANCE_KEY
from bitnet_arch.gguf.reader import GgufFile, read_gguf
from bitnet_arch.gguf.tokenizer import rebuild_tokenizer, tokenizer_from_gguf
from bitnet_arch.gguf.types import TYPES
from bitnet_arch.gguf.verify import file_differences
from bitnet_arch.gguf.writer import GgufReport, export_gguf

__all__ = [
    "PROVENANCE_KEY",
    "TYPES",
    "GgufFile",
    "GgufReport",
    "annotate_gguf",
    "check_architecture",
    "export_gguf",
    "file_differences",
    "from_gguf",
    "read_gguf",
    "rebuild_tokenizer",
    "tokenizer_from_gguf",
]
