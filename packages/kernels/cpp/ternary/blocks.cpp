#include "ternary/blocks.h"

#include <cstring>

#include "ternary/half.h"

namespace wf {
namespace {

constexpr int64_t kQ6Group = 208;

float to_float(const uint8_t* half) {
  uint16_t bits;
  std::memcpy(&bits, half, 2);
  return half_to_float(bits);
}

// One row of llama.cpp's Q6_K block into place: code (256), factors (16).
void pack_q6_k(const uint8_t* from, uint8_t* block, int64_t row) {
  std::memcpy(block + 2 * row, from + 208, 2);
  for (int64_t column = 0; column < 256; ++column) {
    const int64_t half = column / 128, inside = column % 128, byte = inside % 32;
    const int low = from[64 * half + inside / 32 % 2 * 32 + byte] >> inside / 64 * 4 & 15;
    const int high = from[128 + 32 * half + byte] >> inside / 32 * 2 & 3;
    uint8_t* group = block + 32 + column / 16 * kQ6Group;
    const int64_t j = column % 16;
    group[row] = from[192 + column / 16];
    uint8_t& low_place = group[16 + j % 8 * 16 + row];
    uint8_t& high_place = group[144 + j % 4 * 16 + row];
    low_place = static_cast<uint8_t>(low_place | low << j / 8 * 4);
    high_place = static_cast<uint8_t>(high_place | high << j / 4 * 2);
  }
}

// Calls `use(column, weight)` for the weights [begin, end) of a row.
template <typename Use>
void each_weight(const BlockMatrix& w, int64_t row, int64_t begin, int64_t end, Use use) {
  const uint8_t* panel = w.data + row / kPanelRows * w.panel_bytes();
  row %= kPanelRows;
  for (int64_t column = begin; column < end; ++column) {
    const uint8_t* block = panel + column / w.block_columns() * w.block_bytes();
    const float scale = to_float(block + 2 * row);
    const int64_t inside = column % w.block_columns();
    switch (w.type) {
      case BlockType::q8_0:
        use(column, scale * static_cast<float>(static_cast<int8_t>(block[32 + inside * 16 + row])));
        break;
      case BlockType::q4_1: {
        const int code = block[64 + inside % 16 * 16 + row] >> inside / 16 * 4 & 15;
        use(column, scale * static_cast<float>(code) + to_float(block + 32 + 2 * row));
        break;
      }
      case BlockType::q6_k: {
        const uint8_t* group = block + 32 + inside / 16 * kQ6Group;
        const int64_t j = inside % 16;
        const int code = (group[16 + j % 8 * 16 + row] >> j / 8 * 4 & 15) | (group[144 + j % 4 * 16 + row] >> j / 4 * 2 & 3) << 4;
        use(column, scale * static_cast<float>(static_cast<int8_t>(group[row])) * static_cast<float>(code - 32));
        break;
      }
    }
  }
}

}  // namespace

int64_t row_bytes(BlockType type, int64_t columns) {
  const BlockMatrix w{nullptr, 1, columns, type};
  return columns % w.block_columns() == 0 ? w.panel_bytes() / kPanelRows : 0;
}

void pack_blocks(BlockType type, const uint8_t* data, int64_t rows, int64_t columns, uint8_t* out) {
  const BlockMatrix w{out, rows, columns, type};
  const int64_t own_bytes = w.block_bytes() / kPanelRows;
  std::memset(out, 0, static_cast<size_t>(w.bytes()));
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t r = row % kPanelRows;
    for (int64_t b = 0; b < w.blocks(); ++b) {
      const uint8_t* from = data + (row * w.blocks() + b) * own_bytes;
      uint8_t* block = out + row / kPanelRows * w.panel_bytes() + b * w.block_bytes();
      if (type == BlockType::q6_k) {
        pack_q6_k(from, block, r);
      } else if (type == BlockType::q8_0) {
        std::memcpy(block + 2 * r, from, 2);
        for (int64_t j = 0; j < 32; ++j) block[32 + j * 16 + r] = from[2 + j];
      } else {
        std::memcpy(block + 2 * r, from, 2);
        std::memcpy(block + 32 + 2 * r, from + 2, 2);
        for (int64_t j = 0; j < 16; ++j) block[64 + j * 16 + r] = from[4 + j];
      }
    }
  }
}

void unpack_row(const BlockMatrix& w, int64_t row, float* out) {
  unpack_columns(w, row, 0, w.columns, out);
}

void unpack_columns(const BlockMatrix& w, int64_t row, int64_t begin, int64_t end, float* out) {
  each_weight(w, row, begin, end, [=](int64_t column, float weight) { out[column - begin] = weight; });
}

void sum_groups(const BlockMatrix& w, const float* x, float* sums) {
  for (int64_t group = 0; group < w.groups(); ++group) {
    float sum = 0.0F;
    for (int64_t i = 0; i < w.group_columns(); ++i) sum += x[group * w.group_columns() + i];
    sums[group] = sum;
  }
}

}  // namespace wf
