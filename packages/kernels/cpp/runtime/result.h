// Errors as values: a kind and one sentence, or what was asked for.
#pragma once

#include <string>
#include <utility>
#include <variant>

namespace wf {

enum class Kind : int { argument, file, model, context, number, cancelled };

struct Error {
  Kind kind;
  std::string text;  // one sentence that names the thing and, where there is one, the remedy
};

template <typename T>
class Result {
 public:
  Result(T value) : held_(std::in_place_index<0>, std::move(value)) {}      // NOLINT(google-explicit-constructor)
  Result(Error error) : held_(std::in_place_index<1>, std::move(error)) {}  // NOLINT(google-explicit-constructor)

  explicit operator bool() const { return held_.index() == 0; }
  T& operator*() { return *std::get_if<0>(&held_); }
  T* operator->() { return std::get_if<0>(&held_); }
  const T& operator*() const { return *std::get_if<0>(&held_); }
  const T* operator->() const { return std::get_if<0>(&held_); }
  const Error& error() const { return *std::get_if<1>(&held_); }

 private:
  std::variant<T, Error> held_;
};

}  // namespace wf
