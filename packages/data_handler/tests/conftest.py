import json
from pathlib import Path

import pytest
from data_handler import DataConfig, SourceConfig, train_tokenizer


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The folder of tokenised sources during the tests, instead of the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("stream", "tokenizer_cache"):
            patch.setattr(f"data_handler.{module}.cache_directory", lambda configured: Path(configured) if configured else folder)
        yield folder


@pytest.fixture(scope="session")
def byte_tokenizer():
    """One token a byte (id 1..256), so that lengths are known; id 0 ends a document."""
    return train_tokenizer(["a"], 257)


@pytest.fixture(scope="session")
def words():
    """Two domains of many short documents and a few long ones."""
    return {
        "a": [f"a{i} " + "alpha " * (i * 7 % 23) for i in range(40)] + ["long " * 60],
        "b": [f"b{i} " + "beta " * (i * 5 % 17) for i in range(25)],
    }


@pytest.fixture
def write_jsonl(tmp_path):
    def write(name, texts, column="text"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
        return SourceConfig(name=name, kind="jsonl", path=str(path), text_column=column)

    return write


@pytest.fixture
def config(write_jsonl, words):
    sources = tuple(write_jsonl(name, texts) for name, texts in words.items())
    return DataConfig(sources=sources, sequence_length=32, heldout_share=0.2, heldout_tokens=600, packing_buffer=8)
