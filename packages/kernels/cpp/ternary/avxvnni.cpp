// AVX-VNNI: `vpdpbusd` of 256 bits, for processors that have no AVX-512.
#include <immintrin.h>

#include <cstdint>

namespace wf {
namespace {

constexpr int64_t kFlushBlocks = 131'072;  // 2 * 4 * 8 * 127 * 131 072 is below 2^31
constexpr int64_t kSliceBlocks = 16;       // unpacked, 4 KiB of the first-level cache
constexpr int kStreams = 2;

[[gnu::always_inline]] inline __m256i dot(__m256i sum, __m256i codes, __m256i x) {
#ifdef __clang__
  return _mm256_dpbusd_avx_epi32(sum, codes, x);
#else
  // gcc 12 copies every accumulator around the intrinsic, which halves the speed.
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(x));
  return sum;
#endif
}

[[gnu::always_inline]] inline __m256i widen(__m256i sum) { return sum; }

}  // namespace
}  // namespace wf

#include "ternary/vector256.h"

namespace wf {

const Kernels kAvxVnni{Isa::avxvnni, quantize, matmul, matmul_integer};

}  // namespace wf
