// The float arithmetic of a decoder, on rows of float32. Sums have an order of their own, the same on every processor.
#pragma once

#include <cstdint>

namespace wf {

enum class Activation : int { silu, relu2, gelu_tanh };

float dot(const float* a, const float* b, int64_t count);

// gate = activation(gate) · up
void activate(Activation kind, float* gate, const float* up, int64_t count);

// The block Hadamard rotation of `bitnet_arch.hadamard`, in place: blocks of the largest power of two that divides `count`.
void rotate(float* x, int64_t count);

// Turns pairs of a head's numbers by angles: (i, i + width / 2), or with `neighbours` (2i, 2i + 1). cos and sin are [width / 2].
void rope(float* head, int64_t width, const float* cos, const float* sin, bool neighbours);

// Softmax of scores in place.
void softmax(float* scores, int64_t count);

// y += alpha · x
void add_scaled(float* y, const float* x, float alpha, int64_t count);

}  // namespace wf
