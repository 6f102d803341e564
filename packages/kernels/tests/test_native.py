"""The C++ comparison of every instruction set with the scalar one, built natively with sanitizers and for 64-bit Arm under qemu."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import bitnet_kernels
import pytest

pytestmark = pytest.mark.slow

SOURCES = Path(__file__).parents[1]


def need(*programs):
    """Skip where a program is missing; fail where `WF_REQUIRE_NATIVE` says that it must not be."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        message = f"not installed: {', '.join(missing)} (.ci/run installs Debian's packages)"
        (pytest.fail if os.environ.get("WF_REQUIRE_NATIVE") else pytest.skip)(message)


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "warning:" in line and not line.startswith("qemu-")]
    assert not said, said  # of compilers; qemu's are of features that it does not imitate
    return done.stdout


def build(directory, *options):
    need("cmake", "make")
    run("cmake", "-G", "Unix Makefiles", "-S", SOURCES, "-B", directory, *options)
    run("cmake", "--build", directory, "--target", "ternary_check", "--parallel", "2")
    return directory / "ternary_check"


def test_no_kernel_reads_or_writes_beyond_its_arrays(tmp_path):
    need("g++")
    # Not -O2 with -g, for which gcc 12 takes minutes a file.
    flags = "-DCMAKE_CXX_FLAGS=-O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
    program = build(tmp_path, "-DCMAKE_BUILD_TYPE=", "-DCMAKE_CXX_COMPILER=g++", flags)
    names = ",".join(bitnet_kernels.available_isas())
    assert run(program, names).strip() == names


ARM = ("SYSTEM_NAME=Linux", "SYSTEM_PROCESSOR=aarch64", "CXX_COMPILER=aarch64-linux-gnu-g++", "EXE_LINKER_FLAGS=-static")


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    need("aarch64-linux-gnu-g++", "qemu-aarch64")
    return build(tmp_path_factory.mktemp("arm"), *(f"-DCMAKE_{option}" for option in (*ARM, "BUILD_TYPE=Release")))


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    if platform.machine() != "x86_64":
        pytest.skip("not an x86-64 machine")
    need("g++", "qemu-x86_64")
    return build(tmp_path_factory.mktemp("native"), "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_COMPILER=g++")


@pytest.mark.parametrize(
    ("cpu", "names"),
    [("cortex-a53", "scalar,neon"), ("cortex-a76", "scalar,neon,dotprod"), ("max", "scalar,neon,dotprod,i8mm")],
)
def test_one_binary_serves_every_arm_processor(arm, cpu, names):
    assert run("qemu-aarch64", "-cpu", cpu, arm, names).strip() == names


@pytest.mark.parametrize(("cpu", "names"), [("Nehalem", "scalar"), ("Haswell", "scalar,avx2")])  # qemu has no AVX-512
def test_the_same_binary_runs_on_older_processors(native, cpu, names):
    assert run("qemu-x86_64", "-cpu", cpu, native, names).strip() == names
