// Memory aligned to a cache line, which is also a block of weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace wf {

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

template <typename T>
Buffer<T> allocate(int64_t count) {
  const auto bytes = static_cast<size_t>((std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64);
  void* pointer = std::aligned_alloc(64, bytes);
  if (pointer == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(pointer));
}

}  // namespace wf
