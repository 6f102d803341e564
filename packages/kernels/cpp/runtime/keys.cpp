#include "runtime/keys.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace wf {

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
