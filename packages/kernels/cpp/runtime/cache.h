// Keys and values of the positions that slots hold.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "runtime/numbers.h"
#include "ternary/memory.h"

namespace wf {

enum class CacheType : int { f32, f16 };  // of each number; f32 is exactly what training computes with

// For each slot and layer, rows of `width` numbers (all heads' keys or values of one position), `context` of them. The memory is there
// from the start, but takes none until it is written to.
class Cache {
 public:
  Cache(CacheType type, int64_t slots, int64_t layers, int64_t context, int64_t width)
      : type_(type), layers_(layers), context_(context), width_(width) {
    const int64_t bytes = type == CacheType::f32 ? 4 : 2;
    int64_t count;
    if (__builtin_mul_overflow(slots * layers, context, &count) || __builtin_mul_overflow(count, 2 * width * bytes, &count)) {
      throw std::bad_alloc();
    }
    data_.reset(static_cast<uint8_t*>(std::calloc(static_cast<size_t>(count), 1)));
    if (data_ == nullptr) throw std::bad_alloc();
  }

  enum Part : int { keys, values };

  void write(int64_t slot, int64_t layer, Part part, int64_t position, const float* row) {
    const int64_t at = place(slot, layer, part, position);
    if (type_ == CacheType::f32) {
      std::copy_n(row, width_, reinterpret_cast<float*>(data_.get()) + at);
    } else {
      for (int64_t i = 0; i < width_; ++i) reinterpret_cast<uint16_t*>(data_.get())[at + i] = float_to_half(row[i]);
    }
  }

  // The numbers [first, first + count) of a row, in `scratch` unless they are float32 already.
  const float* read(int64_t slot, int64_t layer, Part part, int64_t position, int64_t first, int64_t count, float* scratch) const {
    const int64_t at = place(slot, layer, part, position) + first;
    if (type_ == CacheType::f32) return reinterpret_cast<const float*>(data_.get()) + at;
    for (int64_t i = 0; i < count; ++i) scratch[i] = half_to_float(reinterpret_cast<const uint16_t*>(data_.get())[at + i]);
    return scratch;
  }

  // Gives slot `to` the first positions of slot `from`.
  void copy(int64_t from, int64_t to, int64_t positions) {
    const int64_t size = type_ == CacheType::f32 ? 4 : 2;
    for (int64_t layer = 0; layer < layers_; ++layer) {
      for (const Part part : {keys, values}) {
        std::copy_n(data_.get() + place(from, layer, part, 0) * size, positions * width_ * size,
                    data_.get() + place(to, layer, part, 0) * size);
      }
    }
  }

 private:
  int64_t place(int64_t slot, int64_t layer, Part part, int64_t position) const {
    return (((slot * layers_ + layer) * 2 + part) * context_ + position) * width_;
  }

  CacheType type_;
  int64_t layers_, context_, width_;
  Buffer<uint8_t> data_;
};

}  // namespace wf
