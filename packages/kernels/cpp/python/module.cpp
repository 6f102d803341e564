// The Python module: checked arrays in, arrays out. The typed face is in src/bitnet_kernels/__init__.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ternary/ternary.h"

namespace nb = nanobind;

namespace {

template <typename T>
using Input = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <typename T>
using Output = nb::ndarray<nb::numpy, T>;

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// Memory aligned to a cache line, which is also a block.
template <typename T>
Buffer<T> allocate(int64_t count) {
  const auto bytes = static_cast<size_t>(wf::ceil_div(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T)), 64) * 64);
  void* pointer = std::aligned_alloc(64, bytes);
  if (pointer == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(pointer));
}

template <typename T>
Output<T> array(Buffer<T> data, std::vector<size_t> shape) {
  T* pointer = data.release();
  nb::capsule owner(pointer, [](void* p) noexcept { std::free(p); });
  return Output<T>(pointer, shape.size(), shape.data(), owner);
}

const wf::Kernels& kernels(const std::string& isa) {
  const wf::Kernels* found = wf::kernels_named(isa.c_str());
  if (found == nullptr) throw std::invalid_argument("isa: this processor or this build has no '" + isa + "'");
  return *found;
}

// A packed matrix that owns its memory.
struct Matrix {
  Buffer<uint8_t> codes;
  Buffer<float> scales;
  wf::TernaryMatrix view;

  Matrix(Input<int8_t> weights, Input<float> scale, int granularity) {
    view = {nullptr, nullptr, static_cast<int64_t>(weights.shape(0)), static_cast<int64_t>(weights.shape(1)),
            static_cast<wf::Granularity>(granularity)};
    codes = allocate<uint8_t>(view.bytes());
    if (view.granularity == wf::Granularity::group) {
      const int64_t groups = view.groups();
      scales = allocate<float>(view.panels() * groups * wf::kPanelRows);
      std::fill_n(scales.get(), view.panels() * groups * wf::kPanelRows, 0.0F);
      for (int64_t row = 0; row < view.rows; ++row) {
        for (int64_t group = 0; group < groups; ++group) {
          scales[(row / wf::kPanelRows * groups + group) * wf::kPanelRows + row % wf::kPanelRows] = scale.data()[row * groups + group];
        }
      }
    } else {
      scales = allocate<float>(static_cast<int64_t>(scale.size()));
      std::copy_n(scale.data(), scale.size(), scales.get());
    }
    view.codes = codes.get();
    view.scales = scales.get();
    if (!wf::pack(weights.data(), view.rows, view.columns, codes.get())) {
      throw std::invalid_argument("codes: a value other than -1, 0 and 1");
    }
  }

  Output<int8_t> unpack() const {
    auto out = allocate<int8_t>(view.rows * view.columns);
    wf::unpack(view.codes, view.rows, view.columns, out.get());
    return array(std::move(out), {static_cast<size_t>(view.rows), static_cast<size_t>(view.columns)});
  }
};

// Quantised activations that own their memory.
struct Quantized {
  Buffer<int8_t> codes;
  Buffer<float> scales;
  Buffer<int32_t> sums;
  wf::Activations view;

  Quantized(const wf::Kernels& isa, const Input<float>& x) {
    const auto tokens = static_cast<int64_t>(x.shape(0)), columns = static_cast<int64_t>(x.shape(1));
    const int64_t stride = wf::ceil_div(columns, 64) * 64, groups = wf::ceil_div(columns, wf::kGroup);
    codes = allocate<int8_t>(tokens * stride);
    scales = allocate<float>(tokens);
    sums = allocate<int32_t>(tokens * groups);
    for (int64_t token = 0; token < tokens; ++token) {
      if (!isa.quantize(x.data() + token * columns, columns, stride, codes.get() + token * stride, scales.get() + token,
                        sums.get() + token * groups)) {
        throw std::invalid_argument("x: token " + std::to_string(token) + " holds a NaN or an infinity");
      }
    }
    view = {codes.get(), scales.get(), sums.get(), tokens, stride};
  }
};

template <typename T>
Output<T> product(const Matrix& w, const wf::Kernels& isa, const Input<float>& x) {
  const Quantized q(isa, x);
  auto y = allocate<T>(q.view.tokens * w.view.rows);
  if constexpr (std::is_same_v<T, float>) {
    isa.matmul(w.view, q.view, 0, w.view.panels(), y.get(), w.view.rows);
  } else {
    isa.matmul_integer(w.view, q.view, 0, w.view.panels(), y.get(), w.view.rows);
  }
  return array(std::move(y), {x.shape(0), static_cast<size_t>(w.view.rows)});
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (int i = 0; i <= static_cast<int>(wf::Isa::i8mm); ++i) {
      if (wf::available(static_cast<wf::Isa>(i))) names.emplace_back(wf::name_of(static_cast<wf::Isa>(i)));
    }
    return names;
  });
  m.def("best_isa", [] { return std::string(wf::name_of(wf::best_isa())); });
  m.def("quantize", [](const std::string& isa, Input<float> x) {
    Quantized q(kernels(isa), x);
    auto codes = allocate<int8_t>(static_cast<int64_t>(x.size()));
    for (size_t token = 0; token < x.shape(0); ++token) {
      std::copy_n(q.view.codes + static_cast<int64_t>(token) * q.view.stride, x.shape(1), codes.get() + token * x.shape(1));
    }
    return nb::make_tuple(array(std::move(codes), {x.shape(0), x.shape(1)}), array(std::move(q.scales), {x.shape(0), 1}));
  });
  nb::class_<Matrix>(m, "Matrix")
      .def(nb::init<Input<int8_t>, Input<float>, int>())
      .def_prop_ro("rows", [](const Matrix& w) { return w.view.rows; })
      .def_prop_ro("columns", [](const Matrix& w) { return w.view.columns; })
      .def_prop_ro("nbytes", [](const Matrix& w) { return w.view.bytes(); })
      .def("codes", &Matrix::unpack)
      .def("matmul", [](const Matrix& w, const std::string& isa, Input<float> x) { return product<float>(w, kernels(isa), x); })
      .def("matmul_integer", [](const Matrix& w, const std::string& isa, Input<float> x) { return product<int32_t>(w, kernels(isa), x); });
}
