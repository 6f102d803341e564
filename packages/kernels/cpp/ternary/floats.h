// Kernels on float32 activations: what surrounds the ternary products of a decoder.
#pragma once

#include "ternary/blocks.h"
#include "ternary/kv.h"

namespace wf {

// What rows of floats are stored as.
enum class RowType : int { f32, f16, bf16 };

constexpr int64_t bytes_of(RowType type) { return type == RowType::f32 ? 4 : 2; }

enum class Activation : int { silu, relu2, gelu_tanh };

// 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x³); this is 2u.
constexpr float kGeluInner = 1.5957691216057308F, kGeluCubic = 0.044715F;

// One instruction set's kernels. They agree with the scalar ones up to the order of float32 sums.
struct FloatKernels {
  // Makes what `matmul_blocks` takes of finite float32 x [tokens, columns], which is so many bytes, aligned to 64.
  int64_t (*arranged_bytes)(const BlockMatrix& w, int64_t tokens);
  void (*arrange)(const BlockMatrix& w, const float* x, int64_t tokens, void* out);

  // y[token * y_stride + row] of the rows of panels [begin, end). A token's results are the same whatever comes with it.
  void (*matmul_blocks)(const BlockMatrix& w, const BlockActivations& x, int64_t begin, int64_t end, float* y, int64_t y_stride);

  // y[token * y_stride + row] = row · x[token] of `count` rows, [count, columns], and float32 x [tokens, columns].
  void (*matmul_rows)(RowType type, const uint8_t* rows, int64_t count, int64_t columns, const float* x, int64_t tokens, float* y,
                      int64_t y_stride);

  // y = x / sqrt(mean(x²) + epsilon) * weight; no weight where it is null. y may be x.
  void (*rms_norm)(const float* x, const float* weight, int64_t columns, float epsilon, float* y);

  // Rotates pairs (i, i + half) of each of `heads` vectors, `head_dim` apart, in place, by the angles of one position (NEOX's order):
  // (a, b) becomes (a cos - b sin, b cos + a sin). What lies beyond 2 * half stays.
  void (*rope)(float* x, const float* cos, const float* sin, int64_t heads, int64_t head_dim, int64_t half);

  // Writes a position's key and value of a head as `store_kv` (kv.h) does, which is the scalar one.
  void (*store)(const KvCache& cache, int64_t head, int64_t position, const float* key, const float* value);

  // out[h] = sum over positions p in [first, last) of softmax(scale * q[h] · key[p]) * value[p] for the `group` query heads h,
  // [group, head_dim], that share a head of keys and values. The range is the mask: it ends behind the query's position (causal) or with
  // its block (bidirectional within one), and begins, and then also ends, within a window of it (sliding). An empty range gives zeros.
  // Allocates nothing: threads of the pool run it, where memory that runs out would end the process.
  void (*attention)(const KvCache& cache, int64_t kv_head, const float* q, int64_t group, int64_t first, int64_t last, float scale,
                    float* out);

  // gate = activation(gate) · up
  void (*activate)(Activation kind, float* gate, const float* up, int64_t count);

  float (*dot)(const float* a, const float* b, int64_t count);

  // y += x
  void (*accumulate)(float* y, const float* x, int64_t count);
};

// The kernels that go with an instruction set that is available; the scalar ones where it has none of its own.
const FloatKernels& float_kernels(Isa isa);

extern const FloatKernels kScalarFloats;
extern const FloatKernels kAvx2Floats, kAvx512Floats, kAmxFloats;  // x86 only
extern const FloatKernels kNeonFloats;                             // 64-bit Arm

}  // namespace wf
