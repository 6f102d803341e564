// What the vector kernels share: a product cut into chunks of tokens. Included by one file an instruction set, each of which needs a
// copy of its own, hence the anonymous namespace: the linker would keep one copy for all, and older processors would stop at it.
#pragma once

#include "ternary/ternary.h"

#define WF_INLINE [[gnu::always_inline]] inline

namespace wf {
namespace {

constexpr int64_t kGroupBlocks = kGroup / kBlockColumns;
constexpr int64_t kChunkBytes = 512 * 1024;  // activations that stay in the second-level cache while panels pass
constexpr int64_t kChunkTokens = 512;
constexpr int64_t kTileTokens = 8;

enum class Output { integer, scaled, grouped };

// One chunk of a product.
struct Product {
  TernaryMatrix w;
  Activations x;
  void* y;  // of the chunk's first token: int32_t for Output::integer, else float
  int64_t y_stride;
  int32_t totals[kChunkTokens];  // sums of the tokens' codes
};

WF_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The address of 16 results, of which the last panel's may not all exist.
template <typename Value>
WF_INLINE Value* result(const Product& product, int64_t panel, int64_t token) {
  return static_cast<Value*>(product.y) + token * product.y_stride + panel * kPanelRows;
}

// Calls `panels(product)` for every chunk.
template <typename Value, typename Panels>
WF_INLINE void for_chunks(const TernaryMatrix& w, const Activations& x, Value* y, int64_t y_stride, Panels panels) {
  const int64_t fit = kChunkBytes / x.stride / kTileTokens * kTileTokens;
  const int64_t chunk = fit < kTileTokens ? kTileTokens : least(fit, kChunkTokens);
  const int64_t groups = w.groups();
  Product product;
  product.w = w;
  product.y_stride = y_stride;
  for (int64_t first = 0; first < x.tokens; first += chunk) {
    product.x = {x.codes + first * x.stride, x.scales + first, x.sums + first * groups, least(x.tokens - first, chunk), x.stride};
    product.y = y + first * y_stride;
    for (int64_t token = 0; token < product.x.tokens; ++token) {
      int32_t total = 0;
      for (int64_t group = 0; group < groups; ++group) total += product.x.sums[token * groups + group];
      product.totals[token] = total;
    }
    panels(product);
  }
}

}  // namespace
}  // namespace wf
