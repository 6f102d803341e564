// AVX2. `vpmaddubsw` sums pairs into 16 bits: at most 2 * 2 * 127 of plain codes, 2 * 8 * 127 of a plane with its factor of 4.
#include <immintrin.h>

#include <cstdint>

namespace wf {
namespace {

constexpr int64_t kFlushBlocks = 8;   // 2 * 2032 * 8 = 32 512 fits
constexpr int64_t kSliceBlocks = 16;  // 4 * 508 * 16 = 32 512 fits
constexpr int kStreams = 2;

[[gnu::always_inline]] inline __m256i dot(__m256i sum, __m256i codes, __m256i x) {
  const __m256i product = _mm256_maddubs_epi16(codes, x);
#ifdef __clang__
  return _mm256_add_epi16(sum, product);
#else
  __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(product));  // in place: gcc 12 copies every accumulator otherwise
  return sum;
#endif
}

[[gnu::always_inline]] inline __m256i widen(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

}  // namespace
}  // namespace wf

#include "ternary/vector256.h"

namespace wf {

const Kernels kAvx2{Isa::avx2, quantize, matmul, matmul_integer};

}  // namespace wf
