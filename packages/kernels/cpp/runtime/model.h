// A decoder's weights and shape, as a GGUF file says them.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "runtime/gguf.h"
#include "ternary/blocks_product.h"
#include "ternary/floats.h"
#include "ternary/low_rank.h"
#include "ternary/product.h"

namespace wf {

// An RMSNorm; no gain, no norm.
struct Norm {
  std::vector<float> gain;
  float epsilon = 0;

  explicit operator bool() const { return !gain.empty(); }
};

// A ternary layer: y = (q Tᵀ) scales + bias + U Vᵀ x of the input x after `norm` and rotation, whose int8 codes are q.
struct Linear {
  SharedMatrix matrix;
  std::vector<float> bias;
  Norm norm;
  bool rotated = false;
  std::shared_ptr<const LowRank> correction;  // U and V; null: there is none

  int64_t rows() const { return matrix->view.rows; }
  int64_t columns() const { return matrix->view.columns; }
  bool changes_input() const { return norm || rotated; }
};

struct Layer {
  Norm attention_norm, query_norm, key_norm, attention_sub_norm, post_attention_norm, mlp_norm, mlp_sub_norm, post_mlp_norm;
  Linear query, key, value, output, gate, up, down;
  int64_t window = 0;      // how many positions a query sees, itself included; 0: all
  bool local_rope = false;  // whether the frequencies are those of sliding layers
};

// How a model fills in masked tokens; none has a block size of 0 and no mask token (-1).
struct Diffusion {
  int64_t mask_token = -1, block_size = 0;
  bool token_shift = false;
};

struct Model {
  std::shared_ptr<const MappedFile> mapping;  // keeps `embedding` and `head` alive
  std::string architecture, family;
  int64_t width = 0, heads = 0, kv_heads = 0, head_width = 0, ffn = 0, vocabulary = 0, context = 0;
  float attention_scale = 0, embedding_scale = 1, logit_cap = 0;  // no cap: 0
  Activation activation = Activation::silu;
  bool neighbour_rope = false;  // the pairs of `rope` are neighbours, and rows of q and k are in the file's order
  std::vector<float> frequencies, local_frequencies;  // [head_width / 2], radians a position
  std::vector<Layer> layers;
  Norm output_norm;
  Tensor embedding, head;    // [vocabulary, width], as the file holds them
  SharedBlocks head_blocks;  // the head once more, for the kernels, if they know its type
  Diffusion diffusion;
};

// Builds a model from a file, whose bytes must live as long as it: `mapping` keeps them alive, where they are mapped.
//
// Reads what `bitnet_arch.gguf.from_gguf` reads, and computes what the model that it returns computes. Every tensor is needed, and has
// the shape that the keys ask for; keys that ask for what is not computed (`uncomputed_keys`) are refused.
Result<std::shared_ptr<const Model>> load_model(const Gguf& file, std::shared_ptr<const MappedFile> mapping = nullptr);
Result<std::shared_ptr<const Model>> load_model(const std::string& path);

}  // namespace wf
