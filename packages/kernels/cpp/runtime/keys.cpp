#include "runtime/keys.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace wf {
namespace {

const std::vector<UncomputedKey> kUncomputed = {
    {"attention.causal", {1}},
    {"attention.clamp_kqv", {0}},
    {"attention.max_alibi_bias", {0}},
    {"attention.temperature_length", {0}},
    {"attention.temperature_scale", {0}},
    {"attn_logit_softcapping", {0}},
    {"expert_count", {0}},
    {"expert_used_count", {0}},
    {"final_logit_softcapping", {0}},
    {"logit_scale", {0, 1}},
    {"residual_scale", {0, 1}},
    {"rope.dimension_sections", {}},
    {"rope.scale_linear", {0, 1}},
    {"rope.scaling.alpha", {0, 1}},
    {"rope.scaling.attn_factor", {1}},
    {"rope.scaling.yarn_attn_factor", {1}},
    {"rope.scaling.yarn_ext_factor", {0}},
    {"rope.scaling.yarn_log_multiplier", {0}},
    {"use_parallel_residual", {0}},
};

// A number or a flag as a number.
std::optional<double> number_of(const Value& value) {
  if (const auto* whole = std::get_if<int64_t>(&value)) return static_cast<double>(*whole);
  if (const auto* whole = std::get_if<uint64_t>(&value)) return static_cast<double>(*whole);
  if (const auto* real = std::get_if<double>(&value)) return *real;
  if (const auto* flag = std::get_if<bool>(&value)) return *flag ? 1.0 : 0.0;
  return {};
}

}  // namespace

std::span<const UncomputedKey> uncomputed_keys() { return kUncomputed; }

void Keys::refuse_uncomputed() {
  for (const auto& [key, harmless] : kUncomputed) {
    const Value* value = find(key);
    if (value == nullptr) continue;
    const auto number = number_of(*value);
    if (!number || std::find(harmless.begin(), harmless.end(), *number) == harmless.end()) {
      fail_key(key, "asks for what no model here computes");
      return;
    }
  }
}

int64_t Keys::integer(const char* key, int64_t least, int64_t most, std::optional<int64_t> otherwise) {
  const Value* value = find(key);
  if (value == nullptr) {
    if (!otherwise) fail_key(key, "is missing");
    return otherwise.value_or(least);
  }
  const auto* number = std::get_if<int64_t>(value);
  if (number == nullptr || *number < least || *number > most) {
    fail_key(key, "is no whole number from " + std::to_string(least) + " to " + std::to_string(most));
    return least;
  }
  return *number;
}

double Keys::real(const char* key, std::optional<double> otherwise) {
  const Value* value = find(key);
  if (value == nullptr) {
    if (!otherwise) fail_key(key, "is missing");
    return otherwise.value_or(1.0);
  }
  const auto* number = std::get_if<double>(value);
  if (number == nullptr || !std::isfinite(*number)) {
    fail_key(key, "is no finite number");
    return 1.0;
  }
  // What is computed with it is float32.
  if (std::fabs(*number) > static_cast<double>(std::numeric_limits<float>::max()) ||
      (*number != 0 && std::fabs(*number) < static_cast<double>(std::numeric_limits<float>::min()))) {
    fail_key(key, "is too large or too small for float32");
    return 1.0;
  }
  return *number;
}

bool Keys::flag(const char* key, bool otherwise) {
  const Value* value = find(key);
  if (value == nullptr) return otherwise;
  const auto* found = std::get_if<bool>(value);
  if (found == nullptr) fail_key(key, "is neither true nor false");
  return found != nullptr && *found;
}

std::string Keys::choice(const char* key, const std::vector<std::string>& choices, const std::string& otherwise) {
  const Value* value = find(key);
  if (value == nullptr) return otherwise;
  const auto* text = std::get_if<std::string_view>(value);
  const auto found = text == nullptr ? choices.end() : std::find(choices.begin(), choices.end(), *text);
  if (found == choices.end()) {
    fail_key(key, "is '" + (text == nullptr ? "" : quoted(*text)) + "', which is not known here");
    return otherwise;
  }
  return *found;
}

}  // namespace wf
