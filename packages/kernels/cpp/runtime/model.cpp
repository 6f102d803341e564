#include "runtime/model.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <map>
#include <set>

#include "runtime/keys.h"
#include "runtime/numbers.h"
#include "runtime/repack.h"

namespace wf {
namespace {

constexpr int64_t kMost = (1LL << 31) - 1;  // of any size
constexpr int64_t kMostHeadWidth = 1 << 16;
constexpr const char* kOurs = "wrinklefree";
constexpr const char* kFactors = "rope_freqs.weight";
constexpr int64_t kGemmaPattern = 6;        // llama.cpp's: all but every sixth layer slide
constexpr int64_t kGemma27bLayers = 62;     // by which llama.cpp knows it, and scales attention by width / heads

const std::map<std::string, std::string, std::less<>> kFamilies = {
    {"bitnet", "bitnet"}, {"bitnet-25", "bitnet"}, {"bitnet-b1.58", "bitnet"}, {"llama", "llama"},
    {"qwen2", "qwen2"},   {"qwen3", "qwen3"},      {"gemma3", "gemma3_text"},
};

// Takes tensors out of a file by name, checks their shapes, and knows at the end which ones nobody wanted.
class Tensors {
 public:
  Tensors(const Gguf& file, Keys& keys) : file_(file), keys_(keys) {}

  bool has(const std::string& name) const { return file_.tensor(name) != nullptr; }

  const Tensor* take(const std::string& name, const std::vector<int64_t>& shape) {
    const Tensor* tensor = file_.tensor(name);
    if (tensor == nullptr) {
      keys_.fail("it has no tensor " + name);
    } else if (tensor->shape != shape) {
      keys_.fail("its tensor " + name + " has another shape than its keys ask for");
      tensor = nullptr;
    }
    taken_.insert(name);
    return tensor;
  }

  // Finite float32 numbers; empty after a mistake.
  std::vector<float> floats(const std::string& name, const std::vector<int64_t>& shape) {
    const Tensor* tensor = take(name, shape);
    if (tensor == nullptr) return {};
    std::vector<float> values(static_cast<size_t>(tensor->elements()));
    for (int64_t row = 0; row < tensor->rows(); ++row) float_row(*tensor, row, values.data() + row * tensor->columns());
    if (!std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); })) {
      fail_finite(name);
      return {};
    }
    return values;
  }

  // Of a float tensor that is there, and is not turned into float32 as a whole.
  void check_finite(const std::string& name) {
    if (!keys_.error() && !all_finite(*file_.tensor(name))) fail_finite(name);
  }

  SharedMatrix matrix(const std::string& stem, int64_t rows, int64_t columns) {
    if (take(stem + "weight", {rows, columns}) == nullptr || keys_.error()) return nullptr;
    taken_.insert(stem + "scale");
    auto made = repack(file_, stem);
    if (!made) {
      keys_.fail(made.error());
      return nullptr;
    }
    return *made;
  }

  void refuse_others() {
    for (const auto& [name, tensor] : file_.tensors()) {
      if (taken_.count(std::string(name)) == 0) {
        keys_.fail("it holds the tensor " + quoted(name) + ", which a model of its keys has not");
        return;
      }
    }
  }

 private:
  void fail_finite(const std::string& name) { keys_.fail("its tensor " + name + " holds values that are no numbers"); }

  const Gguf& file_;
  Keys& keys_;
  std::set<std::string> taken_;
};

class Loader {
 public:
  Loader(const Gguf& file, std::string architecture) : file_(file), keys_(file, architecture), tensors_(file, keys_) {
    model_.architecture = std::move(architecture);
  }

  Result<std::shared_ptr<const Model>> load() {
    read_shape();
    if (!keys_.error()) read_rope();
    if (!keys_.error()) read_windows();
    if (!keys_.error()) read_outside();
    for (size_t i = 0; i < model_.layers.size() && !keys_.error(); ++i) read_layer(static_cast<int64_t>(i));
    if (!keys_.error()) tensors_.refuse_others();
    if (keys_.error()) return *keys_.error();
    return std::shared_ptr<const Model>(std::make_shared<Model>(std::move(model_)));
  }

 private:
  bool ours() const { return model_.architecture == kOurs; }
  bool gemma() const { return model_.family == "gemma3_text"; }
  bool bitnet() const { return model_.family == "bitnet"; }

  void read_shape() {
    Model& m = model_;
    m.family = ours() ? keys_.choice("family", {"bitnet", "gemma3_text", "llama", "qwen2", "qwen3"}, "llama")
                      : kFamilies.find(m.architecture)->second;
    keys_.refuse_uncomputed();
    const auto layers = keys_.integer("block_count", 1, static_cast<int64_t>(file_.tensors().size()));
    m.width = keys_.integer("embedding_length", 1, kMostColumns);
    m.heads = keys_.integer("attention.head_count", 1, kMost);
    m.kv_heads = keys_.integer("attention.head_count_kv", 1, m.heads, m.heads);
    m.head_width = keys_.integer("attention.key_length", 2, kMostHeadWidth, m.width / m.heads);
    m.ffn = keys_.integer("feed_forward_length", 1, kMostColumns);
    m.context = keys_.integer("context_length", 1, kMost);
    epsilon_ = static_cast<float>(keys_.real("attention.layer_norm_rms_epsilon"));
    if (keys_.error()) return;
    m.layers.resize(static_cast<size_t>(layers));
    if (!(epsilon_ >= 0)) keys_.fail("the epsilon of its norms is negative");
    if (m.heads * m.head_width > kMostColumns) keys_.fail("its heads together are wider than " + std::to_string(kMostColumns));
    if (m.heads % m.kv_heads != 0) keys_.fail("its key and value heads do not divide its heads");
    if (m.head_width < 2 || m.head_width > kMostHeadWidth || m.head_width % 2 != 0) keys_.fail("its heads have a width that rotary positions cannot turn");
    for (const char* key : {"attention.value_length", "rope.dimension_count"}) {
      if (keys_.integer(key, 1, kMost, m.head_width) != m.head_width) {
        keys_.fail("its heads have keys, values and rotary positions of different widths");
      }
    }
    if ((bitnet() || m.family == "qwen2") && m.heads * m.head_width != m.width) {
      keys_.fail("its heads do not fill its width, as those of the family " + m.family + " do");
    }
    m.neighbour_rope = m.architecture == "llama";
    read_arithmetic(layers);
    if (ours()) read_form();
  }

  void read_arithmetic(int64_t layers) {
    Model& m = model_;
    const std::map<std::string, Activation> names = {
        {"silu", Activation::silu}, {"relu2", Activation::relu2}, {"gelu_tanh", Activation::gelu_tanh}};
    const bool microsoft = m.architecture == "bitnet-25" || m.architecture == "bitnet-b1.58";
    const std::string usual = microsoft ? "relu2" : gemma() ? "gelu_tanh" : "silu";
    m.activation = names.at(ours() ? keys_.choice("activation", {"silu", "relu2", "gelu_tanh"}, usual) : usual);
    const double root = std::sqrt(static_cast<double>(m.width));
    double scale = 1 / std::sqrt(static_cast<double>(m.head_width));
    if (gemma()) {
      m.embedding_scale = static_cast<float>(root);
      if (!ours() && layers == kGemma27bLayers) scale = 1 / std::sqrt(static_cast<double>(m.width / m.heads));
      m.logit_cap = static_cast<float>(keys_.real("logit_softcap", 0.0));
      // Transformers' Gemma 3 computes no cap of attention, whatever its configuration says.
      if (!(m.logit_cap >= 0) || !(keys_.real("attention.logit_softcap", 0.0) >= 0)) keys_.fail("a cap of its logits is negative");
    } else if (keys_.find("logit_softcap") != nullptr || keys_.find("attention.logit_softcap") != nullptr) {
      keys_.fail("it caps logits, which no model of the family " + m.family + " does");
    }
    const double asked = keys_.real("embedding_scale", gemma() ? root : 1.0);
    if (std::fabs(asked / (gemma() ? root : 1.0) - 1) > 1e-6) keys_.fail("it scales its embeddings otherwise than its family does");
    const double attention = keys_.real("attention.scale", scale);
    if (!(attention > 1e-6 && attention < 1e3)) keys_.fail("it scales attention by " + std::to_string(attention));
    if (!(gemma() && ours()) && std::fabs(attention / scale - 1) > 1e-6) keys_.fail("it scales attention otherwise than its family does");
    m.attention_scale = static_cast<float>(attention);
  }

  void read_form() {
    norms_ = keys_.choice("norm_placement", {"none", "subln", "bitlinear", "allnorm"}, "none");
    if (bitnet() && norms_ == "subln") norms_ = "none";  // its own norms, not added ones
    rotation_ = keys_.flag("rotation", false);
    granularity_ = keys_.choice("scale_granularity", {"tensor", "row", "group128"}, "tensor");
    read_rank();
    keys_.expect("attention.qk_norm", model_.family == "qwen3" || gemma());
    keys_.expect("attention.bias", model_.family == "qwen2" || tensors_.has("blk.0.attn_output.bias"));
    keys_.expect("post_norms", gemma());
    if (keys_.integer("activation_bits", 1, 64, 8) != 8) keys_.fail("its activations have not 8 bits");
    if (keys_.find("diffusion.mask_token_id") != nullptr) {
      model_.diffusion.mask_token = keys_.integer("diffusion.mask_token_id", 0, kMost);
      model_.diffusion.block_size = keys_.integer("diffusion.block_size", 0, kMost, 0);
      if (keys_.find("diffusion.token_shift") == nullptr) keys_.fail_key("diffusion.token_shift", "is missing");
      model_.diffusion.token_shift = keys_.flag("diffusion.token_shift", false);
    } else if (keys_.find("diffusion.block_size") != nullptr || keys_.find("diffusion.token_shift") != nullptr) {
      keys_.fail_key("diffusion.mask_token_id", "is missing");
    }
  }

  // The rank of the low-rank correction: a whole number, or a share of each matrix's smaller side; 0: there is none.
  void read_rank() {
    const Value* value = keys_.find("lrc.rank");
    if (value == nullptr) return;
    if (!std::holds_alternative<double>(*value)) {
      rank_ = keys_.integer("lrc.rank", 0, kMost);
      return;
    }
    // The decimal number that was written, of which the file has the nearest of 32 bits.
    char text[64] = {};
    std::to_chars(text, text + sizeof text - 1, static_cast<float>(keys_.real("lrc.rank")));
    share_ = std::strtod(text, nullptr);
    if (!(share_ > 0 && share_ < 1)) keys_.fail_key("lrc.rank", "is neither a rank nor a share between 0 and 1");
  }

  int64_t rank_of(int64_t rows, int64_t columns) const {
    const int64_t smaller = std::min(rows, columns);
    // Halves are rounded to even, as Python does it.
    return share_ > 0 ? std::max<int64_t>(1, static_cast<int64_t>(std::nearbyint(share_ * static_cast<double>(smaller)))) : rank_;
  }

  void read_rope() {
    const double base = keys_.real("rope.freq_base", 10'000.0), local = keys_.real("rope.freq_base_swa", 10'000.0);
    const std::string kind = keys_.choice("rope.scaling.type", {"none", "linear"}, "none");
    const bool factors = tensors_.has(kFactors) && (ours() || model_.architecture == "llama"), linear = kind == "linear";
    const double factor = linear || keys_.find("rope.scaling.factor") != nullptr ? keys_.real("rope.scaling.factor") : 1.0;
    if (!linear && factor != 0 && factor != 1) keys_.fail_key("rope.scaling.factor", "is there, but rope.scaling.type is not linear");
    if (linear && factors) keys_.fail("it scales its rotary positions both by a factor and by " + std::string(kFactors));
    if (!gemma() && keys_.find("rope.freq_base_swa") != nullptr && local != base) {
      keys_.fail_key("rope.freq_base_swa", "is for sliding layers, which have the same base in its family");
    }
    if (!(base > 0 && local > 0 && (!linear || factor > 0))) keys_.fail("its rotary positions have a base or a factor that is not above 0");
    if (keys_.error()) return;
    const int64_t pairs = model_.head_width / 2;
    const std::vector<float> divisors = factors ? tensors_.floats(kFactors, {pairs}) : std::vector<float>();
    if (keys_.error()) return;
    for (int64_t i = 0; i < pairs; ++i) {
      // In float32, as transformers computes them.
      const float exponent = static_cast<float>(2 * i) / static_cast<float>(model_.head_width);
      const auto frequency = [&](double of) { return 1.0F / static_cast<float>(std::pow(static_cast<float>(of), exponent)); };
      const float divisor = factors ? divisors[static_cast<size_t>(i)] : linear ? static_cast<float>(factor) : 1.0F;
      model_.frequencies.push_back(frequency(base) / divisor);
      model_.local_frequencies.push_back(gemma() ? frequency(local) : model_.frequencies.back());
      if (!std::isfinite(model_.frequencies.back())) keys_.fail("its rotary positions are scaled by what is no number above 0");
    }
  }

  void read_windows() {
    const int64_t window = keys_.integer("attention.sliding_window", 0, kMost, 0);
    const Value* pattern = keys_.find("attention.sliding_window_pattern");
    const bool may_slide = gemma() || (ours() && !bitnet() && model_.family != "llama");
    std::vector<bool> slides(model_.layers.size());
    for (size_t i = 0; gemma() && window > 0 && i < slides.size(); ++i) slides[i] = (static_cast<int64_t>(i) + 1) % kGemmaPattern != 0;
    if (pattern != nullptr && ours()) {
      const auto* array = std::get_if<Array>(pattern);
      if (array != nullptr) slides = booleans(*array);
      if (array == nullptr || slides.size() != model_.layers.size()) {
        keys_.fail("its sliding_window_pattern does not say for each layer whether it slides");
        return;
      }
    } else if (pattern != nullptr) {
      const auto* number = std::get_if<int64_t>(pattern);
      if (!gemma() || number == nullptr || *number != kGemmaPattern) keys_.fail_key("attention.sliding_window_pattern", "is not that of its family");
    } else if (ours() && window > 0 && may_slide && !gemma()) {
      keys_.fail_key("attention.sliding_window_pattern", "is missing: nothing says which layers slide");
    }
    const bool any = std::count(slides.begin(), slides.end(), true) > 0;
    if (!may_slide && (any || (window > 0 && window < model_.context))) keys_.fail("it has a sliding window, which its family has not");
    // Transformers' configuration has rotary positions of both kinds of Gemma's layers only where there are both.
    if (gemma() && (!any || std::count(slides.begin(), slides.end(), false) == 0)) keys_.fail("all of its layers slide or none, which a Gemma 3 cannot have");
    if (window == 0 && any) keys_.fail("it has layers that slide and no window");
    if (!may_slide) return;
    for (size_t i = 0; i < model_.layers.size(); ++i) {
      model_.layers[i].window = slides[i] ? window : 0;
      model_.layers[i].local_rope = slides[i] && window > 0;
    }
  }

  Norm norm(const std::string& name, int64_t size) { return {tensors_.floats(name, {size}), epsilon_}; }

  void read_outside() {
    const Tensor* embedding = file_.tensor("token_embd.weight");
    if (embedding == nullptr || embedding->shape.size() != 2 || embedding->shape[0] > kMost) {
      keys_.fail("it has no matrix token_embd.weight");
      return;
    }
    model_.vocabulary = embedding->shape[0];
    if (keys_.integer("vocab_size", 1, kMost, model_.vocabulary) != model_.vocabulary) {
      keys_.fail_key("vocab_size", "is not the number of rows of token_embd.weight");
    }
    if (model_.diffusion.mask_token >= model_.vocabulary) keys_.fail("its mask token is none of its tokens");
    const std::vector<int64_t> shape = {model_.vocabulary, model_.width};
    const Tensor* table = tensors_.take("token_embd.weight", shape);
    const Tensor* head = tensors_.has("output.weight") ? tensors_.take("output.weight", shape) : table;
    model_.output_norm = norm("output_norm.weight", model_.width);
    if (keys_.error()) return;
    if (is_ternary(table->type) || is_ternary(head->type)) keys_.fail("its embeddings or its head are ternary, which the decoder does not run");
    for (const char* name : {"token_embd.weight", "output.weight"}) {
      if (tensors_.has(name)) tensors_.check_finite(name);
    }
    if (keys_.error()) return;
    model_.embedding = *table;
    model_.head = *head;
    const std::map<Type, BlockType> blocks = {{Type::q8_0, BlockType::q8_0}, {Type::q6_k, BlockType::q6_k}, {Type::q4_1, BlockType::q4_1}};
    if (const auto known = blocks.find(head->type); known != blocks.end()) {
      const auto* data = reinterpret_cast<const uint8_t*>(head->data.data());
      model_.head_blocks = std::make_shared<const OwnedBlocks>(known->second, data, model_.vocabulary, model_.width);
    }
  }

  void read_layer(int64_t index) {
    Model& m = model_;
    Layer& layer = m.layers[static_cast<size_t>(index)];
    const std::string block = "blk." + std::to_string(index) + ".";
    const int64_t inner = m.heads * m.head_width, kv = m.kv_heads * m.head_width;  // below 2^62
    const bool pre_norms = norms_ != "bitlinear", all = norms_ == "bitlinear" || norms_ == "allnorm", mixing = all || norms_ == "subln";
    const bool attention_bias = tensors_.has("blk.0.attn_output.bias") && m.family != "qwen2";
    const bool qkv_bias = attention_bias || m.family == "qwen2";
    const bool mlp_bias = m.family == "llama" && tensors_.has("blk.0.ffn_gate.bias");
    if (pre_norms) layer.attention_norm = norm(block + "attn_norm.weight", m.width);
    if (m.family == "qwen3" || gemma()) {
      layer.query_norm = norm(block + "attn_q_norm.weight", m.head_width);
      layer.key_norm = norm(block + "attn_k_norm.weight", m.head_width);
    }
    layer.query = linear(block + "attn_q.", inner, m.width, {qkv_bias, all, false});
    layer.key = linear(block + "attn_k.", kv, m.width, {qkv_bias, all, false});
    layer.value = linear(block + "attn_v.", kv, m.width, {qkv_bias, all, false});
    if (bitnet()) layer.attention_sub_norm = norm(block + "attn_sub_norm.weight", inner);
    layer.output = linear(block + "attn_output.", m.width, inner, {attention_bias, mixing, rotation_});
    if (pre_norms) layer.mlp_norm = norm(block + "ffn_norm.weight", m.width);
    if (gemma()) {
      layer.post_attention_norm = norm(block + "post_attention_norm.weight", m.width);
      layer.post_mlp_norm = norm(block + "post_ffw_norm.weight", m.width);
    }
    layer.gate = linear(block + "ffn_gate.", m.ffn, m.width, {mlp_bias, all, false});
    layer.up = linear(block + "ffn_up.", m.ffn, m.width, {mlp_bias, all, false});
    if (bitnet()) layer.mlp_sub_norm = norm(block + "ffn_sub_norm.weight", m.ffn);
    layer.down = linear(block + "ffn_down.", m.width, m.ffn, {mlp_bias, mixing, rotation_});
  }

  struct Parts {
    bool bias, norm, rotated;
  };

  Linear linear(const std::string& stem, int64_t rows, int64_t columns, Parts parts) {
    Linear made;
    made.matrix = tensors_.matrix(stem, rows, columns);
    if (ours() && made.matrix != nullptr && made.matrix->view.granularity > granularity()) {
      keys_.fail_key("scale_granularity", "is " + granularity_ + ", but the scales of " + stem + "weight are finer");
    }
    if (parts.bias) made.bias = tensors_.floats(stem + "bias", {rows});
    if (parts.norm) {
      made.norm.gain = tensors_.floats(stem + "in_norm.weight", {columns});
      const std::vector<float> epsilon = tensors_.floats(stem + "in_norm.eps", {1});
      made.norm.epsilon = epsilon.empty() ? 0 : epsilon[0];
      if (!(made.norm.epsilon >= 0)) keys_.fail("its tensor " + stem + "in_norm.eps is negative");
    }
    made.rotated = parts.rotated;
    if (made.rotated && columns % 2 != 0) keys_.fail("it rotates an input of odd width");
    if ((rank_ > 0 || share_ > 0) && !keys_.error()) read_correction(stem, rows, columns, made);
    return made;
  }

  Granularity granularity() const {
    return granularity_ == "tensor" ? Granularity::tensor : granularity_ == "row" ? Granularity::row : Granularity::group;
  }

  void read_correction(const std::string& stem, int64_t rows, int64_t columns, Linear& made) {
    const int64_t rank = rank_of(rows, columns);
    if (rank > std::min(rows, columns)) {
      keys_.fail_key("lrc.rank", "is above what " + stem + "weight can have");
      return;
    }
    const std::string names[] = {stem + "lrc_u", stem + "lrc_v"};
    const Tensor *u = tensors_.take(names[0], {rows, rank}), *v = tensors_.take(names[1], {columns, rank});
    if (keys_.error()) return;
    if (u->type == Type::f16 && v->type == Type::f16) {
      for (const std::string& name : names) tensors_.check_finite(name);
      if (keys_.error()) return;
      made.correction = std::make_shared<LowRank>(AdapterType::f16, u->data.data(), v->data.data(), nullptr, nullptr, rows, columns, rank);
    } else {
      const std::vector<float> wide_u = tensors_.floats(names[0], {rows, rank}), wide_v = tensors_.floats(names[1], {columns, rank});
      if (keys_.error()) return;
      made.correction = std::make_shared<LowRank>(AdapterType::f32, wide_u.data(), wide_v.data(), nullptr, nullptr, rows, columns, rank);
    }
  }

  const Gguf& file_;
  Keys keys_;
  Tensors tensors_;
  Model model_;
  float epsilon_ = 0;
  std::string norms_ = "none", granularity_ = "tensor";
  bool rotation_ = false;
  int64_t rank_ = 0;
  double share_ = 0;
};

}  // namespace

Result<std::shared_ptr<const Model>> load_model(const Gguf& file, std::shared_ptr<const MappedFile> mapping) {
  const Value* value = file.value("general.architecture");
  const auto* name = value == nullptr ? nullptr : std::get_if<std::string_view>(value);
  if (name == nullptr || (kFamilies.find(*name) == kFamilies.end() && *name != kOurs)) {
    const std::string shown = name == nullptr ? "none" : "'" + quoted(*name) + "'";
    return Error{Kind::model, "the file's architecture is " + shown +
                                  ", and the decoder runs bitnet, bitnet-25, bitnet-b1.58, llama, qwen2, qwen3, gemma3 and wrinklefree"};
  }
  auto model = Loader(file, std::string(*name)).load();
  if (model) std::const_pointer_cast<Model>(*model)->mapping = std::move(mapping);
  return model;
}

Result<std::shared_ptr<const Model>> load_model(const std::string& path) {
  auto mapping = MappedFile::open(path);
  if (!mapping) return mapping.error();
  const auto file = Gguf::parse((*mapping)->bytes());
  const auto named = [&](Error error) { return Error{error.kind, path + ": " + error.text}; };
  if (!file) return named(file.error());
  auto model = load_model(*file, *mapping);
  if (!model) return named(model.error());
  (*mapping)->forget();
  return model;
}

}  // namespace wf
