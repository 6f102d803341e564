"""`wf_engine.h` and its shared library from a C program (packages/kernels/cpp/tests/c_api.c)."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from bitnet_arch import ConversionConfig, convert_model, save_packed
from bitnet_arch.gguf import export_gguf
from bitnet_arch.testing import tiny_llama, tiny_tokenizer
from bitnet_kernels import Engine, _native

SOURCE = Path(__file__).parents[1] / "packages" / "kernels" / "cpp" / "tests" / "c_api.c"
INSTALLED = Path(_native.__file__).parent


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Return the compiled program: C11, any warning is an error, with nothing but what the wheel holds."""
    compiler = next(filter(shutil.which, ("gcc", "clang", "cc")), None)
    if compiler is None:
        (pytest.fail if os.environ.get("WF_REQUIRE_NATIVE") else pytest.skip)("not installed: a C compiler")
    out = tmp_path_factory.mktemp("c") / "c_api"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1", "-g", "-pthread"]
    libraries = ["-I", INSTALLED / "include", "-L", INSTALLED, "-lwf_engine", f"-Wl,-rpath,{INSTALLED}"]
    subprocess.run([compiler, *flags, SOURCE, "-o", out, *libraries], check=True)
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    # Wide enough that products of nine tokens, and the head with one, have threads.
    small = tiny_llama(hidden=256, ffn=768, vocab=1024, heads=4, kv_heads=2, tied=False)
    save_packed(convert_model(small, ConversionConfig(norm="subln", gain="one")), folder / "m", tiny_tokenizer(1024))
    export_gguf(folder / "m", folder / "model.gguf", embedding="q8_0")
    return folder / "model.gguf"


def run(*command, threads=1):
    environment = {**os.environ, "WF_THREADS": str(threads)}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
    return done.stdout


def test_the_library_exports_its_c_functions_alone():
    if shutil.which("nm") is None:
        (pytest.fail if os.environ.get("WF_REQUIRE_NATIVE") else pytest.skip)("not installed: nm")
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", INSTALLED / "libwf_engine.so"], capture_output=True, text=True, check=True
    )
    ours = {line.split()[-1] for line in listed.stdout.splitlines() if line.split()[1] == "T"}
    header = (INSTALLED / "include" / "wf_engine.h").read_text()
    assert {name for name in ours if name.startswith("wf_")} >= {"wf_open", "wf_step", "wf_version"}
    assert all(f" {name}(" in header or f"*{name}(" in header for name in ours), ours


@pytest.mark.parametrize("threads", [1, 3])
def test_a_c_program_computes_what_python_does(threads, program, model):
    tokens = [5, 100, 17, 511, 1023, 2, 3, 400, 600]
    found = np.array([float.fromhex(line) for line in run(program, "logits", model, *tokens, threads=threads).split()], np.float32)
    expected = Engine(model).logits(tokens)[-1]
    assert np.array_equal(found[:1024], expected)
    exact = torch.from_numpy(expected).double().log_softmax(-1)
    assert (torch.from_numpy(found[1024:]).double() - exact).abs().max() <= 2e-6


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("what", "least"), [("errors", 250), ("cancel", 100), ("memory", 500), ("attention", 50), ("limit", 40)])
def test_whatever_goes_wrong_is_a_code_and_the_engine_goes_on(what, least, threads, program, model):
    held = re.fullmatch(r"(\d+) checks hold\n", run(program, what, model, threads=threads))
    assert held is not None
    assert int(held[1]) >= least
