#include "ternary/floats.h"

namespace wf {

const FloatKernels& float_kernels(Isa isa) {
#ifdef WF_X86
  if (isa == Isa::avx2 || isa == Isa::avxvnni) return kAvx2Floats;
  if (isa == Isa::avx512) return kAvx512Floats;
  if (isa == Isa::amx) return kAmxFloats;
#elif defined(__aarch64__)
  if (isa != Isa::scalar) return kNeonFloats;
#else
  static_cast<void>(isa);
#endif
  return kScalarFloats;
}

}  // namespace wf
