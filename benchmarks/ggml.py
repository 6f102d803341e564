"""Matrix products by ggml, from the libraries that PyPI's `libggml-python` carries: what the kernels' benchmarks compare with."""

import ctypes
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TYPES = {"F32": 0, "Q4_1": 3, "Q8_0": 8, "Q6_K": 14, "TQ1_0": 34, "TQ2_0": 35, "Q2_0": 42}
"""ggml's numbers of its types."""

PACKAGE = "libggml-python"


class _Parameters(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Plan(ctypes.Structure):
    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    )


def _library() -> ctypes.CDLL:
    found = {Path(str(file)).name: file for file in files(PACKAGE) or ()}
    ctypes.CDLL(str(found["libggml-base.so.0"].locate()), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(found["libggml-cpu.so.0"].locate()))
    pointer, integer, wide, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (pointer, [_Parameters]),
        "ggml_free": (None, [pointer]),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_nbytes": (size, [pointer]),
        "ggml_row_size": (size, [integer, wide]),
        "ggml_new_tensor_2d": (pointer, [pointer, integer, wide, wide]),
        "ggml_mul_mat": (pointer, [pointer, pointer, pointer]),
        "ggml_new_graph_custom": (pointer, [pointer, size, ctypes.c_bool]),
        "ggml_build_forward_expand": (None, [pointer, pointer]),
        "ggml_graph_plan": (_Plan, [pointer, integer, pointer]),
        "ggml_graph_compute": (integer, [pointer, ctypes.POINTER(_Plan)]),
        "ggml_quantize_chunk": (size, [integer, pointer, pointer, wide, wide, wide, pointer]),
        "ggml_cpu_init": (None, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.ggml_cpu_init()
    return library


class Products:
    """Copies of a matrix in one of ggml's types, multiplied with the same activations.

    A run is one graph of `mul_mat` nodes, so that Python's part is a call a graph; each node quantises the activations.
    """

    def __init__(self, name: str, weights: NDArray[Any], x: NDArray[np.float32], copies: int, graphs: int) -> None:
        """Pack `weights` `[rows, columns]`, `copies` times, for `x` `[tokens, columns]`; `graphs` graphs share the copies."""
        self._library = _library()
        (rows, columns), tokens = weights.shape, len(x)
        a_matrix = rows * self._library.ggml_row_size(TYPES[name], columns)
        memory = copies * (a_matrix + 4 * rows * tokens + (2 << 10)) + 4 * x.size * (graphs + 1) + (32 << 20)
        self._context = self._library.ggml_init(_Parameters(memory, None, False))
        inputs = self._library.ggml_new_tensor_2d(self._context, TYPES["F32"], columns, tokens)
        ctypes.memmove(self._library.ggml_get_data(inputs), np.ascontiguousarray(x).ctypes.data, x.nbytes)
        floats, first = np.ascontiguousarray(weights, np.float32), None
        self._graphs, self._at = [], 0
        for number in range(graphs):
            graph = self._library.ggml_new_graph_custom(self._context, 2 * copies + 8, False)
            for _ in range(copies * number // graphs, copies * (number + 1) // graphs):
                tensor = self._library.ggml_new_tensor_2d(self._context, TYPES[name], columns, rows)
                data, self.nbytes = self._library.ggml_get_data(tensor), self._library.ggml_nbytes(tensor)
                if first is None:
                    self._library.ggml_quantize_chunk(TYPES[name], floats.ctypes.data, data, 0, rows, columns, None)
                    first = data
                else:
                    ctypes.memmove(data, first, self.nbytes)
                result = self._library.ggml_mul_mat(self._context, tensor, inputs)
                self._library.ggml_build_forward_expand(graph, result)
            plan = self._library.ggml_graph_plan(graph, 1, None)
            work = ctypes.create_string_buffer(plan.work_size)
            plan.work_data = ctypes.addressof(work)
            self._graphs.append((graph, plan, work))
        self._first, self._rows = first, rows
        self._result, self._shape = self._library.ggml_get_data(result), (tokens, rows)

    def run(self) -> None:
        """Compute the next graph, on one thread."""
        graph, plan, _ = self._graphs[self._at]
        self._at = (self._at + 1) % len(self._graphs)
        self._library.ggml_graph_compute(graph, plan)

    def result(self) -> NDArray[np.float32]:
        """Return the last graph's last product, `[tokens, rows]`."""
        array = ctypes.cast(self._result, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(array, self._shape).copy()

    def data(self) -> NDArray[np.uint8]:
        """Return the bytes of a copy, `[rows, bytes of a row]`."""
        array = ctypes.cast(self._first, ctypes.POINTER(ctypes.c_uint8))
        return np.ctypeslib.as_array(array, (self._rows, self.nbytes // self._rows)).copy()
