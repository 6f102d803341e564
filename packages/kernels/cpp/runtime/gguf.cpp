#include "runtime/gguf.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

namespace wf {
namespace {

constexpr uint64_t kMostItems = 1 << 24;
constexpr uint32_t kMostDimensions = 4;
constexpr uint64_t kMostName = 4096;
constexpr int64_t kAlignmentStep = 8;  // GGUF's specification: a multiple of it; and what no number here is wider than
constexpr int64_t kMostAlignment = 4096;
constexpr uint64_t kLargest = std::numeric_limits<int64_t>::max();

enum Item : uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

// Bytes an item takes; 0 for strings, arrays and unknown types.
uint64_t item_bytes(uint32_t type) {
  constexpr uint64_t kBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return type < std::size(kBytes) ? kBytes[type] : 0;
}

Error bad(const std::string& why) { return {Kind::file, "the file is not a usable GGUF file (" + why + "): export or download it again"}; }

// Reads from the front of the bytes that are left. After the first failure everything fails.
class Cursor {
 public:
  explicit Cursor(Bytes data) : data_(data) {}

  uint64_t at() const { return at_; }
  uint64_t left() const { return data_.size() - at_; }

  std::optional<Bytes> take(uint64_t count) {
    if (count > left()) return std::nullopt;
    const Bytes taken = data_.subspan(at_, count);
    at_ += count;
    return taken;
  }

  template <typename T>
  std::optional<T> number() {
    const auto bytes = take(sizeof(T));
    if (!bytes) return std::nullopt;
    T value;
    std::memcpy(&value, bytes->data(), sizeof(T));
    return value;
  }

  std::optional<std::string_view> text() {
    const auto length = number<uint64_t>();
    if (!length) return std::nullopt;
    const auto bytes = take(*length);
    if (!bytes) return std::nullopt;
    return std::string_view(reinterpret_cast<const char*>(bytes->data()), bytes->size());
  }

 private:
  Bytes data_;
  uint64_t at_ = 0;
};

// GGUF's specification: keys are ASCII.
bool plain(std::string_view name) {
  return std::all_of(name.begin(), name.end(), [](char c) { return c >= ' ' && c <= '~'; });
}

const Error kTooShort = bad("it ends too early");

template <typename T>
Result<Value> widened(Cursor& cursor) {
  const auto value = cursor.number<T>();
  if (!value) return kTooShort;
  if constexpr (std::is_floating_point_v<T>) {
    return Value(static_cast<double>(*value));
  } else if constexpr (std::is_same_v<T, uint64_t>) {
    return *value <= kLargest ? Value(static_cast<int64_t>(*value)) : Value(*value);
  } else {
    return Value(static_cast<int64_t>(*value));
  }
}

Result<Value> read_array(Cursor& cursor) {
  const auto type = cursor.number<uint32_t>();
  const auto count = cursor.number<uint64_t>();
  if (!type || !count) return kTooShort;
  if (*count > kMostItems) return bad("it claims an array of " + std::to_string(*count) + " items");
  if (*type == string) {
    Cursor items = cursor;
    for (uint64_t i = 0; i < *count; ++i) {
      if (!items.text()) return kTooShort;
    }
    return Value(Array{*type, *count, *cursor.take(items.at() - cursor.at())});
  }
  const uint64_t size = item_bytes(*type);
  if (size == 0) return bad("it has an array of items of type " + std::to_string(*type));
  const auto data = cursor.take(*count * size);  // at most 2^27
  if (!data) return kTooShort;
  return Value(Array{*type, *count, *data});
}

Result<Value> read_value(Cursor& cursor, uint32_t type) {
  switch (type) {
    case u8:
      return widened<uint8_t>(cursor);
    case i8:
      return widened<int8_t>(cursor);
    case u16:
      return widened<uint16_t>(cursor);
    case i16:
      return widened<int16_t>(cursor);
    case u32:
      return widened<uint32_t>(cursor);
    case i32:
      return widened<int32_t>(cursor);
    case u64:
      return widened<uint64_t>(cursor);
    case i64:
      return widened<int64_t>(cursor);
    case f32:
      return widened<float>(cursor);
    case f64:
      return widened<double>(cursor);
    case boolean: {
      const auto value = cursor.number<uint8_t>();
      if (!value) return kTooShort;
      return Value(*value != 0);
    }
    case string: {
      const auto value = cursor.text();
      if (!value) return kTooShort;
      return Value(*value);
    }
    case array:
      return read_array(cursor);
    default:
      return bad("unknown value type " + std::to_string(type));
  }
}

// How many bytes a tensor takes, none where its type cannot have such rows or a number overflows.
std::optional<uint64_t> tensor_bytes(Type type, const std::vector<int64_t>& shape) {
  const TypeSize* size = size_of(type);
  if (size == nullptr || shape.back() % size->block != 0) return std::nullopt;
  int64_t blocks = shape.back() / size->block;
  for (size_t i = 0; i + 1 < shape.size(); ++i) {
    if (__builtin_mul_overflow(blocks, shape[i], &blocks)) return std::nullopt;
  }
  // The number of weights has to fit, too.
  int64_t bytes, elements;
  if (__builtin_mul_overflow(blocks, size->block, &elements) || __builtin_mul_overflow(blocks, size->bytes, &bytes)) return std::nullopt;
  if (type == Type::i2_s && __builtin_add_overflow(bytes, kI2sTail, &bytes)) return std::nullopt;
  return static_cast<uint64_t>(bytes);
}

struct Place {
  uint64_t offset, bytes;
};

// Reads one entry of the list of tensors; its data is not known before the list has ended.
Result<std::pair<std::string_view, std::pair<Tensor, Place>>> read_tensor(Cursor& cursor, uint64_t file_size) {
  const auto name = cursor.text();
  const auto dimensions = cursor.number<uint32_t>();
  if (!name || !dimensions) return kTooShort;
  const std::string which = "tensor '" + quoted(*name) + "'";
  if (!plain(*name)) return bad(which + " has a name that is not plain ASCII");
  if (name->size() > kMostName) return bad(which + " has a name of " + std::to_string(name->size()) + " bytes");
  if (*dimensions < 1 || *dimensions > kMostDimensions) return bad(which + " has " + std::to_string(*dimensions) + " dimensions");
  std::vector<int64_t> shape(*dimensions);
  for (auto place = shape.rbegin(); place != shape.rend(); ++place) {
    const auto size = cursor.number<uint64_t>();
    if (!size) return kTooShort;
    if (*size < 1 || *size > kLargest) return bad(which + " has a dimension of " + std::to_string(*size));
    *place = static_cast<int64_t>(*size);
  }
  const auto type = cursor.number<uint32_t>();
  const auto offset = cursor.number<uint64_t>();
  if (!type || !offset) return kTooShort;
  const auto bytes = tensor_bytes(static_cast<Type>(*type), shape);
  if (!bytes) return bad(which + " has type " + std::to_string(*type) + " and rows of " + std::to_string(shape.back()));
  if (*bytes > file_size) return bad(which + " is larger than the file");
  return std::pair{*name, std::pair{Tensor{std::move(shape), static_cast<Type>(*type), {}}, Place{*offset, *bytes}}};
}

}  // namespace

const TypeSize* size_of(Type type) {
  static constexpr std::pair<Type, TypeSize> kSizes[] = {
      {Type::f32, {1, 4}},       {Type::f16, {1, 2}},       {Type::q4_1, {32, 20}},    {Type::q8_0, {32, 34}},   {Type::q6_k, {256, 210}},
      {Type::bf16, {1, 2}},      {Type::tq1_0, {256, 54}},  {Type::tq2_0, {256, 66}},  {Type::i2_s, {128, 32}},  {Type::q2_0, {64, 18}},
  };
  const auto* found = std::find_if(std::begin(kSizes), std::end(kSizes), [=](const auto& entry) { return entry.first == type; });
  return found == std::end(kSizes) ? nullptr : &found->second;
}

int64_t Tensor::elements() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;  // was seen to fit
  return count;
}

Result<Gguf> Gguf::parse(Bytes data) {
  Cursor cursor(data);
  const auto magic = cursor.number<uint32_t>();
  const auto version = cursor.number<uint32_t>();
  if (!magic || !version || *magic != 0x46554747 || *version != 3) return bad("it is no GGUF version 3");
  const auto tensor_count = cursor.number<uint64_t>();
  const auto key_count = cursor.number<uint64_t>();
  if (!tensor_count || !key_count) return kTooShort;

  Gguf file;
  for (uint64_t i = 0; i < *key_count; ++i) {
    const auto key = cursor.text();
    const auto type = cursor.number<uint32_t>();
    if (!key || !type) return kTooShort;
    if (!plain(*key)) return bad("the key '" + quoted(*key) + "' is not plain ASCII");
    auto value = read_value(cursor, *type);
    if (!value) return value.error();
    // Readers differ in which one they believe.
    if (!file.values_.emplace(*key, *value).second) return bad("it has the key '" + quoted(*key) + "' twice");
  }

  std::vector<std::pair<Tensor*, Place>> places;
  for (uint64_t i = 0; i < *tensor_count; ++i) {
    auto entry = read_tensor(cursor, data.size());
    if (!entry) return entry.error();
    auto& [name, described] = *entry;
    const auto [place, fresh] = file.tensors_.emplace(name, std::move(described.first));
    if (!fresh) return bad("tensor '" + quoted(name) + "' is repeated");
    places.emplace_back(&place->second, described.second);
  }

  int64_t alignment = 32;
  if (const Value* value = file.value("general.alignment")) {
    const auto* number = std::get_if<int64_t>(value);
    alignment = number == nullptr ? 0 : *number;
    if (alignment < 1 || alignment > kMostAlignment || alignment % kAlignmentStep != 0) {
      return bad("its alignment is no multiple of 8 from 8 to " + std::to_string(kMostAlignment));
    }
  }
  const auto step = static_cast<uint64_t>(alignment);
  const uint64_t start = (cursor.at() + step - 1) / step * step;
  for (const auto& [tensor, place] : places) {
    if (place.offset % step != 0) return bad("a tensor's offset is no multiple of its alignment");
    if (start > data.size() || place.offset > data.size() - start || place.bytes > data.size() - start - place.offset) {
      return bad("a tensor lies outside the file");
    }
    tensor->data = data.subspan(start + place.offset, place.bytes);
  }
  // Otherwise a small file could describe a model of any size.
  std::sort(places.begin(), places.end(), [](const auto& a, const auto& b) { return a.second.offset < b.second.offset; });
  for (size_t i = 1; i < places.size(); ++i) {
    const Place &before = places[i - 1].second, &place = places[i].second;
    if (place.offset - before.offset < before.bytes) return bad("two tensors share bytes");
  }
  return file;
}

const Tensor* Gguf::tensor(std::string_view name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

const Value* Gguf::value(std::string_view key) const {
  const auto found = values_.find(key);
  return found == values_.end() ? nullptr : &found->second;
}

std::vector<bool> booleans(const Array& array) {
  std::vector<bool> found;
  if (array.type != boolean) return found;
  for (const std::byte item : array.data) found.push_back(item != std::byte{0});
  return found;
}

Result<std::shared_ptr<const MappedFile>> MappedFile::open(const std::string& path) {
  const auto fail = [&](const char* why) { return Error{Kind::file, path + " cannot be read (" + why + ")"}; };
  const std::shared_ptr<MappedFile> made(new MappedFile(nullptr, 0));  // before there is anything that could leak
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return fail(std::strerror(errno));
  struct stat about = {};
  const bool known = fstat(file, &about) == 0;
  if (!known || !S_ISREG(about.st_mode) || about.st_size <= 0) {
    ::close(file);
    return fail(known && S_ISREG(about.st_mode) ? "it is empty" : "it is no file");
  }
  const auto size = static_cast<size_t>(about.st_size);
  void* address = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
  const int failure = errno;
  ::close(file);
  if (address == MAP_FAILED && failure == ENOMEM) throw std::bad_alloc();
  if (address == MAP_FAILED) return fail(std::strerror(failure));
  made->address_ = address;
  made->size_ = size;
  return std::shared_ptr<const MappedFile>(made);
}

void MappedFile::forget() const { madvise(address_, size_, MADV_DONTNEED); }

MappedFile::~MappedFile() {
  if (address_ != nullptr) munmap(address_, size_);
}

std::string quoted(std::string_view text) {
  std::string shown(text.substr(0, 60));
  std::replace_if(shown.begin(), shown.end(), [](char c) { return c < ' ' || c > '~' || c == '\''; }, '?');
  return shown;
}

}  // namespace wf
