// Keys and values of the positions that slots hold.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "ternary/floats.h"
#include "ternary/memory.h"

namespace wf {

struct CacheShape {
  int64_t slots, layers, heads, context, head_width;
};

// For each slot and layer the keys, then the values: [heads, context, head_width]. The memory is there from the start, but takes none
// until it is written to.
class Cache {
 public:
  Cache(KvType type, const CacheShape& shape) : type_(type), shape_(shape), vector_bytes_(shape.head_width * bytes_of(type)) {
    int64_t vectors, numbers;
    if (__builtin_mul_overflow(shape.slots * shape.layers * 2, shape.heads * shape.context, &vectors) ||
        __builtin_mul_overflow(vectors, vector_bytes_, &numbers)) {
      throw std::bad_alloc();
    }
    data_ = zeros<uint8_t>(numbers);
    if (type == KvType::int8) scales_ = zeros<float>(vectors * static_cast<int64_t>(sizeof(float)));
  }

  const CacheShape& shape() const { return shape_; }

  // Keeps the keys and values of all heads, [heads, head_width] each, of a position.
  void write(const FloatKernels& kernels, int64_t slot, int64_t layer, int64_t position, const float* key, const float* value) {
    const KvCache cache = view(slot, layer);
    for (int64_t head = 0; head < shape_.heads; ++head, key += shape_.head_width, value += shape_.head_width) {
      kernels.store(cache, head, position, key, value);
    }
  }

  KvCache view(int64_t slot, int64_t layer) const {
    const int64_t rows = shape_.heads * shape_.context, first = (slot * shape_.layers + layer) * 2 * rows;
    uint8_t* keys = data_.get() + first * vector_bytes_;
    float* scales = type_ == KvType::int8 ? scales_.get() + first : nullptr;
    return {type_, shape_.heads, shape_.context, shape_.head_width, keys, keys + rows * vector_bytes_, scales,
            scales == nullptr ? nullptr : scales + rows};
  }

  // Gives slot `to` the first positions of slot `from`.
  void copy(int64_t from, int64_t to, int64_t positions) {
    for (int64_t plane = 0; plane < shape_.layers * 2 * shape_.heads; ++plane) {
      const int64_t planes = shape_.layers * 2 * shape_.heads;
      const int64_t source = (from * planes + plane) * shape_.context, target = (to * planes + plane) * shape_.context;
      std::memcpy(data_.get() + target * vector_bytes_, data_.get() + source * vector_bytes_, static_cast<size_t>(positions * vector_bytes_));
      if (scales_ != nullptr) std::copy_n(scales_.get() + source, positions, scales_.get() + target);
    }
  }

 private:
  template <typename T>
  static Buffer<T> zeros(int64_t bytes) {
    Buffer<T> made(static_cast<T*>(std::calloc(static_cast<size_t>(std::max<int64_t>(bytes, 1)), 1)));
    if (made == nullptr) throw std::bad_alloc();
    return made;
  }

  KvType type_;
  CacheShape shape_;
  int64_t vector_bytes_;
  Buffer<uint8_t> data_;
  Buffer<float> scales_;
};

}  // namespace wf
