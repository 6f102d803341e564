#include "ternary/low_rank_panels.h"

namespace wf {

void low_rank_avx2(AdapterType type, const void* panels, int64_t outputs, int64_t inputs, const float* x, int64_t x_stride, int64_t tokens,
                 float* out, int64_t out_stride, bool add) {
  either(type, panels, outputs, inputs, x, x_stride, tokens, out, out_stride, add);
}

}  // namespace wf
