// The Python module: checked arrays in, arrays out. The typed face is in src/bitnet_kernels/__init__.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ternary/blocks_product.h"
#include "ternary/floats.h"
#include "ternary/formats.h"
#include "ternary/pool.h"
#include "ternary/product.h"
#include "ternary/roofline.h"
#include "ternary/ternary.h"

namespace nb = nanobind;

void bind_runtime(nb::module_& m);  // runtime.cpp
void bind_low_rank(nb::module_& m);  // low_rank.cpp

namespace {

template <typename T>
using Input = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <typename T>
using Output = nb::ndarray<nb::numpy, T>;

template <typename T>
Output<T> array(wf::Buffer<T> data, std::vector<size_t> shape) {
  T* pointer = data.release();
  nb::capsule owner(pointer, [](void* p) noexcept { std::free(p); });
  return Output<T>(pointer, shape.size(), shape.data(), owner);
}

const wf::Kernels& kernels(const std::string& isa) {
  const wf::Kernels* found = wf::kernels_named(isa.c_str());
  if (found == nullptr) throw std::invalid_argument("isa: this processor or this build has no '" + isa + "'");
  return *found;
}

// A packed matrix.
struct Matrix {
  wf::SharedMatrix shared;

  // `data` in one of the layouts of formats.h; `name` is that of the argument. Scales [1], [rows, 1] or [rows, groups].
  Matrix(int layout, const std::string& name, Input<uint8_t> data, int64_t rows, int64_t columns, Input<float> scale, int granularity) {
    const auto format = static_cast<wf::Format>(layout);
    const int64_t bytes = wf::format_bytes(format, rows, columns);
    if (bytes < 0 || static_cast<int64_t>(data.size()) < bytes) throw std::invalid_argument(name + ": too few bytes for its shape");
    auto made = std::make_shared<wf::OwnedMatrix>();
    wf::TernaryMatrix& view = made->view;
    view = {nullptr, nullptr, rows, columns, static_cast<wf::Granularity>(granularity)};
    const int64_t scales = wf::Granularity::tensor == view.granularity ? 1
                           : wf::Granularity::row == view.granularity  ? rows
                                                                       : rows * view.groups();
    if (static_cast<int64_t>(scale.size()) != scales) throw std::invalid_argument("scale: a size that is not its granularity's");
    made->codes = wf::allocate<uint8_t>(view.bytes());
    if (view.granularity == wf::Granularity::group) {
      const int64_t groups = view.groups();
      made->scales = wf::allocate<float>(view.panels() * groups * wf::kPanelRows);
      std::fill_n(made->scales.get(), view.panels() * groups * wf::kPanelRows, 0.0F);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t group = 0; group < groups; ++group) {
          made->scales[group_scale(view, row, group)] = scale.data()[row * groups + group];
        }
      }
    } else {
      made->scales = wf::allocate<float>(scales);
      std::copy_n(scale.data(), scale.size(), made->scales.get());
    }
    view.codes = made->codes.get();
    view.scales = made->scales.get();
    bool ternary;
    {
      const nb::gil_scoped_release others_may_run;
      ternary = wf::pack_from(format, data.data(), rows, columns, made->codes.get());
    }
    if (!ternary) throw std::invalid_argument(name + ": a code outside of -1, 0 and 1");
    shared = std::move(made);
  }

  const wf::TernaryMatrix& view() const { return shared->view; }

  Output<uint8_t> unpack(int layout, int64_t bytes) const {
    const auto format = static_cast<wf::Format>(layout);
    const int64_t least = wf::format_bytes(format, view().rows, view().columns);
    if (least < 0 || bytes < least) throw std::invalid_argument("layout: it cannot have this shape");
    auto out = wf::allocate<uint8_t>(bytes);
    {
      const nb::gil_scoped_release others_may_run;
      std::memset(out.get(), 0, static_cast<size_t>(bytes));
      wf::unpack_to(format, view().codes, view().rows, view().columns, out.get());
    }
    return array(std::move(out), {static_cast<size_t>(bytes)});
  }

  Output<float> scale() const {
    const wf::TernaryMatrix& w = view();
    const auto rows = static_cast<size_t>(w.rows), groups = static_cast<size_t>(w.groups());
    if (w.granularity == wf::Granularity::group) {
      auto out = wf::allocate<float>(w.rows * w.groups());
      for (int64_t row = 0; row < w.rows; ++row) {
        for (int64_t group = 0; group < w.groups(); ++group) out[row * w.groups() + group] = w.scales[group_scale(w, row, group)];
      }
      return array(std::move(out), {rows, groups});
    }
    const bool one = w.granularity == wf::Granularity::tensor;
    auto out = wf::allocate<float>(one ? 1 : w.rows);
    std::copy_n(w.scales, one ? 1 : rows, out.get());
    return array(std::move(out), one ? std::vector<size_t>{1} : std::vector<size_t>{rows, 1});
  }

 private:
  static int64_t group_scale(const wf::TernaryMatrix& w, int64_t row, int64_t group) {
    return (row / wf::kPanelRows * w.groups() + group) * wf::kPanelRows + row % wf::kPanelRows;
  }
};

void check_finite(int64_t bad) {
  if (bad >= 0) throw std::invalid_argument("x: token " + std::to_string(bad) + " holds a NaN or an infinity");
}

// Products of several matrices with the same activations.
template <typename T>
std::vector<Output<T>> products(const std::vector<const Matrix*>& matrices, const wf::Kernels& isa, const Input<float>& x) {
  const auto tokens = static_cast<int64_t>(x.shape(0));
  std::vector<wf::SharedMatrix> shared;
  std::vector<wf::Buffer<T>> results;
  std::vector<T*> pointers;
  for (const Matrix* w : matrices) {
    shared.push_back(w->shared);
    results.push_back(wf::allocate<T>(tokens * w->view().rows));
    pointers.push_back(results.back().get());
  }
  int64_t bad;
  {
    const nb::gil_scoped_release others_may_run;
    if constexpr (std::is_same_v<T, float>) {
      bad = wf::multiply(isa, shared, x.data(), tokens, pointers);
    } else {
      bad = wf::multiply_integer(isa, shared, x.data(), tokens, pointers);
    }
  }
  check_finite(bad);
  std::vector<Output<T>> out;
  for (size_t i = 0; i < matrices.size(); ++i) {
    out.push_back(array(std::move(results[i]), {x.shape(0), static_cast<size_t>(matrices[i]->view().rows)}));
  }
  return out;
}

// A packed matrix of llama.cpp's blocks.
struct Blocks {
  wf::SharedBlocks shared;

  Blocks(int type, Input<uint8_t> data, int64_t columns)
      : shared(std::make_shared<const wf::OwnedBlocks>(static_cast<wf::BlockType>(type), data.data(), static_cast<int64_t>(data.shape(0)),
                                                       columns)) {}

  Output<float> matmul(const std::string& isa, Input<float> x) const {
    const auto tokens = static_cast<int64_t>(x.shape(0));
    auto y = wf::allocate<float>(tokens * shared->view.rows);
    int64_t bad;
    {
      const nb::gil_scoped_release others_may_run;
      bad = wf::multiply_blocks(kernels(isa).isa, shared, x.data(), tokens, y.get());
    }
    check_finite(bad);
    return array(std::move(y), {x.shape(0), static_cast<size_t>(shared->view.rows)});
  }

  Output<float> rows(Input<int64_t> ids) const {
    const wf::BlockMatrix& w = shared->view;
    auto out = wf::allocate<float>(static_cast<int64_t>(ids.size()) * w.columns);
    for (size_t i = 0; i < ids.size(); ++i) wf::unpack_row(w, ids.data()[i], out.get() + static_cast<int64_t>(i) * w.columns);
    return array(std::move(out), {ids.size(), static_cast<size_t>(w.columns)});
  }
};

// Keys and values of a layer that own their memory. Shapes are checked by the typed face.
struct Kv {
  wf::Buffer<uint8_t> keys, values;
  wf::Buffer<float> key_scales, value_scales;
  wf::KvCache view;
  int64_t positions = 0;

  Kv(int type, int64_t heads, int64_t head_dim, int64_t capacity) {
    const auto kind = static_cast<wf::KvType>(type);
    const int64_t bytes = heads * capacity * head_dim * wf::bytes_of(kind);
    const int64_t scales = kind == wf::KvType::int8 ? heads * capacity : 0;
    keys = wf::allocate<uint8_t>(bytes);
    values = wf::allocate<uint8_t>(bytes);
    key_scales = wf::allocate<float>(scales);
    value_scales = wf::allocate<float>(scales);
    view = {kind, heads, capacity, head_dim, keys.get(), values.get(), key_scales.get(), value_scales.get()};
  }

  void append(const std::string& isa, Input<float> k, Input<float> v) {
    const wf::FloatKernels& found = wf::float_kernels(kernels(isa).isa);
    const auto tokens = static_cast<int64_t>(k.shape(0));
    for (int64_t token = 0; token < tokens; ++token, ++positions) {
      for (int64_t head = 0; head < view.heads; ++head) {
        const int64_t at = (token * view.heads + head) * view.head_dim;
        found.store(view, head, positions, k.data() + at, v.data() + at);
      }
    }
  }

  Output<float> attention(const std::string& isa, Input<float> q, Input<int64_t> ranges, float scale) const {
    const wf::FloatKernels& found = wf::float_kernels(kernels(isa).isa);
    const auto tokens = static_cast<int64_t>(q.shape(0)), heads = static_cast<int64_t>(q.shape(1)), group = heads / view.heads;
    auto out = wf::allocate<float>(static_cast<int64_t>(q.size()));
    {
      const nb::gil_scoped_release others_may_run;
      for (int64_t token = 0; token < tokens; ++token) {
        const int64_t first = ranges.data()[2 * token], last = ranges.data()[2 * token + 1];
        for (int64_t head = 0; head < view.heads; ++head) {
          const int64_t at = (token * heads + head * group) * view.head_dim;
          found.attention(view, head, q.data() + at, group, first, last, scale, out.get() + at);
        }
      }
    }
    return array(std::move(out), {q.shape(0), q.shape(1), q.shape(2)});
  }
};

// Seconds that a function takes, without the GIL.
template <typename Function>
double seconds(Function function) {
  const nb::gil_scoped_release others_may_run;
  const auto start = std::chrono::steady_clock::now();
  function();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr)
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // a matrix may well live as long as the interpreter
  m.attr("MOST_COLUMNS") = wf::kMostColumns;
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (int i = 0; i <= static_cast<int>(wf::Isa::i8mm); ++i) {
      if (wf::available(static_cast<wf::Isa>(i))) names.emplace_back(wf::name_of(static_cast<wf::Isa>(i)));
    }
    return names;
  });
  m.def("best_isa", [] { return std::string(wf::name_of(wf::best_isa())); });
  m.def("quantize", [](const std::string& isa, Input<float> x) {
    const auto tokens = static_cast<int64_t>(x.shape(0)), columns = static_cast<int64_t>(x.shape(1));
    const wf::OwnedActivations q(kernels(isa), x.data(), tokens, columns);
    check_finite(q.bad);
    auto codes = wf::allocate<int8_t>(tokens * columns);
    for (int64_t token = 0; token < tokens; ++token) {
      std::copy_n(q.view.codes + token * q.view.stride, columns, codes.get() + token * columns);
    }
    auto scales = wf::allocate<float>(tokens);
    std::copy_n(q.view.scales, tokens, scales.get());
    return nb::make_tuple(array(std::move(codes), {x.shape(0), x.shape(1)}), array(std::move(scales), {x.shape(0), 1}));
  });
  nb::class_<Matrix>(m, "Matrix")
      .def(nb::init<int, const std::string&, Input<uint8_t>, int64_t, int64_t, Input<float>, int>())
      .def_prop_ro("rows", [](const Matrix& w) { return w.view().rows; })
      .def_prop_ro("columns", [](const Matrix& w) { return w.view().columns; })
      .def_prop_ro("nbytes", [](const Matrix& w) { return w.view().bytes(); })
      .def("scale", &Matrix::scale)
      .def("unpack", &Matrix::unpack)
      .def("matmul", [](const Matrix& w, const std::string& isa, Input<float> x) { return products<float>({&w}, kernels(isa), x)[0]; })
      .def("matmul_integer",
           [](const Matrix& w, const std::string& isa, Input<float> x) { return products<int32_t>({&w}, kernels(isa), x)[0]; });
  m.def("matmul_many", [](const std::vector<const Matrix*>& matrices, const std::string& isa, Input<float> x) {
    return products<float>(matrices, kernels(isa), x);
  });
  // For callers whose arrays are checked already, and whose products are so short that describing an array would show: addresses of
  // contiguous float32 arrays, x [tokens, columns] and y [tokens, rows].
  m.def("multiply_at", [](const Matrix& w, const std::string& isa, uintptr_t x, int64_t tokens, uintptr_t y) {
    const wf::Kernels& found = kernels(isa);
    const nb::gil_scoped_release others_may_run;
    wf::multiply(found, {w.shared}, at<const float>(x), tokens, {at<float>(y)});
  });
  m.def("threads", &wf::threads);
  m.def("set_threads", &wf::set_threads, nb::call_guard<nb::gil_scoped_release>());

  m.def("row_bytes", [](int type, int64_t columns) { return wf::row_bytes(static_cast<wf::BlockType>(type), columns); });
  nb::class_<Blocks>(m, "Blocks")
      .def(nb::init<int, Input<uint8_t>, int64_t>())
      .def_prop_ro("nbytes", [](const Blocks& w) { return w.shared->view.bytes(); })
      .def("rows", &Blocks::rows)
      .def("matmul", &Blocks::matmul);

  m.def("rms_norm", [](const std::string& isa, Input<float> x, Input<float> weight, float epsilon) {
    const auto columns = static_cast<int64_t>(x.shape(1));
    auto y = wf::allocate<float>(static_cast<int64_t>(x.size()));
    for (size_t token = 0; token < x.shape(0); ++token) {
      const int64_t at = static_cast<int64_t>(token) * columns;
      wf::float_kernels(kernels(isa).isa).rms_norm(x.data() + at, weight.data(), columns, epsilon, y.get() + at);
    }
    return array(std::move(y), {x.shape(0), x.shape(1)});
  });
  m.def("rope", [](const std::string& isa, Input<float> x, Input<float> cos, Input<float> sin) {
    const auto heads = static_cast<int64_t>(x.shape(1)), dim = static_cast<int64_t>(x.shape(2)), half = static_cast<int64_t>(cos.shape(1));
    auto y = wf::allocate<float>(static_cast<int64_t>(x.size()));
    std::copy_n(x.data(), x.size(), y.get());
    for (int64_t token = 0; token < static_cast<int64_t>(x.shape(0)); ++token) {
      float* of_token = y.get() + token * heads * dim;
      wf::float_kernels(kernels(isa).isa).rope(of_token, cos.data() + token * half, sin.data() + token * half, heads, dim, half);
    }
    return array(std::move(y), {x.shape(0), x.shape(1), x.shape(2)});
  });
  nb::class_<Kv>(m, "Kv")
      .def(nb::init<int, int64_t, int64_t, int64_t>())
      .def_ro("positions", &Kv::positions)
      .def("append", &Kv::append)
      .def("attention", &Kv::attention);

  // timing.py: loops over matrices that no interpreter slows down, and what the processor can do at best. Arrays are checked there.
  m.def("time_kernel", [](const std::vector<const Matrix*>& matrices, const std::string& isa, Input<float> x, int repeats) {
    const wf::Kernels& found = kernels(isa);
    const wf::OwnedActivations q(found, x.data(), static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)));
    int64_t rows = 0;
    for (const Matrix* w : matrices) rows = std::max(rows, w->view().rows);
    const auto y = wf::allocate<float>(q.view.tokens * rows);
    return seconds([&] {
      for (int i = 0; i < repeats; ++i) {
        for (const Matrix* w : matrices) found.matmul(w->view(), q.view, 0, w->view().panels(), y.get(), w->view().rows);
      }
    });
  });
  m.def("time_products", [](const std::vector<const Matrix*>& matrices, const std::string& isa, Input<float> x, int repeats) {
    const wf::Kernels& found = kernels(isa);
    const auto tokens = static_cast<int64_t>(x.shape(0));
    int64_t rows = 0;
    for (const Matrix* w : matrices) rows = std::max(rows, w->view().rows);
    const auto y = wf::allocate<float>(tokens * rows);
    return seconds([&] {
      for (int i = 0; i < repeats; ++i) {
        for (const Matrix* w : matrices) wf::multiply(found, {w->shared}, x.data(), tokens, {y.get()});
      }
    });
  });
  m.def("time_read", [](const std::vector<const Matrix*>& matrices, int repeats) {
    uint64_t read = 0;
    const double taken = seconds([&] {
      for (int i = 0; i < repeats; ++i) {
        for (const Matrix* w : matrices) read |= wf::roofline_read(w->view().codes, w->view().bytes());
      }
    });
    return std::pair(taken, read);  // what was read is of no use, but that it is wanted keeps the loops
  });
  const auto time_operations = [&m](const char* name, int64_t (*roofline)(int64_t)) {
    m.def(name, [roofline](int64_t count) {
      int64_t operations = 0;
      const double taken = seconds([&] { operations = roofline(count); });
      return std::pair(taken, operations);
    });
  };
  time_operations("time_dot", wf::roofline_dot);
  time_operations("time_tiles", wf::roofline_tiles);
  bind_runtime(m);
  bind_low_rank(m);
}
