import ast
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from data_handler import PackedStream, documents, is_heldout, load_config, train_tokenizer
from data_handler.cache import tokenised
from data_handler.encoding import Encoder
from data_handler.sources import stdlib
from data_handler.sources.stdlib import paragraphs, split_docstrings, unique_paragraphs

MODULE = '''"""Module text.

Second paragraph.
"""
import sys  # kept


def alone():
    """Only this."""


def inline(): "short"; return "é", """not a docstring"""


class Éa: """é"""; x = 1


class B:
    \'\'\'Says
        more.
    \'\'\'  # a comment

    async def c(self):
        "one"
        if self:
            def deep():
                """Deep."""
                return """kept"""
        return 1
'''


@pytest.fixture(scope="module")
def demo():
    config = load_config("demo")
    return config, *(list(documents(source)) for source in config.sources)


def epoch(stream, total):
    """How many rows the stream needs for this many tokens, which are an epoch's."""
    stream.open()
    lane, rows, used = stream.lane(0, stream.weights()), 0, 0
    while used < total:
        used += lane.next()[1].used
        rows += 1
    assert used == total
    return rows


def normal(paragraph):
    return " ".join(paragraph.split())


def docstrings(tree):
    scopes = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return [d for node in ast.walk(tree) if isinstance(node, scopes) if (d := ast.get_docstring(node)) is not None]


def statements(tree):
    """Every statement but docstrings and `pass`."""
    simple = (n for n in ast.walk(tree) if isinstance(n, ast.stmt) and not hasattr(n, "body"))
    return Counter(ast.dump(n) for n in simple if not isinstance(n, ast.Expr | ast.Pass))


def test_docstrings_are_split_from_code_that_still_parses():
    code, texts = split_docstrings(MODULE)
    assert texts == ["Module text.\n\nSecond paragraph.", "Only this.", "short", "é", "Says\nmore.", "one", "Deep."]
    tree = ast.parse(code)
    assert docstrings(tree) == []
    assert statements(tree) == statements(ast.parse(MODULE))
    assert code.startswith("import sys  # kept\n")
    assert '"""not a docstring"""' in code
    assert '"""kept"""' in code


def test_a_module_without_docstrings_is_unchanged():
    source = "x = 1\n\n\ndef f():\n    return 'a'\n\f\nclass A:\n    pass\n"
    assert split_docstrings(source) == (source, [])


def test_repeated_paragraphs_are_dropped_across_documents():
    given = ["One a.\n\nTwo\nb.\n\nOne  a.", "Two b.", "Three.\n \n\n  Two\n b.\n"]
    assert list(unique_paragraphs(given)) == ["One a.\n\nTwo\nb.", "Three."]
    assert paragraphs("a\n\n  \nb\nc\n\n\n") == ["a", "b\nc"]


def test_the_demo_has_two_domains_that_do_not_change(demo):
    config, code, prose = demo
    assert len(code) > 200
    assert len(prose) > 200
    assert sum(map(len, code)) > 3_000_000
    assert sum(map(len, prose)) > 1_000_000
    assert [list(documents(source)) for source in config.sources] == [code, prose]
    assert any("class JSONEncoder" in text for text in code)
    assert any("with" in text and "context manager" in text for text in prose)


def test_the_demo_code_parses_and_holds_no_docstring(demo):
    for text in demo[1][::7]:
        assert docstrings(ast.parse(text)) == []


def test_no_held_out_paragraph_of_the_prose_is_in_training(demo):
    config, code, prose = demo
    held = [p for text in prose if is_heldout(text, config.heldout_share) for p in paragraphs(text)]
    trained = [text for text in prose if not is_heldout(text, config.heldout_share)]
    assert len(held) > 100
    assert not {normal(p) for p in held} & {normal(p) for text in trained for p in paragraphs(text)}
    # Neither as part of a paragraph, nor in the other domain: whole sentences, as a few words may occur anywhere.
    everything = "\n".join(normal(text) for text in [*trained, *code])
    sentences = [normal(p) for p in held if len(normal(p)) >= 80]
    assert len(sentences) > 100
    assert [p for p in sentences if p in everything] == []


def test_the_raw_prose_would_have_leaked():
    from pydoc_data.topics import topics

    raw = [topics[key] for key in sorted(topics)]
    held = {normal(p) for text in raw if is_heldout(text, 0.5) for p in paragraphs(text)}
    trained = {normal(p) for text in raw if not is_heldout(text, 0.5) for p in paragraphs(text)}
    assert len(held & trained) > 50


def test_packing_uses_98_percent_of_the_demo_rows(demo, cache):
    config, code, prose = demo
    tokenizer = train_tokenizer([*code[:40], *prose[:20]], 2048)
    for source in config.sources:
        corpus, _ = tokenised(source, Encoder(tokenizer), cache)
        training = np.setdiff1d(np.arange(len(corpus)), corpus.heldout(config.heldout_share))
        total = int(corpus.spans(training)[2].sum())
        for length in (128, 512, 2048):
            one = replace(config, sources=(source,), sequence_length=length)
            rows = epoch(PackedStream(one, tokenizer), total)
            assert total >= 0.98 * length * rows, (source.name, length, total / length / rows)
            loose = epoch(PackedStream(replace(one, packing=False), tokenizer), total)  # control: one piece a row
            assert loose > 1.01 * rows
    heldout = PackedStream(replace(config, heldout_tokens=4000), tokenizer, split="heldout")
    used = Counter()
    for row in heldout.rows():
        used[int(row["domain"])] += int((row["document_ids"] > 0).sum())
    assert used == {0: 2000, 1: 2000}


def test_a_few_documents_are_read_without_the_rest(monkeypatch):
    split = []
    monkeypatch.setattr(stdlib, "split_docstrings", lambda text: split.append(text) or (text, []))
    for kept in (stdlib._modules, stdlib._prose):
        kept.cache_clear()
    try:
        for source in load_config("demo").sources:
            assert next(documents(source))
        assert len(split) == 1
    finally:
        for kept in (stdlib._modules, stdlib._prose):
            kept.cache_clear()


def test_what_failed_is_tried_again_where_it_failed():
    fails = [True, False]

    def make():
        yield from (1, 2)
        if fails.pop(0):
            raise OSError
        yield 3

    kept = stdlib._Kept(make)
    with pytest.raises(OSError):
        list(kept)
    assert list(kept) == list(kept) == [1, 2, 3]
