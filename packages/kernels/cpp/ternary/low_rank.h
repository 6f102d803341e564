// A low-rank correction of a product: y += U (Vᵀ x), in float32 of the activations before they are quantised.
//
// U [rows, rank] and V [columns, rank] are float16, float32, or int8 with a scale for each of their columns. Both are kept as panels of
// 16 outputs, so that a product never adds across lanes: V as panels of the rank with `columns` inputs, U as panels of rows with `rank`
// inputs; panel, input, 16 outputs, padded with zeros.
#pragma once

#include <cstddef>
#include <memory>

#include "ternary/memory.h"
#include "ternary/ternary.h"

namespace wf {

enum class AdapterType : int { f16, i8, f32 };

struct LowRank {
  Buffer<std::byte> u, v;  // panels of the type's numbers
  Buffer<float> scales;    // [rank]: U's times V's; 1 but for int8
  AdapterType type;
  int64_t rows, columns, rank;

  // Row-major U and V in the type's numbers; null scales stand for 1.
  LowRank(AdapterType type, const void* u, const void* v, const float* u_scales, const float* v_scales, int64_t rows, int64_t columns,
          int64_t rank);

  int64_t inner_stride() const { return ceil_div(rank, kPanelRows) * kPanelRows; }  // of Vᵀ x, padded to whole panels
};

// y[token * rows + row] += U (Vᵀ x) of float32 x [tokens, columns]. The order of sums depends on neither tokens nor instruction set.
void add_low_rank(const Kernels& kernels, const LowRank& adapters, const float* x, int64_t tokens, float* y);
// The same on the threads of the pool, if that is worth it. A thread that comes late may still read adapters when their owner has gone.
void add_low_rank(const Kernels& kernels, const std::shared_ptr<const LowRank>& adapters, const float* x, int64_t tokens, float* y);

// out[token * out_stride + i] (= or +=) sum over inputs of panels * x[token * x_stride + input], for the panels' `outputs` outputs;
// out has room for whole panels unless it is added to. One function for each kind of processor.
using PanelProduct = void (*)(AdapterType type, const void* panels, int64_t outputs, int64_t inputs, const float* x, int64_t x_stride,
                              int64_t tokens, float* out, int64_t out_stride, bool add);
void low_rank_baseline(AdapterType, const void*, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t, bool);
#ifdef WF_X86
void low_rank_avx2(AdapterType, const void*, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t, bool);
void low_rank_avx512(AdapterType, const void*, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t, bool);
#endif

}  // namespace wf
