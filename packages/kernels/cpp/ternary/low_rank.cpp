#include "ternary/low_rank.h"

#include <algorithm>

#include "ternary/low_rank_panels.h"

namespace wf {
namespace {

// [outputs, inputs], strides in numbers, as panels.
template <typename T>
Buffer<T> panels_of(const T* from, int64_t outputs, int64_t inputs, int64_t output_stride, int64_t input_stride) {
  const int64_t count = ceil_div(outputs, kPanelRows) * inputs * kPanelRows;
  auto to = allocate<T>(count);
  std::fill_n(to.get(), count, T{0});
  for (int64_t output = 0; output < outputs; ++output) {
    T* column = to.get() + output / kPanelRows * inputs * kPanelRows + output % kPanelRows;
    for (int64_t input = 0; input < inputs; ++input) column[input * kPanelRows] = from[output * output_stride + input * input_stride];
  }
  return to;
}

PanelProduct panel_product_of([[maybe_unused]] const Kernels& kernels) {
#ifdef WF_X86
  if (kernels.isa == Isa::avx512 || kernels.isa == Isa::amx) return low_rank_avx512;
  if (kernels.isa == Isa::avx2 || kernels.isa == Isa::avxvnni) return low_rank_avx2;
#endif
  return low_rank_baseline;
}

}  // namespace

LowRank::LowRank(AdapterType type_, const void* u, const void* v, const float* u_scales, const float* v_scales, int64_t rows_,
                 int64_t columns_, int64_t rank_)
    : scales(allocate<float>(rank_)), type(type_), rows(rows_), columns(columns_), rank(rank_) {
  if (type == AdapterType::f16) {
    u16 = panels_of(static_cast<const uint16_t*>(u), rows, rank, rank, 1);
    v16 = panels_of(static_cast<const uint16_t*>(v), rank, columns, 1, rank);
  } else {
    u8 = panels_of(static_cast<const int8_t*>(u), rows, rank, rank, 1);
    v8 = panels_of(static_cast<const int8_t*>(v), rank, columns, 1, rank);
  }
  for (int64_t i = 0; i < rank; ++i) {
    scales[i] = (u_scales == nullptr ? 1.0F : u_scales[i]) * (v_scales == nullptr ? 1.0F : v_scales[i]);
  }
}

void low_rank_baseline(AdapterType type, const void* panels, int64_t outputs, int64_t inputs, const float* x, int64_t x_stride,
                       int64_t tokens, float* out, int64_t out_stride, bool add) {
  either(type, panels, outputs, inputs, x, x_stride, tokens, out, out_stride, add);
}

void add_low_rank(const Kernels& kernels, const LowRank& adapters, const float* x, int64_t tokens, float* y) {
  const PanelProduct product = panel_product_of(kernels);
  const AdapterType type = adapters.type;
  const bool half = type == AdapterType::f16;
  const void* u = half ? static_cast<const void*>(adapters.u16.get()) : adapters.u8.get();
  const void* v = half ? static_cast<const void*>(adapters.v16.get()) : adapters.v8.get();
  const int64_t stride = ceil_div(adapters.rank, kPanelRows) * kPanelRows;
  const auto inner = allocate<float>(tokens * stride);
  product(type, v, adapters.rank, adapters.columns, x, adapters.columns, tokens, inner.get(), stride, false);
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t i = 0; i < adapters.rank; ++i) inner[token * stride + i] *= adapters.scales[i];
  }
  product(type, u, adapters.rows, adapters.rank, inner.get(), stride, tokens, y, adapters.rows, true);
}

}  // namespace wf
