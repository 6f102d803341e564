// Loops of seconds, as loading a model has them, on threads of their own: unlike the pool's (pool.h), which are for microseconds, they
// are all over when the call returns, so that they write results where they belong and read what the caller owns.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "ternary/pool.h"

namespace wf {

// Calls `work(begin, end)` for pieces of [0, count), `piece` long but for the last one, on `threads()` threads. Rethrows the first exception.
template <typename Work>
void in_pieces(int64_t count, int64_t piece, const Work& work) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;  // of `failure`
  const auto run = [&] {
    try {
      for (int64_t begin; (begin = next.fetch_add(piece)) < count;) work(begin, std::min(begin + piece, count));
    } catch (...) {
      next.store(count);
      const std::lock_guard hold(guard);
      if (!failure) failure = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> others;
    const int64_t most = std::min<int64_t>(threads(), (count + piece - 1) / piece);
    try {
      for (int64_t i = 1; i < most; ++i) others.emplace_back(run);
    } catch (const std::system_error&) {  // the system has no more threads to give: those that run are enough
    }
    run();
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace wf
