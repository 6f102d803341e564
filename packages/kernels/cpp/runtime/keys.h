// A file's keys under its architecture's name, checked as they are read. The first mistake is kept; what follows it means nothing.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/gguf.h"

namespace wf {

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

  void fail(const std::string& why) {
    if (!error_) error_ = Error{Kind::model, "the file cannot be run: " + why};
  }
  void fail(const Error& error) {
    if (!error_) error_ = error;
  }
  const std::optional<Error>& error() const { return error_; }

 private:
  void fail_key(const char* key, const std::string& why) { fail("its key " + prefix_ + key + " " + why); }

  const Gguf& file_;
  std::string prefix_;
  std::optional<Error> error_;
};

}  // namespace wf
