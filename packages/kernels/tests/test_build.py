"""The package builds where there is no compiler, and needs neither torch nor a compiler when it is imported."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

PACKAGE = Path(__file__).parents[1]

USE = """
import sys
sys.path[:0] = sys.argv[1:]
import numpy as np
import bitnet_kernels
codes = np.random.default_rng(0).integers(-1, 2, (33, 300), dtype=np.int8)
w = bitnet_kernels.TernaryMatrix(codes, np.ones(1, np.float32))
x = np.full((2, 300), 127, np.float32)
assert np.array_equal(w.matmul_integer(x), 127 * np.tile(codes.sum(1, dtype=np.int32), (2, 1)))
others = [name in sys.modules for name in ("torch", "bitnet_arch")]
print(bitnet_kernels.__file__, ",".join(bitnet_kernels.available_isas()), *others)
"""


def use(*folders, **environment):
    """Import the package from folders alone, with numpy's, in a Python of its own; return what it says."""
    command = [sys.executable, "-I", "-S", "-c", USE, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"], **environment})
    return done.returncode, done.stdout.split() if done.returncode == 0 else done.stderr.splitlines()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with the installed package, and nothing else but numpy's."""
    import bitnet_kernels
    from bitnet_kernels import _native

    folder = tmp_path_factory.mktemp("alone")
    shutil.copytree(
        Path(bitnet_kernels.__file__).parent, folder / "bitnet_kernels", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    shutil.copy(_native.__file__, folder / "bitnet_kernels")
    for name in ("numpy", "numpy.libs"):
        source = Path(np.__file__).parents[1] / name
        if source.exists():
            (folder / name).symlink_to(source)
    return folder


def test_importing_it_imports_no_torch(alone):
    code, said = use(alone)
    assert code == 0, said
    assert said[0].startswith(str(alone))
    assert said[2:] == ["False", "False"]


def test_an_instruction_set_can_be_chosen_and_an_unknown_one_is_named(alone):
    command = [sys.executable, "-c", "import bitnet_kernels; print(bitnet_kernels.isa())"]
    for name, expected in (("scalar", "scalar"), ("", None), ("sse9", None)):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "WF_ISA": name})
        if expected is not None:
            assert done.stdout.split() == [expected]
        elif not name:
            assert done.returncode == 0
        else:
            assert done.returncode != 0
            last = done.stderr.splitlines()[-1]
            assert last.startswith("ValueError: WF_ISA: isa 'sse9' is not available here: choose one of scalar")


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first build fetches zig and compiles its libraries: two minutes of processor time
def test_it_builds_without_a_compiler(tmp_path, alone):
    uv = os.environ.get("UV") or shutil.which("uv")
    assert uv is not None
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("build", "__pycache__", ".venv"))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sh").symlink_to("/bin/sh")
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC", "CMAKE_ARGS", "VIRTUAL_ENV")}
    command = [uv, "build", "--wheel", "--python", sys.executable, "--out-dir", tmp_path / "out", source]
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "PATH": str(programs)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (source / "build" / "zig" / "c++").exists()
    (wheel,) = (tmp_path / "out").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "wheel")
    code, said = use(tmp_path / "wheel", alone, PATH=str(programs))
    assert code == 0, said
    assert said[0].startswith(str(tmp_path / "wheel"))
    assert said[1:] == use(alone)[1][1:]  # the same instruction sets
