"""GGUF: ternary block types, the writer, the check against the source and a bounds-checked reader."""

from bitnet_arch.gguf.annotate import annotate_gguf
from bitnet_arch.gguf.architectures import ARCHITECTURES, choose_architecture
from bitnet_arch.gguf.floats import EMBEDDING_TYPES
from bitnet_arch.gguf.importer import from_gguf
from bitnet_arch.gguf.plan import PROVENANCE_KEY
from bitnet_arch.gguf.reader import GgufFile, read_gguf
from bitnet_arch.gguf.tokenizer import rebuild_tokenizer, tokenizer_from_gguf
from bitnet_arch.gguf.types import MATRIX_TYPES, TYPES
from bitnet_arch.gguf.verify import file_differences
from bitnet_arch.gguf.writer import GgufReport, export_gguf

__all__ = [
    "ARCHITECTURES",
    "EMBEDDING_TYPES",
    "MATRIX_TYPES",
    "PROVENANCE_KEY",
    "TYPES",
    "GgufFile",
    "GgufReport",
    "annotate_gguf",
    "choose_architecture",
    "export_gguf",
    "file_differences",
    "from_gguf",
    "read_gguf",
    "rebuild_tokenizer",
    "tokenizer_from_gguf",
]
