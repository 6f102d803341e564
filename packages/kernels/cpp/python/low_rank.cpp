// The Python side of low-rank corrections. Shapes and dtypes are checked in src/bitnet_kernels/low_rank.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "ternary/low_rank.h"

namespace nb = nanobind;

namespace {

template <typename T>
using Input = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;

// Numbers of U [rows, rank] and V [columns, rank] as bytes: float16, or int8 with scales [rank].
void make(wf::LowRank* self, int type, Input<uint8_t> u, Input<uint8_t> v, Input<float> u_scales, Input<float> v_scales, int64_t rows,
          int64_t columns, int64_t rank) {
  new (self) wf::LowRank(static_cast<wf::AdapterType>(type), u.data(), v.data(), u_scales.data(), v_scales.data(), rows, columns, rank);
}

// Contiguous float32 arrays by their addresses: x [tokens, columns], and y [tokens, rows], which is added to.
void add_at(const wf::LowRank& adapters, const std::string& isa, uintptr_t x, int64_t tokens, uintptr_t y) {
  const wf::Kernels* kernels = wf::kernels_named(isa.c_str());
  if (kernels == nullptr) throw std::invalid_argument("isa: this processor or this build has no '" + isa + "'");
  const nb::gil_scoped_release others_may_run;
  wf::add_low_rank(*kernels, adapters, reinterpret_cast<const float*>(x), tokens, reinterpret_cast<float*>(y));
}

}  // namespace

void bind_low_rank(nb::module_& m) {
  nb::class_<wf::LowRank>(m, "LowRank").def("__init__", &make).def("add_at", &add_at);
}
