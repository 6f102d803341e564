#include "runtime/numbers.h"

#include <atomic>
#include <bit>
#include <cstring>
#include <vector>

#include "ternary/half.h"
#include "ternary/parallel.h"

namespace wf {
namespace {

constexpr int64_t kPiece = 1 << 20;  // bytes that a thread looks through before it asks for more

template <typename T>
T load(const uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(T));
  return value;
}

float half_at(const uint8_t* bytes) { return half_to_float(load<uint16_t>(bytes)); }

const uint8_t* row_bytes(const Tensor& tensor, int64_t row) {
  const TypeSize& size = *size_of(tensor.type);
  return reinterpret_cast<const uint8_t*>(tensor.data.data()) + row * (tensor.columns() / size.block * size.bytes);
}

// Layouts are ggml's; `bitnet_arch.gguf.types` and `.floats` describe and write them.

void q4_1_block(const uint8_t* block, float* out) {
  const float scale = half_at(block), minimum = half_at(block + 2);
  for (int j = 0; j < 16; ++j) {
    out[j] = static_cast<float>(block[4 + j] & 15) * scale + minimum;
    out[j + 16] = static_cast<float>(block[4 + j] >> 4) * scale + minimum;
  }
}

void q8_0_block(const uint8_t* block, float* out) {
  const float scale = half_at(block);
  for (int j = 0; j < 32; ++j) out[j] = static_cast<float>(static_cast<int8_t>(block[2 + j])) * scale;
}

void q6_k_block(const uint8_t* block, float* out) {
  const uint8_t *low = block, *high = block + 128, *scales = block + 192;
  const float whole = half_at(block + 208);
  for (int half = 0; half < 2; ++half) {
    for (int part = 0; part < 4; ++part) {
      for (int j = 0; j < 32; ++j) {
        const int nibble = low[64 * half + 32 * (part & 1) + j] >> (part < 2 ? 0 : 4) & 15;
        const int code = (nibble | (high[32 * half + j] >> 2 * part & 3) << 4) - 32;
        const int index = 128 * half + 32 * part + j;
        out[index] = whole * static_cast<float>(static_cast<int8_t>(scales[index / 16])) * static_cast<float>(code);
      }
    }
  }
}

void tq1_0_codes(const uint8_t* block, uint8_t* out) {
  constexpr uint8_t kPowers[] = {1, 3, 9, 27, 81};
  constexpr int kParts[][2] = {{5, 32}, {5, 16}, {4, 4}};  // trits a byte, bytes
  for (const auto& [digits, count] : kParts) {
    for (int digit = 0; digit < digits; ++digit) {
      for (int j = 0; j < count; ++j) {
        const auto shifted = static_cast<uint8_t>(block[j] * kPowers[digit]);
        *out++ = static_cast<uint8_t>(shifted * 3 >> 8);
      }
    }
    block += count;
  }
}

void tq2_0_codes(const uint8_t* block, uint8_t* out) {
  for (int half = 0; half < 2; ++half) {
    for (int plane = 0; plane < 4; ++plane) {
      for (int j = 0; j < 32; ++j) *out++ = block[32 * half + j] >> 2 * plane & 3;
    }
  }
}

void q2_0_codes(const uint8_t* block, uint8_t* out) {
  for (int j = 0; j < 64; ++j) out[j] = block[j / 4] >> 2 * (j % 4) & 3;
}

void i2_s_codes(const uint8_t* block, uint8_t* out) {
  for (int plane = 0; plane < 4; ++plane) {
    for (int j = 0; j < 32; ++j) *out++ = block[j] >> (6 - 2 * plane) & 3;
  }
}

}  // namespace

bool is_ternary(Type type) { return type == Type::tq1_0 || type == Type::tq2_0 || type == Type::i2_s || type == Type::q2_0; }

void float_row(const Tensor& tensor, int64_t row, float* out) {
  const uint8_t* bytes = row_bytes(tensor, row);
  const int64_t columns = tensor.columns();
  switch (tensor.type) {
    case Type::f32:
      std::memcpy(out, bytes, static_cast<size_t>(columns) * sizeof(float));
      return;
    case Type::f16:
      for (int64_t i = 0; i < columns; ++i) out[i] = half_at(bytes + 2 * i);
      return;
    case Type::bf16:
      for (int64_t i = 0; i < columns; ++i) out[i] = std::bit_cast<float>(static_cast<uint32_t>(load<uint16_t>(bytes + 2 * i)) << 16);
      return;
    case Type::q4_1:
      for (int64_t i = 0; i < columns; i += 32, bytes += 20) q4_1_block(bytes, out + i);
      return;
    case Type::q8_0:
      for (int64_t i = 0; i < columns; i += 32, bytes += 34) q8_0_block(bytes, out + i);
      return;
    case Type::q6_k:
      for (int64_t i = 0; i < columns; i += 256, bytes += 210) q6_k_block(bytes, out + i);
      return;
    default:
      break;
  }
  const int64_t block = size_of(tensor.type)->block;
  std::vector<uint8_t> codes(static_cast<size_t>(columns));
  std::vector<float> scales(static_cast<size_t>(columns / block));
  ternary_row(tensor, row, codes.data(), scales.data());
  for (int64_t i = 0; i < columns; ++i) {
    const float scale = scales[static_cast<size_t>(tensor.type == Type::i2_s ? 0 : i / block)];
    out[i] = static_cast<float>(codes[static_cast<size_t>(i)] - 1) * scale;
  }
}

void ternary_row(const Tensor& tensor, int64_t row, uint8_t* codes, float* scales) {
  const uint8_t* bytes = row_bytes(tensor, row);
  const int64_t columns = tensor.columns();
  switch (tensor.type) {
    case Type::tq1_0:
      for (int64_t i = 0; i < columns; i += 256, bytes += 54) tq1_0_codes(bytes, codes + i), *scales++ = half_at(bytes + 52);
      return;
    case Type::tq2_0:
      for (int64_t i = 0; i < columns; i += 256, bytes += 66) tq2_0_codes(bytes, codes + i), *scales++ = half_at(bytes + 64);
      return;
    case Type::q2_0:
      for (int64_t i = 0; i < columns; i += 64, bytes += 18) q2_0_codes(bytes + 2, codes + i), *scales++ = half_at(bytes);
      return;
    case Type::i2_s:
      for (int64_t i = 0; i < columns; i += 128, bytes += 32) i2_s_codes(bytes, codes + i);
      *scales = load<float>(reinterpret_cast<const uint8_t*>(tensor.data.data()) + tensor.data.size() - kI2sTail);
      return;
    default:
      return;
  }
}

bool all_finite(const Tensor& tensor) {
  const auto* data = reinterpret_cast<const uint8_t*>(tensor.data.data());
  const auto size = static_cast<int64_t>(tensor.data.size());
  // Numbers of two bytes, `step` apart, whose exponent has all bits of `mask` set.
  const auto none = [=](int64_t first, int64_t step, uint16_t mask) {
    std::atomic<bool> found{false};
    in_pieces(size / step, kPiece / step, [&](int64_t begin, int64_t end) {
      bool here = false;
      for (int64_t i = begin; i < end; ++i) here |= (load<uint16_t>(data + first + i * step) & mask) == mask;
      if (here) found.store(true);
    });
    return !found.load();
  };
  constexpr uint16_t kHalf = 0x7c00, kBrain = 0x7f80;  // the latter also of a float's upper half
  switch (tensor.type) {
    case Type::f32:
      return none(2, 4, kBrain);
    case Type::bf16:
      return none(0, 2, kBrain);
    case Type::f16:
      return none(0, 2, kHalf);
    case Type::q4_1:
      return none(0, 20, kHalf) && none(2, 20, kHalf);
    case Type::q8_0:
      return none(0, 34, kHalf);
    case Type::q6_k:
      return none(208, 210, kHalf);
    default:
      return false;
  }
}

}  // namespace wf
