// A file's keys under its architecture's name, checked as they are read. The first mistake is kept; what follows it means nothing.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/gguf.h"

namespace wf {

// A key of other people's files that would change what is computed, in a way that nothing here computes; and the numbers (of a flag 0
// or 1) with which it changes nothing. Without such a number, files that have the key are refused.
struct UncomputedKey {
  const char* key;
  std::vector<double> harmless;
};

// The table of them, which is `bitnet_arch.gguf.uncomputed.UNCOMPUTED`, too: a test compares both.
std::span<const UncomputedKey> uncomputed_keys();

class Keys {
 public:
  Keys(const Gguf& file, std::string architecture) : file_(file), prefix_(std::move(architecture) + ".") {}

  // A whole number from `least` to `most`, or the default where there is none; without a default the key is needed.
  int64_t integer(const char* key, int64_t least, int64_t most, std::optional<int64_t> otherwise = {});
  // A finite number that float32 holds, if rounded.
  double real(const char* key, std::optional<double> otherwise = {});
  bool flag(const char* key, bool otherwise);
  // One of `choices`.
  std::string choice(const char* key, const std::vector<std::string>& choices, const std::string& otherwise);
  const Value* find(const char* key) const { return file_.value(prefix_ + key); }
  // Refuses a file by its keys that nothing here computes.
  void refuse_uncomputed();
  // Refuses a file whose flag says otherwise than its family or its tensors do.
  void expect(const char* key, bool is) {
    if (flag(key, is) != is) fail_key(key, is ? "is false, but its family and its tensors have it" : "is true, but its family and its tensors have none");
  }

  void fail(const std::string& why) {
    if (!error_) error_ = Error{Kind::model, "the file cannot be run: " + why};
  }
  void fail(const Error& error) {
    if (!error_) error_ = error;
  }
  void fail_key(const char* key, const std::string& why) { fail("its key " + prefix_ + key + " " + why); }
  const std::optional<Error>& error() const { return error_; }

 private:
  const Gguf& file_;
  std::string prefix_;
  std::optional<Error> error_;
};

}  // namespace wf
