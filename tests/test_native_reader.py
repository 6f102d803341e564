"""What the native runtime refuses of a file, `bitnet_arch.gguf.from_gguf` refuses, and the other way round."""

import importlib.util
import os
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from bitnet_arch import UserError
from bitnet_arch.gguf import from_gguf, read_gguf
from bitnet_arch.gguf.fuzz import assemble, rewritten
from bitnet_arch.gguf.uncomputed import UNCOMPUTED
from bitnet_kernels import Engine, _native

CORPUS = Path(__file__).parents[1] / "packages" / "kernels" / "cpp" / "fuzz" / "corpus.py"
RUNNABLE = {0, 1, 3, 8, 14, 30, 34, 35, 36, 42}
"""ggml's numbers of the types that the runtime knows; torch dequantises more."""
TERNARY = {34, 35, 36, 42}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return a small file of every architecture, form and type, by name."""
    spec = importlib.util.spec_from_file_location("fuzz_corpus", CORPUS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("corpus")
    module.main(folder)
    return {path.name.removesuffix("-own"): path for path in folder.iterdir()}


def test_no_call_on_a_damaged_file_crashes_or_loses_count(corpus, tmp_path):
    """cpp/fuzz/gguf_fuzz.cpp on the installed library: sequences of calls that the input chooses, and what holds after each."""
    if shutil.which("g++") is None:
        (pytest.fail if os.environ.get("WF_REQUIRE_NATIVE") else pytest.skip)("not installed: g++")
    installed, cpp = Path(_native.__file__).parent, CORPUS.parents[1]
    flags = ["-std=c++20", "-O1", "-DWF_FUZZ_MAIN", "-I", cpp, "-L", installed, f"-Wl,-rpath,{installed}"]
    subprocess.run(["g++", *flags, cpp / "fuzz" / "gguf_fuzz.cpp", "-lwf_engine", "-o", tmp_path / "fuzz"], check=True)
    done = subprocess.run([tmp_path / "fuzz", "300", *corpus.values()], capture_output=True, text=True, env={"WF_THREADS": "1"})
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def changed(source, out, keys, drop=(), rename=None):
    """Write a file anew with other keys, None for none, without some tensors and with some under other names."""
    file = read_gguf(source)
    architecture = file.metadata["general.architecture"]
    metadata = {**file.metadata, **{f"{architecture}.{key}": value for key, value in keys.items()}}
    tensors = [
        ((rename or {}).get(name, name), info.shape, info.ggml_id, bytes(file.data[info.offset : info.offset + info.nbytes]))
        for name, info in file.tensors.items()
        if name not in drop
    ]
    out.write_bytes(assemble({key: value for key, value in metadata.items() if value is not None}, tensors))
    return out


def outcomes(path):
    """Return what both make of a file: logits of some tokens, or the sentence that refuses it."""
    tokens = [1, 2, 3]
    try:
        ours = torch.from_numpy(Engine(path).logits(tokens))
    except ValueError as error:
        ours = str(error)
    try:
        with torch.no_grad():
            theirs = from_gguf(path)(input_ids=torch.tensor([tokens])).logits[0]
    except UserError as error:
        theirs = str(error)
    return ours, theirs


def test_every_file_of_the_corpus_runs_as_in_torch(corpus):
    assert {read_gguf(path).metadata["general.architecture"] for path in corpus.values()} == {
        *("bitnet", "bitnet-25", "bitnet-b1.58", "llama", "qwen2", "qwen3", "gemma3", "wrinklefree")
    }
    assert {info.ggml_id for path in corpus.values() for info in read_gguf(path).tensors.values()} == RUNNABLE
    for name, path in corpus.items():
        ours, theirs = outcomes(path)
        assert not isinstance(ours, str), ours
        assert not isinstance(theirs, str), theirs
        errors = (ours - theirs).abs().amax(-1) / theirs.abs().max()
        assert errors.median() <= 1e-5, name


def test_both_have_one_table_of_keys_that_nothing_computes():
    assert _native.uncomputed_keys() == UNCOMPUTED


@pytest.mark.parametrize("key", UNCOMPUTED)
def test_a_key_that_nothing_computes_is_refused_by_name_unless_it_changes_nothing(key, corpus, tmp_path):
    flag = key in ("attention.causal", "use_parallel_residual")
    for name in ("llama", "ours-rows"):
        before = Engine(corpus[name]).logits([1, 2, 3])
        for value in UNCOMPUTED[key]:
            path = changed(corpus[name], tmp_path / "harmless.gguf", {key: bool(value) if flag else value})
            ours, theirs = outcomes(path)
            assert np.array_equal(ours, before)
            assert not isinstance(theirs, str)
        for value in ((not UNCOMPUTED[key][0]) if flag else 3, 0.5, "x", [1, 2]):
            path = changed(corpus[name], tmp_path / "harmful.gguf", {key: value})
            for said in outcomes(path):
                assert isinstance(said, str), value
                assert f".{key} asks for what no model here computes" in said
                assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("llama", {"rope.scaling.factor": 2.0}, "rope.scaling.factor"),
        ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, "rope.scaling.factor"),
        ("llama", {"rope.scaling.type": "yarn"}, "rope.scaling.type"),
        ("llama", {"rope.scaling.type": "linear"}, "rope.scaling.factor"),
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, "rotary positions"),
        ("llama", {"rope.freq_base_swa": 7.0}, "sliding layers"),
        ("llama", {"attention.scale": 0.5}, "attention"),
        ("llama", {"embedding_scale": 2.0}, "embedding"),
        ("llama", {"logit_softcap": 30.0}, "caps logits"),
        ("llama", {"attention.logit_softcap": 50.0}, "caps logits"),
        ("llama", {"attention.sliding_window": 3}, "sliding window"),
        ("llama", {"vocab_size": 20}, "vocab_size"),
        ("llama", {"embedding_length": 2**23 + 64}, "embedding_length is no whole number from 1 to 8388608"),
        ("ours-rows", {"feed_forward_length": 2**23 + 64}, "feed_forward_length is no whole number from 1 to 8388608"),
        ("llama", {"attention.head_count": 2**22, "attention.key_length": 4}, "heads together are wider than 8388608"),
        ("qwen2", {"attention.sliding_window": 3}, "sliding window"),
        ("gemma3", {"attention.scale": 0.125}, "attention"),
        ("gemma3", {"attention.sliding_window_pattern": 2}, "sliding_window_pattern"),
        ("gemma3", {"rope.freq_base_swa": -1.0}, "rotary"),
        ("gemma3", {"block_count": 5}, "all of its layers slide"),
        ("gemma3", {"attention.sliding_window": 0}, "all of its layers slide"),
        ("ours-i2s", {"attention.sliding_window_pattern": [True, True]}, "all of its layers slide"),
        ("ours-i2s", {"logit_softcap": -1.0}, "soft|cap"),
        ("ours-i2s", {"attention.logit_softcap": -1.0}, "soft|cap"),
        ("ours-i2s", {"post_norms": False}, "post_norms"),
        ("ours-i2s", {"attention.sliding_window": None}, "slid"),
        ("ours-rows", {"post_norms": True}, "post_norms"),
        ("ours-rows", {"attention.qk_norm": False}, "attention.qk_norm"),
        ("ours-rows", {"attention.bias": True}, "attention.bias"),
        ("ours-rows", {"scale_granularity": "tensor"}, "scale_granularity"),
        ("ours-rows", {"attention.sliding_window": 3}, "slid"),
        ("ours-groups", {"scale_granularity": "row"}, "scale_granularity"),
        ("ours-groups", {"attention.bias": False}, "attention.bias"),
        ("ours-groups", {"attention.scale": 0.5}, "attention"),
        ("ours-groups", {"attention.sliding_window_pattern": [True]}, "slid"),
        ("ours-lrc", {"lrc.rank": 3}, "lrc_u"),
        ("ours-lrc", {"lrc.rank": 17}, "rank|lrc_u"),
        ("ours-share", {"lrc.rank": 0.2}, "lrc_u"),
        ("ours-lrc", {"lrc.rank": 0}, "lrc_"),
        ("ours-lrc", {"lrc.rank": 0.5}, "lrc_u"),
        ("ours-lrc", {"lrc.rank": 1.5}, "rank"),
        ("ours-diffusion", {"diffusion.mask_token_id": None}, "mask_token_id"),
        ("ours-diffusion", {"diffusion.mask_token_id": 19}, "mask"),
        ("ours-diffusion", {"diffusion.token_shift": None}, "token_shift"),
        ("ours-diffusion", {"diffusion.block_size": -1}, "block_size"),
    ],
    ids=lambda value: str(value).replace("'", "") if isinstance(value, dict) else None,
)
def test_keys_that_contradict_the_model_are_refused_by_both(name, keys, says, corpus, tmp_path):
    assert not any(isinstance(found, str) for found in outcomes(corpus[name]))
    for said in outcomes(changed(corpus[name], tmp_path / "changed.gguf", keys)):
        assert isinstance(said, str)
        assert any(word in said for word in says.split("|")), said
        assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"rope.scaling.factor": 1.0}),
        ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 0.0}),
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}),
        ("llama", {"rope.freq_base_swa": 10_000.0}),
        ("llama", {"attention.scale": 0.25}),
        ("llama", {"attention.sliding_window": 40}),
        ("llama", {"vocab_size": None}),
        ("gemma3", {"attention.scale": 0.25, "attention.sliding_window_pattern": 6}),
        ("ours-rows", {"attention.qk_norm": None, "attention.bias": None, "post_norms": None}),
        ("ours-rows", {"scale_granularity": "group128"}),
    ],
    ids=lambda value: str(value).replace("'", "") if isinstance(value, dict) else None,
)
def test_keys_that_say_what_is_so_change_nothing(name, keys, corpus, tmp_path):
    before = Engine(corpus[name]).logits([1, 2, 3])
    ours, theirs = outcomes(changed(corpus[name], tmp_path / "changed.gguf", keys))
    assert np.array_equal(ours, before)
    assert not isinstance(theirs, str), theirs


def test_a_linear_factor_is_computed_by_both(corpus, tmp_path):
    path = changed(corpus["qwen3"], tmp_path / "linear.gguf", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})
    ours, theirs = outcomes(path)
    assert (ours - theirs).abs().amax(-1).median() <= 1e-5 * theirs.abs().max()
    assert (ours - torch.from_numpy(Engine(corpus["qwen3"]).logits([1, 2, 3])))[1:].abs().max() > 1e-3 * theirs.abs().max()


def excused(path):
    """Return whether one of both may read a file alone: for a type that none here runs, or rotary factors without a name."""
    file = read_gguf(path)
    outside = {file.tensors[name].ggml_id for name in ("token_embd.weight", "output.weight") if name in file.tensors}
    unknown = {info.ggml_id for info in file.tensors.values()} - RUNNABLE
    return bool(unknown or outside & TERNARY or "rope_freqs.weight" in file.tensors)


@pytest.mark.parametrize("seed", range(4))
def test_what_one_refuses_of_a_changed_file_the_other_refuses(seed, corpus, tmp_path):
    pick, path, accepted = random.Random(seed), tmp_path / "changed.gguf", 0
    files = [read_gguf(path) for _, path in sorted(corpus.items())]
    for _ in range(60):
        path.write_bytes(rewritten(pick.choice(files), pick))
        ours, theirs = outcomes(path)
        try:
            excuse = excused(path)
        except UserError:
            excuse = False
        if not any(why in str(ours) for why in ("not finite", "do not fit the context")):  # of three tokens
            assert isinstance(ours, str) == isinstance(theirs, str) or excuse, (ours, theirs)
        accepted += not isinstance(ours, str)
    assert 0 < accepted < 60
