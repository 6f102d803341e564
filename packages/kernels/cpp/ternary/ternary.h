// Ternary matrix products: what every instruction set implements, and the layout they share.
//
// A weight t in {-1, 0, +1} is stored as the code t + 1 in two bits. A matrix [rows, columns] is cut into panels of 16 rows, a panel
// into blocks of 16 columns, and a block is 64 bytes: byte 4r + j holds row r's columns j, 4 + j, 8 + j, 12 + j of the block in bits
// 0-1, 2-3, 4-5, 6-7. So one 512-bit register holds a block; masking two bits of every byte leaves four neighbouring columns of 16
// rows, which is what `vpdpbusd` (x86) multiplies with four activations that all rows share, and 128 bits of it what `sdot` by lane
// (Arm) does. Panels follow each other, so that a product reads one stream of memory. Rows and columns are padded with zeros (code 1).
//
// With codes u = t + 1 and activations q: sum t q = sum u q - sum q.
#pragma once

#include <cstdint>

namespace wf {

constexpr int64_t kPanelRows = 16;
constexpr int64_t kBlockColumns = 16;
constexpr int64_t kBlockBytes = 64;
constexpr int64_t kGroup = 128;  // columns that share a scale in the granularity `group`
constexpr int64_t kMostColumns = 1 << 23;  // whose sums int32 holds: 2 * 127 * 2^23 < 2^31

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class Granularity : int { tensor, row, group };  // one scale for the matrix, a row, or 128 neighbours in a row

// A packed matrix. Memory is the caller's, aligned to 64 bytes.
struct TernaryMatrix {
  const uint8_t* codes;  // ceil(rows / 16) panels of `blocks()` blocks
  const float* scales;   // multiplies to dequantise: [1], [rows] or, a group's 16 rows side by side, [panels(), groups(), 16]
  int64_t rows, columns;
  Granularity granularity;

  int64_t panels() const { return ceil_div(rows, kPanelRows); }
  int64_t blocks() const { return ceil_div(columns, kBlockColumns); }
  int64_t groups() const { return ceil_div(columns, kGroup); }
  int64_t bytes() const { return panels() * blocks() * kBlockBytes; }
  const float* group_scales(int64_t panel, int64_t group) const { return scales + (panel * groups() + group) * kPanelRows; }
};

// Quantised activations of some tokens.
struct Activations {
  const int8_t* codes;   // [tokens, stride], zero from `columns` to the end of the last block
  const float* scales;   // [tokens], multiplies to dequantise
  const int32_t* sums;   // [tokens, groups()]: of the codes of each 128 columns
  int64_t tokens, stride;  // stride: at least 16 * blocks(), a multiple of 64
};

enum class Isa : int { scalar, avx2, avxvnni, avx512, amx, neon, dotprod, i8mm };

// One instruction set's kernels. Every one gives the scalar one's integers, and its floats up to the order of sums over groups.
struct Kernels {
  Isa isa;

  // Quantises one token as training does: q = round_half_even(x * inverse), scale = 1 / inverse, where
  // inverse = 1 / max(absmax, 1e-5) * 127 is rounded twice: so torch divides a number by a tensor.
  // `codes` has room for a whole stride and is zero beyond `columns`. Returns false, and writes nothing, for a NaN or infinity.
  bool (*quantize)(const float* x, int64_t columns, int64_t stride, int8_t* codes, float* scale, int32_t* sums);

  // y[token * y_stride + row] = sum * (activation scale * weight scale) of the rows of panels [begin, end).
  // With a scale a group: the float32 sum over groups of sum * weight scale, times the activation scale.
  void (*matmul)(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, float* y, int64_t y_stride);

  // The same without scales: the integers themselves, whatever the granularity.
  void (*matmul_integer)(const TernaryMatrix& w, const Activations& x, int64_t begin, int64_t end, int32_t* y, int64_t y_stride);
};

const char* name_of(Isa isa);         // null behind the last one
bool available(Isa isa);              // compiled in, and this processor has it
const Kernels* kernels_of(Isa isa);   // null where it is not available
Isa best_isa();                       // the fastest one that is available
const Kernels* kernels_named(const char* name);  // null for an unknown or unavailable name

extern const Kernels kScalar;
extern const Kernels kAvx2, kAvxVnni, kAvx512, kAmx;  // x86 only
extern const Kernels kNeon, kDotprod, kI8mm;  // 64-bit Arm

// Packs int8 codes [rows, columns] in {-1, 0, 1}. Returns false at any other value.
bool pack(const int8_t* weights, int64_t rows, int64_t columns, uint8_t* out);
void unpack(const uint8_t* codes, int64_t rows, int64_t columns, int8_t* out);

}  // namespace wf
