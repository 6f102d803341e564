// The products of blocks.h with float32 activations on vectors of rows, for the lanes of simd256.h or simd128.h, one of which comes before.
#pragma once

#include "ternary/blocks.h"

namespace wf {
namespace {

constexpr int kHalves = 16 / kLanes;  // of a panel
constexpr int kBlockStreams = 4;
constexpr int kBlockPrefetch = 2048;

// Each type: `scales` makes a group's factor, `codes` calls use(column, codes of kLanes rows as floats) for a group's columns, in an
// order in which nothing waits in registers. Sums are in `kParts`, of every second column, where that is faster: not for AVX2, which has
// 16 registers. `finish` is what a token's sum gains from a group's.
struct Q8 {
  static constexpr int kGroups = 1, kColumns = 32, kBytes = 544, kParts = 1;
  WF_INLINE static Floats scale(const uint8_t* block, int, int half) { return load_halves(block + 2 * kLanes * half); }
  WF_INLINE static Floats finish(const uint8_t*, int, Floats scale, Floats part, Floats sum, float) { return fma(scale, part, sum); }
  template <typename Use>
  WF_INLINE static void codes(const uint8_t* block, int, int half, Use use) {
#pragma GCC unroll 32
    for (int j = 0; j < 32; ++j) use(j, to_floats(widen_signed(block + 32 + 16 * j + kLanes * half)));
  }
};

struct Q4 {
  static constexpr int kGroups = 1, kColumns = 32, kBytes = 320, kParts = 1;
  WF_INLINE static Floats scale(const uint8_t* block, int, int half) { return load_halves(block + 2 * kLanes * half); }
  WF_INLINE static Floats finish(const uint8_t* block, int half, Floats scale, Floats part, Floats sum, float group_sum) {
    return fma(load_halves(block + 32 + 2 * kLanes * half), all(group_sum), fma(scale, part, sum));
  }
  template <typename Use>
  WF_INLINE static void codes(const uint8_t* block, int, int half, Use use) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      const Ints both = widen_unsigned(block + 64 + 16 * j + kLanes * half);
      use(j, to_floats(low_nibble(both)));
      use(j + 16, to_floats(right(both, 4)));
    }
  }
};

struct Q6 {
  static constexpr int kGroups = 16, kColumns = 16, kBytes = 3392, kParts = kLanes == 8 ? 1 : 2;
  WF_INLINE static Floats scale(const uint8_t* block, int group, int half) {
    const Floats factor = to_floats(widen_signed(block + 32 + 16 * group + kLanes * half));
    return multiply(load_halves(block + 2 * kLanes * half), factor);
  }
  WF_INLINE static Floats finish(const uint8_t*, int, Floats scale, Floats part, Floats sum, float) { return fma(scale, part, sum); }
  template <typename Use>
  WF_INLINE static void codes(const uint8_t* block, int group, int half, Use use) {
    const uint8_t* at = block + 320 + 192 * group + 4 * kLanes * half;
    const Ints first = load_ints(at), second = load_ints(at + 64), high = load_ints(at + 128);
    const Ints fours[4] = {
        with_bits(bits_of(first, 0x0f0f0f0f), left(high, 4), 0x30303030),
        with_bits(bits_of(second, 0x0f0f0f0f), left(high, 2), 0x30303030),
        with_bits(bits_of(right(first, 4), 0x0f0f0f0f), high, 0x30303030),
        with_bits(bits_of(right(second, 4), 0x0f0f0f0f), right(high, 2), 0x30303030),
    };
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) use(j, byte_less(fours[j / 4], j % 4, 32.0F));
  }
};

// T tokens with the panels panel, panel + hop, ... (P of them).
template <typename Type, int P, int T>
[[gnu::noinline]] void block_tile(const BlockMatrix& w, const FloatActivations& x, int64_t panel, int64_t hop, int64_t token, float* y,
                                  int64_t y_stride) {
  const int64_t blocks = w.columns / (Type::kGroups * Type::kColumns), bytes = blocks * Type::kBytes;
  const int64_t groups = blocks * Type::kGroups;
  const uint8_t* data = w.data + panel * bytes;
  const float* of_tokens = x.x + token * w.columns;
  const float* sums = x.sums + token * groups;
  Floats sum[P][kHalves][T];
  for (int p = 0; p < P; ++p) {
    for (int half = 0; half < kHalves; ++half) {
      for (int t = 0; t < T; ++t) sum[p][half][t] = zeros();
    }
  }
  for (int64_t block = 0; block < blocks; ++block) {
    for (int group = 0; group < Type::kGroups; ++group) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const uint8_t* at = data + p * hop * bytes + block * Type::kBytes;
        for (int line = 0; line < Type::kBytes / Type::kGroups; line += 64) {
          __builtin_prefetch(at + group * (Type::kBytes / Type::kGroups) + line + kBlockPrefetch);
        }
#pragma GCC unroll 2
        for (int half = 0; half < kHalves; ++half) {
          Floats part[T][Type::kParts];
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) {
            for (auto& value : part[t]) value = zeros();
          }
          Type::codes(at, group, half, [&](int column, Floats codes) {
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
              Floats& value = part[t][column % Type::kParts];
              value = fma(codes, all(of_tokens[column * T + t]), value);
            }
          });
          const Floats scale = Type::scale(at, group, half);
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) {
            const Floats whole = Type::kParts == 1 ? part[t][0] : add(part[t][0], part[t][Type::kParts - 1]);
            sum[p][half][t] = Type::finish(at, half, scale, whole, sum[p][half][t], sums[t]);
          }
        }
      }
      of_tokens += Type::kColumns * T;
      sums += T;
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int half = 0; half < kHalves; ++half) {
      const int64_t row = (panel + p * hop) * kPanelRows + kLanes * half;
      for (int t = 0; t < T; ++t) store_some(y + (token + t) * y_stride + row, sum[p][half][t], w.rows - row);
    }
  }
}

template <typename Type, int T>
WF_INLINE void block_tile_of(int64_t tokens, const BlockMatrix& w, const FloatActivations& x, int64_t panel, int64_t token, float* y,
                             int64_t y_stride) {
  if (tokens == T) {
    block_tile<Type, 1, T>(w, x, panel, 0, token, y, y_stride);
  } else if constexpr (T > 1) {
    block_tile_of<Type, T - 1>(tokens, w, x, panel, token, y, y_stride);
  }
}

template <typename Type>
void block_panels(const BlockMatrix& w, const FloatActivations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  if (x.tokens == 1) {
    const int64_t part = (end - begin) / kBlockStreams;
    for (int64_t panel = begin; panel < begin + part; ++panel) block_tile<Type, kBlockStreams, 1>(w, x, panel, part, 0, y, y_stride);
    begin += part * kBlockStreams;
  }
  const int64_t tiles = token_tiles(x.tokens);
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t token = tile_begin(x.tokens, i);
      block_tile_of<Type, kBlockTokens>(tile_begin(x.tokens, i + 1) - token, w, x, panel, token, y, y_stride);
    }
  }
}

void matmul_blocks(const BlockMatrix& w, const BlockActivations& activations, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  const FloatActivations x(w, activations);
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
