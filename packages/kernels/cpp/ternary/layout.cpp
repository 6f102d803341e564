#include <cstring>

#include "ternary/ternary.h"

namespace wf {
namespace {

constexpr uint8_t kZero = 0x55;  // four codes of zero

struct Place {
  int64_t byte;
  int shift;
};

Place place_of(int64_t row, int64_t column, int64_t blocks) {
  const int64_t block = row / kPanelRows * blocks + column / kBlockColumns;
  const int64_t inside = column % kBlockColumns;
  return {block * kBlockBytes + row % kPanelRows * 4 + inside % 4, static_cast<int>(inside / 4 * 2)};
}

}  // namespace

bool pack(const int8_t* weights, int64_t rows, int64_t columns, uint8_t* out) {
  const int64_t blocks = ceil_div(columns, kBlockColumns);
  std::memset(out, kZero, static_cast<size_t>(ceil_div(rows, kPanelRows) * blocks * kBlockBytes));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int8_t weight = weights[row * columns + column];
      if (weight < -1 || weight > 1) return false;
      const auto [byte, shift] = place_of(row, column, blocks);
      out[byte] = static_cast<uint8_t>((out[byte] & ~(3 << shift)) | (weight + 1) << shift);
    }
  }
  return true;
}

void unpack(const uint8_t* codes, int64_t rows, int64_t columns, int8_t* out) {
  const int64_t blocks = ceil_div(columns, kBlockColumns);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const auto [byte, shift] = place_of(row, column, blocks);
      out[row * columns + column] = static_cast<int8_t>((codes[byte] >> shift & 3) - 1);
    }
  }
}

}  // namespace wf
