// The products of blocks.h on vectors of rows, for the lanes of simd512.h, simd256.h or simd128.h, one of which comes before.
#pragma once

#include <cstring>

#include "ternary/blocks.h"

namespace wf {
namespace {

constexpr int kHalves = 16 / kLanes;  // of a panel
constexpr int kBlockTokens = kLanes == 16 ? 8 : 6;  // tokens that share a weight on its way to a float
constexpr int kBlockStreams = 4;                    // panels that share activations, at most
constexpr int kRegisters = kLanes == 8 ? 16 : 32;
constexpr int kBlockPrefetch = 2048;

// Codes are taken apart while they are bytes: four to a lane of what they become.
typedef uint8_t Bytes __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Words __attribute__((vector_size(4 * kLanes)));
constexpr int kVector = sizeof(Bytes);

WF_INLINE Bytes load_bytes(const void* p) {
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return bytes;
}
WF_INLINE void store_bytes(int8_t* p, Bytes bytes) { std::memcpy(p, &bytes, sizeof bytes); }
// Bits that stay in their byte under a mask, moved; there are no shifts of bytes.
WF_INLINE Bytes right(Bytes bytes, int by, uint8_t mask) { return (Bytes)((Words)bytes >> by) & mask; }
WF_INLINE Bytes left(Bytes bytes, int by, uint8_t mask) { return (Bytes)((Words)bytes << by) & mask; }

// Each type: `codes` gives a group's codes, int8 [kColumns][16 rows], where they lie or in `room`; `scale` makes a group's factor; `finish`
// is what a token's sum gains from a group's. Sums take the columns j, j + kHop, j + 2 kHop, ... for j = 0, 1, ... below kHop.
struct Q8 {
  static constexpr int kGroups = 1, kColumns = 32, kHop = 32, kBytes = 544;
  WF_INLINE static Floats scale(const uint8_t* block, int, int half) { return load_halves(block + 2 * kLanes * half); }
  WF_INLINE static Floats finish(const uint8_t*, int, Floats scale, Floats part, Floats sum, float) { return fma(scale, part, sum); }
  WF_INLINE static const int8_t* codes(const uint8_t* block, int, int8_t*) { return reinterpret_cast<const int8_t*>(block + 32); }
};

struct Q4 {
  static constexpr int kGroups = 1, kColumns = 32, kHop = 16, kBytes = 320;
  WF_INLINE static Floats scale(const uint8_t* block, int, int half) { return load_halves(block + 2 * kLanes * half); }
  WF_INLINE static Floats finish(const uint8_t* block, int half, Floats scale, Floats part, Floats sum, float group_sum) {
    return fma(load_halves(block + 32 + 2 * kLanes * half), all(group_sum), fma(scale, part, sum));
  }
  WF_INLINE static const int8_t* codes(const uint8_t* block, int, int8_t* room) {
#pragma GCC unroll 16
    for (int i = 0; i < 256; i += kVector) {
      const Bytes both = load_bytes(block + 64 + i);
      store_bytes(room + i, both & uint8_t{15});
      store_bytes(room + 256 + i, right(both, 4, 15));
    }
    return room;
  }
};

struct Q6 {
  static constexpr int kGroups = 16, kColumns = 16, kHop = 4, kBytes = 3360;
  WF_INLINE static Floats scale(const uint8_t* block, int group, int half) {
    const Floats factor = to_floats(widen_signed(block + 32 + 208 * group + kLanes * half));
    return multiply(load_halves(block + 2 * kLanes * half), factor);
  }
  WF_INLINE static Floats finish(const uint8_t*, int, Floats scale, Floats part, Floats sum, float) { return fma(scale, part, sum); }
  WF_INLINE static const int8_t* codes(const uint8_t* block, int group, int8_t* room) {
    const uint8_t* at = block + 48 + 208 * group;
#pragma GCC unroll 4
    for (int i = 0; i < 64; i += kVector) {
      const Bytes first = load_bytes(at + i), second = load_bytes(at + 64 + i), high = load_bytes(at + 128 + i);
      store_bytes(room + i, ((first & uint8_t{15}) | left(high, 4, 0x30)) - uint8_t{32});
      store_bytes(room + 64 + i, ((second & uint8_t{15}) | left(high, 2, 0x30)) - uint8_t{32});
      store_bytes(room + 128 + i, (right(first, 4, 15) | (high & uint8_t{0x30})) - uint8_t{32});
      store_bytes(room + 192 + i, (right(second, 4, 15) | right(high, 2, 0x30)) - uint8_t{32});
    }
    return room;
  }
};

// T tokens with the panels panel, panel + hop, ... (P of them). All panels' halves share what a column's activation costs to load.
template <typename Type, int P, int T>
[[gnu::noinline]] void block_tile(const BlockMatrix& w, const FloatActivations& x, int64_t panel, int64_t hop, int64_t token, float* y,
                                  int64_t y_stride) {
  const int64_t blocks = w.columns / (Type::kGroups * Type::kColumns), bytes = blocks * Type::kBytes, stride = x.stride;
  const int64_t groups = blocks * Type::kGroups;
  const uint8_t* data = w.data + panel * bytes;
  const float* of_tokens = x.x + token * stride;
  const float* sums = x.sums + token * groups;
  alignas(64) int8_t room[P][Type::kColumns * kPanelRows];
  Floats sum[P][kHalves][T];
  for (int p = 0; p < P; ++p) {
    for (int half = 0; half < kHalves; ++half) {
      for (int t = 0; t < T; ++t) sum[p][half][t] = zeros();
    }
  }
  for (int64_t block = 0; block < blocks; ++block) {
    const uint8_t* at = data + block * Type::kBytes;
    for (int group = 0; group < Type::kGroups; ++group) {
      const int8_t* codes[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const uint8_t* of_panel = at + p * hop * bytes;
        for (int line = 0; line < Type::kBytes / Type::kGroups; line += 64) {
          __builtin_prefetch(of_panel + group * (Type::kBytes / Type::kGroups) + line + kBlockPrefetch);
        }
        codes[p] = Type::codes(of_panel, group, room[p]);
      }
      Floats part[P][kHalves][T];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int half = 0; half < kHalves; ++half) {
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) part[p][half][t] = zeros();
        }
      }
      for (int j = 0; j < Type::kHop; ++j) {
#pragma GCC unroll 4
        for (int column = 0; column < Type::kColumns; column += Type::kHop) {
          Floats own[T];
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) own[t] = all(of_tokens[t * stride + j + column]);
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
            for (int half = 0; half < kHalves; ++half) {
              const Floats code = to_floats(widen_signed(codes[p] + (j + column) * kPanelRows + kLanes * half));
#pragma GCC unroll 8
              for (int t = 0; t < T; ++t) part[p][half][t] = fma(code, own[t], part[p][half][t]);
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const uint8_t* of_panel = at + p * hop * bytes;
#pragma GCC unroll 4
        for (int half = 0; half < kHalves; ++half) {
          const Floats scale = Type::scale(of_panel, group, half);
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) {
            sum[p][half][t] = Type::finish(of_panel, half, scale, part[p][half][t], sum[p][half][t], sums[t * groups]);
          }
        }
      }
      of_tokens += Type::kColumns;
      ++sums;
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int half = 0; half < kHalves; ++half) {
      const int64_t row = (panel + p * hop) * kPanelRows + kLanes * half;
      for (int t = 0; t < T; ++t) store_some(y + (token + t) * y_stride + row, sum[p][half][t], w.rows - row);
    }
  }
}

// How many panels' sums there are registers for, beside a weight and the tokens' activations.
constexpr int panels_with(int tokens) {
  int panels = kBlockStreams;
  while (panels > 1 && panels * kHalves * tokens + tokens + 2 > kRegisters) panels /= 2;
  return panels;
}

// `tokens` tokens, at most T, with the panels [begin, end).
template <typename Type, int T>
WF_INLINE void block_tile_of(int64_t tokens, const BlockMatrix& w, const FloatActivations& x, int64_t begin, int64_t end, int64_t token,
                             float* y, int64_t y_stride) {
  if (tokens == T) {
    constexpr int P = panels_with(T);
    for (; begin + P <= end; begin += P) block_tile<Type, P, T>(w, x, begin, 1, token, y, y_stride);
    for (; begin < end; ++begin) block_tile<Type, 1, T>(w, x, begin, 1, token, y, y_stride);
  } else if constexpr (T > 1) {
    block_tile_of<Type, T - 1>(tokens, w, x, begin, end, token, y, y_stride);
  }
}

template <typename Type>
void block_panels(const BlockMatrix& w, const FloatActivations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  if (x.tokens == 1) {
    const int64_t part = (end - begin) / kBlockStreams;
    for (int64_t panel = begin; panel < begin + part; ++panel) block_tile<Type, kBlockStreams, 1>(w, x, panel, part, 0, y, y_stride);
    begin += part * kBlockStreams;
  }
  const int64_t tiles = ceil_div(x.tokens, kBlockTokens);
  for (; begin < end; begin += kBlockStreams) {  // so few that they stay in the cache while all tokens pass
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t token = x.tokens * i / tiles;
      block_tile_of<Type, kBlockTokens>(x.tokens * (i + 1) / tiles - token, w, x, begin, least(begin + kBlockStreams, end), token, y,
                                        y_stride);
    }
  }
}

void matmul_blocks(const BlockMatrix& w, const FloatActivations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  switch (w.type) {
    case BlockType::q8_0:
      return block_panels<Q8>(w, x, begin, end, y, y_stride);
    case BlockType::q6_k:
      return block_panels<Q6>(w, x, begin, end, y, y_stride);
    case BlockType::q4_1:
      return block_panels<Q4>(w, x, begin, end, y, y_stride);
  }
}

}  // namespace
}  // namespace wf
