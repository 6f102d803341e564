// The Arm kernels. neon.cpp, dotprod.cpp and i8mm.cpp each compile this file with their own flags, and take their own tile from it.
//
// A tile is the product of one panel's 16 rows with up to eight tokens over some blocks. All else is the same for the three.
#pragma once

#include <arm_neon.h>

#include <bit>

#include "ternary/ternary.h"

namespace wf {
namespace {  // in every file anew: the linker must not merge functions that were compiled for different processors

constexpr int64_t kTileTokens = 8;

bool quantize(const float* x, int64_t columns, int64_t stride, int8_t* codes, float* scale, int32_t* sums) {
  // The largest magnitude by its bits, whose order is that of the floats and puts infinity and NaN last.
  uint32x4_t most = vdupq_n_u32(0);
  int64_t i = 0;
  for (; i + 4 <= columns; i += 4) most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(x + i))));
  uint32_t largest = vmaxvq_u32(most);
  for (; i < columns; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]) & 0x7fffffffU;
    if (bits > largest) largest = bits;
  }
  if (largest >= 0x7f800000U) return false;
  const float absmax = std::bit_cast<float>(largest);
  const float inverse = 1.0F / (absmax > 1e-5F ? absmax : 1e-5F) * 127.0F;
  *scale = 1.0F / inverse;
  for (int64_t first = 0, group = 0; first < columns; first += kGroup, ++group) {
    const int64_t last = first + kGroup < columns ? first + kGroup : columns;
    int32x4_t sum4 = vdupq_n_s32(0);
    i = first;
    for (; i + 8 <= last; i += 8) {
      const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), inverse));
      const int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4), inverse));
      vst1_s8(codes + i, vmovn_s16(vcombine_s16(vmovn_s32(low), vmovn_s32(high))));
      sum4 = vaddq_s32(sum4, vaddq_s32(low, high));
    }
    int32_t sum = vaddvq_s32(sum4);
    for (; i < last; ++i) {
      const int32_t code = vcvtns_s32_f32(x[i] * inverse);
      codes[i] = static_cast<int8_t>(code);
      sum += code;
    }
    sums[group] = sum;
  }
  for (i = columns; i < stride; ++i) codes[i] = 0;
  return true;
}

// The codes 0..2 of one plane, four columns of four rows.
template <int kPlane>
int8x16_t plane(uint8x16_t bytes) {
  if constexpr (kPlane == 0) return vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(3)));
  if constexpr (kPlane == 3) return vreinterpretq_s8_u8(vshrq_n_u8(bytes, 6));
  if constexpr (kPlane == 1) return vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(bytes, 2), vdupq_n_u8(3)));
  return vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(bytes, 4), vdupq_n_u8(3)));
}

// ------------------------------------------------------------------------------------------------------------------ plain NEON

// Products of 8 bits are summed in 16: a block adds at most 4 planes x 2 x 128, so that 32 blocks fit.
constexpr int64_t kNeonBlocks = 32;

struct NeonTile {
  template <int kTokens>
  static void run(const uint8_t* codes, int64_t blocks, const int8_t* x, int64_t stride, int32_t* sums) {
    if constexpr (kTokens > 4) {  // more than the registers hold
      run<4>(codes, blocks, x, stride, sums);
      return run<kTokens - 4>(codes, blocks, x + 4 * stride, stride, sums + 4 * kPanelRows);
    }
    for (int quarter = 0; quarter < 4; ++quarter) {  // four rows, which fill a register
      int32x4_t low[kTokens], high[kTokens];         // two rows each, two sums a row
      for (int t = 0; t < kTokens; ++t) low[t] = high[t] = vdupq_n_s32(0);
      for (int64_t first = 0; first < blocks; first += kNeonBlocks) {
        const int64_t last = first + kNeonBlocks < blocks ? first + kNeonBlocks : blocks;
        int16x8_t low16[kTokens], high16[kTokens];
        for (int t = 0; t < kTokens; ++t) low16[t] = high16[t] = vdupq_n_s16(0);
        for (int64_t block = first; block < last; ++block) {
          const uint8x16_t bytes = vld1q_u8(codes + block * kBlockBytes + quarter * 16);
          const int8x16_t codes0 = plane<0>(bytes), codes1 = plane<1>(bytes), codes2 = plane<2>(bytes), codes3 = plane<3>(bytes);
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) {
            const int32x4_t shared = vreinterpretq_s32_s8(vld1q_s8(x + t * stride + block * kBlockColumns));
            add(low16[t], high16[t], codes0, vreinterpretq_s8_s32(vdupq_laneq_s32(shared, 0)));
            add(low16[t], high16[t], codes1, vreinterpretq_s8_s32(vdupq_laneq_s32(shared, 1)));
            add(low16[t], high16[t], codes2, vreinterpretq_s8_s32(vdupq_laneq_s32(shared, 2)));
            add(low16[t], high16[t], codes3, vreinterpretq_s8_s32(vdupq_laneq_s32(shared, 3)));
          }
        }
        for (int t = 0; t < kTokens; ++t) {
          low[t] = vpadalq_s16(low[t], low16[t]);
          high[t] = vpadalq_s16(high[t], high16[t]);
        }
      }
      for (int t = 0; t < kTokens; ++t) vst1q_s32(sums + t * kPanelRows + quarter * 4, vpaddq_s32(low[t], high[t]));
    }
  }

 private:
  static void add(int16x8_t& low, int16x8_t& high, int8x16_t codes, int8x16_t x) {
    low = vmlal_s8(low, vget_low_s8(codes), vget_low_s8(x));
    high = vmlal_high_s8(high, codes, x);
  }
};

// -------------------------------------------------------------------------------------------------------------------- dot product

#if defined(__ARM_FEATURE_DOTPROD)

struct DotTile {
  template <int kTokens>
  static void run(const uint8_t* codes, int64_t blocks, const int8_t* x, int64_t stride, int32_t* sums) {
    if constexpr (kTokens == 1) return one(codes, blocks, x, sums);
    for (int half = 0; half < 2; ++half) {  // eight rows: their accumulators and eight tokens fit into the 32 registers
      int32x4_t acc[2][kTokens];
      for (int t = 0; t < kTokens; ++t) acc[0][t] = acc[1][t] = vdupq_n_s32(0);
      for (int64_t block = 0; block < blocks; ++block) {
        int8x16_t shared[kTokens];
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) shared[t] = vld1q_s8(x + t * stride + block * kBlockColumns);
#pragma GCC unroll 2
        for (int q = 0; q < 2; ++q) {
          const uint8x16_t bytes = vld1q_u8(codes + block * kBlockBytes + half * 32 + q * 16);
          const int8x16_t codes0 = plane<0>(bytes), codes1 = plane<1>(bytes), codes2 = plane<2>(bytes), codes3 = plane<3>(bytes);
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) acc[q][t] = vdotq_laneq_s32(acc[q][t], codes0, shared[t], 0);
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) acc[q][t] = vdotq_laneq_s32(acc[q][t], codes1, shared[t], 1);
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) acc[q][t] = vdotq_laneq_s32(acc[q][t], codes2, shared[t], 2);
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) acc[q][t] = vdotq_laneq_s32(acc[q][t], codes3, shared[t], 3);
        }
      }
      for (int q = 0; q < 2; ++q) {
        for (int t = 0; t < kTokens; ++t) vst1q_s32(sums + t * kPanelRows + half * 8 + q * 4, acc[q][t]);
      }
    }
  }

 private:
  // One token, bound by memory: the middle planes are masked and not shifted, which makes their sums 4 and 16 times too large.
  // A block adds at most 4 x 16 x 2 x 128 to a sum of 32 bits, so that it is taken apart, exactly, every 2^16 blocks.
  static void one(const uint8_t* codes, int64_t blocks, const int8_t* x, int32_t* sums) {
    constexpr int64_t kBlocks = int64_t{1} << 16;
    int32x4_t total[4];
    for (int q = 0; q < 4; ++q) total[q] = vdupq_n_s32(0);
    const uint8x16_t mask1 = vdupq_n_u8(0x0c), mask2 = vdupq_n_u8(0x30);
    for (int64_t first = 0; first < blocks; first += kBlocks) {
      const int64_t last = first + kBlocks < blocks ? first + kBlocks : blocks;
      int32x4_t acc0[4], acc1[4], acc2[4];
      for (int q = 0; q < 4; ++q) acc0[q] = acc1[q] = acc2[q] = vdupq_n_s32(0);
      for (int64_t block = first; block < last; ++block) {
        __builtin_prefetch(codes + block * kBlockBytes + 1024);
        const int8x16_t shared = vld1q_s8(x + block * kBlockColumns);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          const uint8x16_t bytes = vld1q_u8(codes + block * kBlockBytes + q * 16);
          acc0[q] = vdotq_laneq_s32(acc0[q], plane<0>(bytes), shared, 0);
          acc1[q] = vdotq_laneq_s32(acc1[q], vreinterpretq_s8_u8(vandq_u8(bytes, mask1)), shared, 1);
          acc2[q] = vdotq_laneq_s32(acc2[q], vreinterpretq_s8_u8(vandq_u8(bytes, mask2)), shared, 2);
          acc0[q] = vdotq_laneq_s32(acc0[q], plane<3>(bytes), shared, 3);
        }
      }
      for (int q = 0; q < 4; ++q) {
        total[q] = vaddq_s32(vaddq_s32(total[q], acc0[q]), vaddq_s32(vshrq_n_s32(acc1[q], 2), vshrq_n_s32(acc2[q], 4)));
      }
    }
    for (int q = 0; q < 4; ++q) vst1q_s32(sums + q * 4, total[q]);
  }
};

#endif

// ------------------------------------------------------------------------------------------------------------- matrix products

#if defined(__ARM_FEATURE_MATMUL_INT8)

// `smmla` multiplies two rows of eight columns with two tokens: zips put two rows, and two tokens, into one register.
struct MatrixTile {
  template <int kTokens>
  static void run(const uint8_t* codes, int64_t blocks, const int8_t* x, int64_t stride, int32_t* sums) {
    if constexpr (kTokens == 1) return DotTile::run<1>(codes, blocks, x, stride, sums);
    constexpr int kPairs = (kTokens + 1) / 2;  // the last token of an odd number is its own partner
    for (int half = 0; half < 2; ++half) {
      int32x4_t acc[4][kPairs];
      for (int p = 0; p < kPairs; ++p) acc[0][p] = acc[1][p] = acc[2][p] = acc[3][p] = vdupq_n_s32(0);
      for (int64_t block = 0; block < blocks; ++block) {
        int8x16_t left[kPairs], right[kPairs];  // columns 0-7 and 8-15 of two tokens
#pragma GCC unroll 4
        for (int p = 0; p < kPairs; ++p) {
          const int8_t* even = x + 2 * p * stride + block * kBlockColumns;
          const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(even));
          const int64x2_t b = 2 * p + 1 < kTokens ? vreinterpretq_s64_s8(vld1q_s8(even + stride)) : a;
          left[p] = vreinterpretq_s8_s64(vzip1q_s64(a, b));
          right[p] = vreinterpretq_s8_s64(vzip2q_s64(a, b));
        }
#pragma GCC unroll 2
        for (int q = 0; q < 2; ++q) {
          const uint8x16_t bytes = vld1q_u8(codes + block * kBlockBytes + half * 32 + q * 16);
          // A row's four bytes beside the same shifted by a plane: planes 0 and 1 in bits 0-1, planes 2 and 3 in bits 4-5.
          const uint32x4_t even = vreinterpretq_u32_u8(bytes), odd = vreinterpretq_u32_u8(vshrq_n_u8(bytes, 2));
          const uint8x16_t upper = vreinterpretq_u8_u32(vzip1q_u32(even, odd)), lower = vreinterpretq_u8_u32(vzip2q_u32(even, odd));
          const int8x16_t upper_left = plane<0>(upper), upper_right = plane<2>(upper);
          const int8x16_t lower_left = plane<0>(lower), lower_right = plane<2>(lower);
#pragma GCC unroll 4
          for (int p = 0; p < kPairs; ++p) {
            acc[2 * q][p] = vmmlaq_s32(vmmlaq_s32(acc[2 * q][p], left[p], upper_left), right[p], upper_right);
            acc[2 * q + 1][p] = vmmlaq_s32(vmmlaq_s32(acc[2 * q + 1][p], left[p], lower_left), right[p], lower_right);
          }
        }
      }
      for (int pair = 0; pair < 4; ++pair) {
        for (int p = 0; p < kPairs; ++p) {
          int32_t* out = sums + 2 * p * kPanelRows + half * 8 + pair * 2;
          vst1_s32(out, vget_low_s32(acc[pair][p]));
          if (2 * p + 1 < kTokens) vst1_s32(out + kPanelRows, vget_high_s32(acc[pair][p]));
        }
      }
    }
  }
};

#endif

// ----------------------------------------------------------------------------------------------------------------- what they share

template <typename Tile>
struct Arm {
  // sums[token][row] of codes u and activations.
  static void tile(int64_t tokens, const uint8_t* codes, int64_t blocks, const int8_t* x, int64_t stride, int32_t* sums) {
    using Run = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*);
    static constexpr Run kRuns[kTileTokens] = {Tile::template run<1>, Tile::template run<2>, Tile::template run<3>,
                                               Tile::template run<4>, Tile::template run<5>, Tile::template run<6>,
                                               Tile::template run<7>, Tile::template run<8>};
    kRuns[tokens - 1](codes, blocks, x, stride, sums);
  }

  static int32_t sum_of(const TernaryMatrix& w, const Activations& x, int64_t token) {
    int32_t sum = 0;
    for (int64_t group = 0; group < w.groups(); ++group) sum += x.sums[token * w.groups() + group];
    return sum;
  }

  // Calls `each(token, row, integer)` for every output of the panels.
  template <typename Each>
  static void integers(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, Each each) {
    int32_t sums[kTileTokens * kPanelRows];
    for (int64_t panel = begin; panel < end; ++panel) {
      const uint8_t* codes = w.codes + panel * w.blocks() * kBlockBytes;
      const int64_t rows = w.rows - panel * kPanelRows < kPanelRows ? w.rows - panel * kPanelRows : kPanelRows;
      for (int64_t first = 0; first < x.tokens; first += kTileTokens) {
        const int64_t tokens = x.tokens - first < kTileTokens ? x.tokens - first : kTileTokens;
        tile(tokens, codes, w.blocks(), x.codes + first * x.stride, x.stride, sums);
        for (int64_t t = 0; t < tokens; ++t) {
          const int32_t sum = sum_of(w, x, first + t);
          for (int64_t r = 0; r < rows; ++r) each(first + t, panel * kPanelRows + r, sums[t * kPanelRows + r] - sum);
        }
      }
    }
  }

  // With scales of groups the sums are of floats, in the scalar kernel's order.
  static void groups(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
    int32_t sums[kTileTokens * kPanelRows];
    float totals[kTileTokens * kPanelRows];
    constexpr int64_t kGroupBlocks = kGroup / kBlockColumns;
    for (int64_t panel = begin; panel < end; ++panel) {
      const uint8_t* codes = w.codes + panel * w.blocks() * kBlockBytes;
      const int64_t rows = w.rows - panel * kPanelRows < kPanelRows ? w.rows - panel * kPanelRows : kPanelRows;
      for (int64_t first = 0; first < x.tokens; first += kTileTokens) {
        const int64_t tokens = x.tokens - first < kTileTokens ? x.tokens - first : kTileTokens;
        for (float& total : totals) total = 0.0F;
        for (int64_t group = 0; group < w.groups(); ++group) {
          const int64_t block = group * kGroupBlocks, left = w.blocks() - block;
          tile(tokens, codes + block * kBlockBytes, left < kGroupBlocks ? left : kGroupBlocks,
               x.codes + first * x.stride + block * kBlockColumns, x.stride, sums);
          for (int64_t r = 0; r < rows; ++r) {
            const float scale = w.group_scales(panel, group)[r];
            for (int64_t t = 0; t < tokens; ++t) {
              const int32_t part = sums[t * kPanelRows + r] - x.sums[(first + t) * w.groups() + group];
              totals[t * kPanelRows + r] += static_cast<float>(part) * scale;
            }
          }
        }
        for (int64_t t = 0; t < tokens; ++t) {
          float* out = y + (first + t) * y_stride + panel * kPanelRows;
          for (int64_t r = 0; r < rows; ++r) out[r] = totals[t * kPanelRows + r] * x.scales[first + t];
        }
      }
    }
  }

  static void matmul(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
    if (w.granularity == Granularity::group) return groups(w, x, begin, end, y, y_stride);
    integers(w, x, begin, end, [&](int64_t token, int64_t row, int32_t integer) {
      const float scale = w.scales[w.granularity == Granularity::row ? row : 0];
      y[token * y_stride + row] = static_cast<float>(integer) * (x.scales[token] * scale);
    });
  }

  static void matmul_integer(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, int32_t* y,
                             int64_t y_stride) {
    integers(w, x, begin, end, [&](int64_t token, int64_t row, int32_t integer) { y[token * y_stride + row] = integer; });
  }
};

}  // namespace
}  // namespace wf
