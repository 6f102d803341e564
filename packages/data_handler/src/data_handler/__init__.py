"""Sources, tokenisation, packing and a resumable loader for language models.

Importing this package reads no network and initialises no accelerator.
"""

from data_handler.batch import collate, document_attention_mask
from data_handler.config import DataConfig, SourceConfig, config_directory, config_names, load_config, parse_config
from data_handler.errors import UserError
from data_handler.loader import BatchLoader, merge_states
from data_handler.probes import probe_rows
from data_handler.sources import documents
from data_handler.split import is_heldout
from data_handler.stream import PackedStream
from data_handler.tokenizer import restore_tokenizer, train_tokenizer
from data_handler.tokenizer_cache import own_tokenizer, training_documents

__all__ = [
    "BatchLoader",
    "DataConfig",
    "PackedStream",
    "SourceConfig",
    "UserError",
    "collate",
    "config_directory",
    "config_names",
    "document_attention_mask",
    "documents",
    "is_heldout",
    "load_config",
    "merge_states",
    "own_tokenizer",
    "parse_config",
    "probe_rows",
    "restore_tokenizer",
    "train_tokenizer",
    "training_documents",
]
