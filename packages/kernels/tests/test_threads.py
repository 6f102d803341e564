"""Threads: products do not depend on their number, several callers do not disturb each other, and a fork is survived."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import bitnet_kernels
import numpy as np
import pytest
from bitnet_kernels import TernaryMatrix, matmul_many

CPP = Path(__file__).parents[1] / "cpp"


@pytest.fixture(autouse=True)
def _as_before():
    before = bitnet_kernels.threads()
    yield
    bitnet_kernels.set_threads(before)


def tasks(count):
    """Return how many threads this process has, or `count` once it has so many: one that was joined ends a moment later."""
    found = 0
    for _ in range(1000):
        found = len(list(Path("/proc/self/task").iterdir()))
        if found == count:
            break
        time.sleep(0.01)
    return found


def matrices(*shapes, granularity="tensor", seed=0):
    rng = np.random.default_rng(seed)
    for rows, columns in shapes:
        scale = {"tensor": (1,), "row": (rows, 1), "group": (rows, -(-columns // 128))}[granularity]
        yield TernaryMatrix(rng.integers(-1, 2, (rows, columns), dtype=np.int8), rng.random(scale, dtype=np.float32))


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_results_do_not_depend_on_the_number_of_threads(granularity, tokens):
    (w,) = matrices((2005, 1000), granularity=granularity)  # 500 KB: enough for several chunks
    x = np.random.default_rng(1).standard_normal((tokens, 1000), dtype=np.float32)
    bitnet_kernels.set_threads(1)
    expected, integers = w.matmul(x), w.matmul_integer(x)
    for count in (2, 3, 7):
        bitnet_kernels.set_threads(count)
        assert bitnet_kernels.threads() == count
        for _ in range(5):
            assert np.array_equal(w.matmul(x), expected)
            assert np.array_equal(w.matmul_integer(x), integers)


@pytest.mark.parametrize("count", [1, 3])
def test_many_matrices_give_what_each_gives(count):
    bitnet_kernels.set_threads(count)
    several = list(matrices((576, 576), (192, 576), (7, 576), (1536, 576)))
    x = np.random.default_rng(1).standard_normal((5, 576), dtype=np.float32)
    for y, w in zip(matmul_many(several, x), several, strict=True):
        assert np.array_equal(y, w.matmul(x))
    assert matmul_many([], x) == []
    with pytest.raises(ValueError, match="matrices: equal numbers of columns"):
        matmul_many(list(matrices((8, 32), (8, 48))), x)
    x[2, 3] = np.nan
    with pytest.raises(ValueError, match="token 2 holds a NaN"):
        matmul_many(several, x)


def test_several_callers_at_once():
    bitnet_kernels.set_threads(2)
    wrong = []

    def call(seed):
        (w,) = matrices((1600, 1030), seed=seed)
        x = np.random.default_rng(seed).standard_normal((2, 1030), dtype=np.float32)
        expected = w.matmul(x)
        for _ in range(100):
            if not np.array_equal(w.matmul(x), expected):
                wrong.append(seed)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_forked_child_has_threads_of_its_own():
    bitnet_kernels.set_threads(3)
    (w,) = matrices((1000, 1200))
    x = np.random.default_rng(1).standard_normal((2, 1200), dtype=np.float32)
    expected = w.matmul(x)
    child = os.fork()
    if child == 0:
        good = False
        # Whatever happens, the child never goes on with its parent's tests: it would be a second worker of pytest-xdist, for ever.
        try:
            good = all(np.array_equal(w.matmul(x), expected) for _ in range(20))
            bitnet_kernels.set_threads(2)
            good = good and np.array_equal(w.matmul(x), expected)
            good = good and (sys.platform != "linux" or tasks(2) == 2)
        finally:
            os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(w.matmul(x), expected)


@pytest.mark.parametrize(("variables", "count"), [({"WF_THREADS": "3", "OMP_NUM_THREADS": "2"}, 3), ({"OMP_NUM_THREADS": "2"}, 2)])
def test_the_environment_says_how_many(variables, count):
    environment = {name: value for name, value in os.environ.items() if name not in ("WF_THREADS", "OMP_NUM_THREADS")}
    code = "import bitnet_kernels; print(bitnet_kernels.threads())"
    done = subprocess.run([sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True, check=True)
    assert int(done.stdout) == count


@pytest.mark.parametrize("count", ["abc", "0", "-3", "65", "1e9", "1000000000", "2.0", " "])
def test_an_environment_that_cannot_be_is_refused(count):
    command = [sys.executable, "-c", "import bitnet_kernels"]
    done = subprocess.run(command, env=os.environ | {"WF_THREADS": count}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ValueError: WF_THREADS: from 1 to 64 threads are possible, not")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_where_threads_cannot_start_the_others_compute():
    code = """
import os, resource, time
import numpy as np, bitnet_kernels
bitnet_kernels.set_threads(1)
w = bitnet_kernels.TernaryMatrix(np.ones((1000, 1200), np.int8), np.ones(1, np.float32))
x = np.random.default_rng(1).standard_normal((2, 1200), dtype=np.float32)
expected = w.matmul(x)
started = lambda: len(os.listdir("/proc/self/task"))
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
before = started()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, hard))  # stacks of 8 MiB for a few, not for 63
bitnet_kernels.set_threads(64)
assert np.array_equal(w.matmul(x), expected)
some = started() - before
assert 0 < some < 63, some
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
assert np.array_equal(w.matmul(x), expected)
assert started() - before == some  # a call does not try again
bitnet_kernels.set_threads(64)
assert np.array_equal(w.matmul(x), expected)
for _ in range(1000):  # those that were joined end a moment later
    if started() - before == 63:
        break
    time.sleep(0.01)
assert started() - before == 63  # who asks again does
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("count", [0, -1, 65])
def test_a_number_of_threads_that_cannot_be_is_refused(count):
    with pytest.raises(ValueError, match="count: from 1 to 64"):
        bitnet_kernels.set_threads(count)


@pytest.mark.parametrize("sanitizer", [None, pytest.param("thread", marks=pytest.mark.slow)])
def test_the_pool_waits_for_no_worker_that_is_held_up(sanitizer, tmp_path):
    """cpp/tests/pool_test.cpp: workers stop in the middle of a chunk, and the caller returns all the same."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler on PATH")
    program = tmp_path / "pool_test"
    flags = ["-std=c++20", "-O1", "-g", "-pthread", "-I", str(CPP)] + ([f"-fsanitize={sanitizer}"] if sanitizer else [])
    sources = [str(CPP / "ternary" / "pool.cpp"), str(CPP / "tests" / "pool_test.cpp")]
    subprocess.run([compiler, *flags, *sources, "-o", str(program)], check=True)
    done = subprocess.run([program, "300"], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "ok\n", done.stderr
