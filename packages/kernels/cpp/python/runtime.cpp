// The Python side of the decoder runtime.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/gguf.h"
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

}  // namespace

void bind_runtime(nb::module_& m) {
  nb::class_<File>(m, "Gguf")
      .def(nb::init<nb::bytes>())
      .def("tensors", &File::tensors)
      .def("values", &File::values)
      .def("floats", &File::floats);
}
