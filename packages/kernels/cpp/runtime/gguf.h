// A GGUF version 3 reader that trusts nothing in the file.
//
// Every count, length, dimension, type and offset is checked before it is used, sums and products of them against overflow. What a
// file claims costs no memory that its own size does not bound. Whatever this reader accepts, `bitnet_arch.gguf.reader` accepts, too;
// it knows more types, which no decoder here could use, and names that are not plain ASCII, which the format forbids.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "runtime/result.h"

namespace wf {

static_assert(std::endian::native == std::endian::little, "GGUF is read on little-endian processors");

using Bytes = std::span<const std::byte>;

// What a tensor's numbers are stored as, by ggml's number.
enum class Type : uint32_t {
  f32 = 0,
  f16 = 1,
  q4_1 = 3,
  q8_0 = 8,
  q6_k = 14,
  bf16 = 30,
  tq1_0 = 34,
  tq2_0 = 35,
  i2_s = 36,
  q2_0 = 42,
};

struct TypeSize {
  int64_t block, bytes;  // weights a block, bytes a block; of I2_S a tensor has kI2sTail more
};
constexpr int64_t kI2sTail = 32;
// Null for a number that is no type of ours.
const TypeSize* size_of(Type type);

struct Tensor {
  std::vector<int64_t> shape;  // row-major, each at least 1
  Type type;
  Bytes data;

  int64_t columns() const { return shape.back(); }
  int64_t elements() const;
  int64_t rows() const { return elements() / columns(); }
};

// An array stays in the file: its items are read when somebody asks.
struct Array {
  uint32_t type;  // GGUF's number of the items' type
  uint64_t count;
  Bytes data;  // all items; strings with their lengths
};

// Integers of every width become int64_t, or uint64_t where they are larger; floats become double.
using Value = std::variant<int64_t, uint64_t, double, bool, std::string_view, Array>;

class Gguf {
 public:
  // Parses a file's bytes, which must outlive the result.
  static Result<Gguf> parse(Bytes data);

  // Null where there is none.
  const Tensor* tensor(std::string_view name) const;
  const Value* value(std::string_view key) const;

  const std::map<std::string_view, Tensor>& tensors() const { return tensors_; }
  const std::map<std::string_view, Value>& values() const { return values_; }

 private:
  std::map<std::string_view, Tensor> tensors_;
  std::map<std::string_view, Value> values_;
};

// The items of an array of booleans, empty for any other.
std::vector<bool> booleans(const Array& array);

// A file mapped into memory, read only. A file that becomes shorter while it is mapped ends the process (SIGBUS), as everywhere.
class MappedFile {
 public:
  static Result<std::shared_ptr<const MappedFile>> open(const std::string& path);
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  // Lets the process drop the pages that it has read; they come back from the file when somebody reads them.
  void forget() const;

  Bytes bytes() const { return {static_cast<const std::byte*>(address_), size_}; }

 private:
  MappedFile(void* address, size_t size) : address_(address), size_(size) {}
  void* address_;
  size_t size_;
};

// Text of a file in a message: at most 60 characters, and a question mark for what is not printable.
std::string quoted(std::string_view text);

}  // namespace wf
