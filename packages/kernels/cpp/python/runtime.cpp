// The Python side of the decoder runtime.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "capi/wf_engine.h"
#include "runtime/gguf.h"
#include "runtime/keys.h"
#include "runtime/numbers.h"
#include "ternary/memory.h"

namespace nb = nanobind;

namespace {

// A parsed file, for the tests that compare this reader with another one.
class File {
 public:
  explicit File(nb::bytes data) : data_(std::move(data)), parsed_(parse(data_)) {}

  nb::dict tensors() const {
    nb::dict shapes;
    for (const auto& [name, tensor] : parsed_.tensors()) shapes[key(name)] = tensor.shape;
    return shapes;
  }

  // Arrays are given by their number of items.
  nb::dict values() const {
    nb::dict found;
    for (const auto& [name, value] : parsed_.values()) {
      found[key(name)] = std::visit(
          [](const auto& held) -> nb::object {
            using T = std::decay_t<decltype(held)>;
            if constexpr (std::is_same_v<T, std::string_view>) {
              return nb::bytes(held.data(), held.size());
            } else if constexpr (std::is_same_v<T, wf::Array>) {
              return nb::int_(held.count);
            } else {
              return nb::cast(held);
            }
          },
          value);
    }
    return found;
  }

  nb::ndarray<nb::numpy, float> floats(const std::string& name) const {
    const wf::Tensor* tensor = parsed_.tensor(name);
    if (tensor == nullptr) throw std::invalid_argument("the file has no tensor '" + name + "'");
    auto values = wf::allocate<float>(tensor->elements());
    for (int64_t row = 0; row < tensor->rows(); ++row) wf::float_row(*tensor, row, values.get() + row * tensor->columns());
    float* pointer = values.release();
    nb::capsule owner(pointer, [](void* p) noexcept { std::free(p); });
    const std::vector<size_t> shape(tensor->shape.begin(), tensor->shape.end());
    return nb::ndarray<nb::numpy, float>(pointer, shape.size(), shape.data(), owner);
  }

 private:
  static wf::Gguf parse(const nb::bytes& data) {
    auto parsed = wf::Gguf::parse({static_cast<const std::byte*>(data.data()), data.size()});
    if (!parsed) throw std::invalid_argument(parsed.error().text);
    return std::move(*parsed);
  }
  static nb::object key(std::string_view name) {
    return nb::steal(PyUnicode_DecodeUTF8(name.data(), static_cast<Py_ssize_t>(name.size()), "replace"));
  }

  nb::bytes data_;
  wf::Gguf parsed_;
};

void check(wf_status status) {
  if (status == WF_OK) return;
  PyObject* type = status == WF_NO_MEMORY   ? PyExc_MemoryError
                   : status == WF_INTERNAL  ? PyExc_RuntimeError
                   : status == WF_CANCELLED ? PyExc_InterruptedError
                                            : PyExc_ValueError;
  // Paths are bytes, which need not be UTF-8: as os.fsdecode shows them.
  const char* text = wf_error_text();
  const nb::object shown = nb::steal(PyUnicode_DecodeUTF8(text, static_cast<Py_ssize_t>(std::strlen(text)), "surrogateescape"));
  PyErr_SetObject(type, shown.ptr());
  throw nb::python_error();
}

using Array2 = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

Array2 matrix(wf::Buffer<float> data, int64_t rows, int64_t columns) {
  float* pointer = data.release();
  nb::capsule owner(pointer, [](void* p) noexcept { std::free(p); });
  return Array2(pointer, {static_cast<size_t>(rows), static_cast<size_t>(columns)}, owner);
}

// One call at a time: a step lets other threads run, and what it works on is nobody else's meanwhile.
class Turn {
 public:
  explicit Turn(std::atomic<bool>& busy) : busy_(busy) {
    if (busy_.exchange(true)) throw std::invalid_argument("the engine runs a step in another thread: use one engine a thread");
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  ~Turn() { busy_.store(false); }

 private:
  std::atomic<bool>& busy_;
};

// An engine over the C API, so that what Python tests is what others link.
class Engine {
 public:
  Engine(const nb::bytes& path, int64_t slots, int64_t context, int cache, const std::string& isa) {
    const wf_options options{slots, context, cache, isa.c_str()};
    wf_status status;
    {
      const nb::gil_scoped_release others_may_run;
      status = wf_open(path.c_str(), &options, &engine_);
    }
    check(status);
    check(wf_about(engine_, &info_));
  }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  ~Engine() { wf_close(engine_); }

  nb::dict about() const {
    nb::dict found;
    found["architecture"] = info_.architecture;
    found["layers"] = info_.layers;
    found["width"] = info_.width;
    found["vocabulary"] = info_.vocabulary;
    found["slots"] = info_.slots;
    found["context"] = info_.context;
    found["mask_token"] = info_.mask_token;
    found["block_size"] = info_.block_size;
    found["token_shift"] = info_.token_shift != 0;
    return found;
  }

  // Returns logits (0), what the head reads (1), or logarithms of probabilities (2).
  Array2 step(const std::vector<std::pair<int64_t, std::vector<int32_t>>>& sequences, int rows, bool bidirectional, int output) {
    const bool hidden = output == 1;
    std::vector<wf_sequence> wanted;
    int64_t count = 0;
    for (const auto& [slot, tokens] : sequences) {
      wanted.push_back({slot, tokens.data(), static_cast<int64_t>(tokens.size()), bidirectional ? 1 : 0});
      count += rows == WF_ROWS_ALL ? wanted.back().count : rows == WF_ROWS_LAST ? 1 : 0;
    }
    const int64_t width = hidden ? info_.width : info_.vocabulary;
    auto results = wf::allocate<float>(count * width);
    const Turn turn(busy_);
    wf_status status;
    {
      const nb::gil_scoped_release others_may_run;
      float *logits = hidden ? nullptr : results.get(), *states = hidden ? results.get() : nullptr;
      status = wf_step(engine_, wanted.data(), static_cast<int64_t>(wanted.size()), rows, logits, states);
      if (status == WF_OK && output == 2) status = wf_log_probabilities(logits, count, width);
    }
    check(status);
    return matrix(std::move(results), count, width);
  }

  int64_t length(int64_t slot) const {
    const Turn turn(busy_);
    int64_t found = 0;
    check(wf_length(engine_, slot, &found));
    return found;
  }
  void truncate(int64_t slot, int64_t length) {
    const Turn turn(busy_);
    check(wf_truncate(engine_, slot, length));
  }
  void copy(int64_t from, int64_t to, int64_t length) {
    const Turn turn(busy_);
    check(wf_copy(engine_, from, to, length));
  }
  void cancel() { wf_cancel(engine_); }
  nb::tuple statistics() const {
    const Turn turn(busy_);
    wf_stats stats;
    check(wf_statistics(engine_, &stats));
    return nb::make_tuple(stats.steps, stats.tokens, stats.nanoseconds);
  }

 private:
  wf_engine* engine_ = nullptr;
  wf_info info_{};
  mutable std::atomic<bool> busy_{false};
};

int64_t sample(nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu> logits, float temperature, int64_t top_k, float top_p,
               uint64_t seed, uint64_t index) {
  const wf_sampler sampler{temperature, top_k, top_p, seed};
  int64_t token = 0;
  check(wf_sample(logits.data(), static_cast<int64_t>(logits.size()), &sampler, index, &token));
  return token;
}

}  // namespace

void bind_runtime(nb::module_& m) {
  nb::class_<File>(m, "Gguf")
      .def(nb::init<nb::bytes>())
      .def("tensors", &File::tensors)
      .def("values", &File::values)
      .def("floats", &File::floats);
  nb::class_<Engine>(m, "Engine")
      .def(nb::init<nb::bytes, int64_t, int64_t, int, std::string>())
      .def("about", &Engine::about)
      .def("step", &Engine::step)
      .def("length", &Engine::length)
      .def("truncate", &Engine::truncate)
      .def("copy", &Engine::copy)
      .def("cancel", &Engine::cancel)
      .def("statistics", &Engine::statistics);
  m.def("sample", &sample);
  m.def("uncomputed_keys", [] {
    nb::dict found;
    for (const auto& [key, harmless] : wf::uncomputed_keys()) found[key] = nb::tuple(nb::cast(harmless));
    return found;
  });
}
