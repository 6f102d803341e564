#include "ternary/low_rank.h"

#include <algorithm>

#include "ternary/low_rank_panels.h"

namespace wf {
namespace {

// [outputs, inputs], strides in numbers, as panels.
template <typename T>
Buffer<std::byte> panels_of(const T* from, int64_t outputs, int64_t inputs, int64_t output_stride, int64_t input_stride) {
  const int64_t count = ceil_div(outputs, kPanelRows) * inputs * kPanelRows;
  auto memory = allocate<std::byte>(count * static_cast<int64_t>(sizeof(T)));
  T* to = reinterpret_cast<T*>(memory.get());
  for (int64_t first = 0; first < outputs; first += kPanelRows) {
    for (int64_t input = 0; input < inputs; ++input, to += kPanelRows) {
      for (int64_t i = 0; i < kPanelRows; ++i) {
        to[i] = first + i < outputs ? from[(first + i) * output_stride + input * input_stride] : T{0};
      }
    }
  }
  return memory;
}

PanelProduct panel_product_of([[maybe_unused]] const Kernels& kernels) {
#ifdef WF_X86
  if (kernels.isa == Isa::avx512 || kernels.isa == Isa::amx) return low_rank_avx512;
  if (kernels.isa == Isa::avx2 || kernels.isa == Isa::avxvnni) return low_rank_avx2;
#endif
  return low_rank_baseline;
}

}  // namespace

LowRank::LowRank(AdapterType type_, const void* from_u, const void* from_v, const float* u_scales, const float* v_scales, int64_t rows_,
                 int64_t columns_, int64_t rank_)
    : scales(allocate<float>(rank_)), type(type_), rows(rows_), columns(columns_), rank(rank_) {
  const auto pack = [&](auto number) {
    using T = decltype(number);
    u = panels_of(static_cast<const T*>(from_u), rows, rank, rank, 1);
    v = panels_of(static_cast<const T*>(from_v), rank, columns, 1, rank);
  };
  if (type == AdapterType::f16) pack(uint16_t{});
  if (type == AdapterType::f32) pack(float{});
  if (type == AdapterType::i8) pack(int8_t{});
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
  const int64_t stride = ceil_div(adapters.rank, kPanelRows) * kPanelRows;
  const auto inner = allocate<float>(tokens * stride);
  product(adapters.type, adapters.v.get(), adapters.rank, adapters.columns, x, adapters.columns, tokens, inner.get(), stride, false);
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t i = 0; i < adapters.rank; ++i) inner[token * stride + i] *= adapters.scales[i];
  }
  product(adapters.type, adapters.u.get(), adapters.rows, adapters.rank, inner.get(), stride, tokens, y, adapters.rows, true);
}

}  // namespace wf
