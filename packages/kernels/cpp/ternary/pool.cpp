#include "ternary/pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace wf {
namespace {

using Clock = std::chrono::steady_clock;

// How long a worker looks for the next job before it sleeps: longer than what lies between two products of a forward.
constexpr std::chrono::microseconds kSpin{50};

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A worker's memory for a chunk's result, which grows as it has to.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  std::byte* of(int64_t bytes) {
    if (bytes > bytes_) {
      std::free(data_);
      bytes_ = (bytes + 63) / 64 * 64;
      data_ = static_cast<std::byte*>(std::aligned_alloc(64, static_cast<size_t>(bytes_)));
      if (data_ == nullptr) bytes_ = 0;
    }
    return data_;
  }

 private:
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
};

int first_threads() {
  for (const char* name : {"WF_THREADS", "OMP_NUM_THREADS"}) {
    const char* value = std::getenv(name);
    const int count = value == nullptr ? 0 : std::atoi(value);
    if (count > 0) return std::min(count, kMostThreads);
  }
#if defined(__linux__)
  cpu_set_t mine;
  if (sched_getaffinity(0, sizeof mine, &mine) == 0) return std::clamp(CPU_COUNT(&mine), 1, kMostThreads);
#endif
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMostThreads);
}

// 0 until somebody asks. No static that is made at the first call: a fork meanwhile would leave its guard locked in the child.
std::atomic<int> wanted{0};

int wanted_threads() {
  int count = wanted.load(std::memory_order_relaxed);
  if (count == 0) {
    const int first = first_threads();
    count = wanted.compare_exchange_strong(count, first, std::memory_order_relaxed) ? first : count;
  }
  return count;
}

}  // namespace

class Pool {
 public:
  void run(const std::shared_ptr<Job>& job);
  void resize(int threads);

 private:
  void work();
  void start(int workers);
  void stop();
  static void help(Job& job, std::chrono::nanoseconds patience);

  std::mutex calls_;  // of who has the workers
  std::vector<std::thread> workers_;
  int asked_ = 0;  // how many of them were wanted when they started: some may not have, which no call tries again
  std::mutex guard_;  // of the next two and of changes of `epoch_`, held for a few instructions
  std::shared_ptr<Job> job_;
  bool asleep_ = false;  // a worker sleeps, or is about to, whom nobody has woken since
  std::atomic<bool> stopping_{false};
  std::atomic<uint32_t> epoch_{0};  // changes with `job_`, and is what workers wait for
};

void Pool::run(const std::shared_ptr<Job>& job) {
  const std::unique_lock lock(calls_, std::try_to_lock);
  const int others = lock.owns_lock() && job->chunks > 1 ? wanted_threads() - 1 : 0;
  if (others == 0) {
    for (int64_t chunk = 0; chunk < job->chunks; ++chunk) job->compute(chunk, nullptr);
    return;
  }
  if (asked_ != others) {
    stop();
    start(others);
  }
  bool wake;
  {
    const std::lock_guard hold(guard_);
    job_ = job;
    wake = std::exchange(asleep_, false);  // once: a worker that was woken, but does not run yet, costs the next calls nothing
    epoch_.fetch_add(1);
  }
  if (wake) epoch_.notify_all();

  const auto begin = Clock::now();
  int64_t mine = 0;
  for (int64_t chunk; (chunk = job->next_.fetch_add(1, std::memory_order_relaxed)) < job->chunks; ++mine) {
    job->compute(chunk, nullptr);
    job->states_[chunk].store(Job::done, std::memory_order_relaxed);
  }
  // A worker that runs finishes its chunk in about the time of one of ours.
  help(*job, mine > 0 ? 2 * (Clock::now() - begin) / mine : std::chrono::nanoseconds(0));
  std::shared_ptr<Job> over;
  {
    const std::lock_guard hold(guard_);
    over = std::move(job_);
  }
}

// Waits for the workers' chunks as long as is worth it, then computes what is missing.
void Pool::help(Job& job, std::chrono::nanoseconds patience) {
  Clock::time_point since{};
  for (int64_t chunk = 0; chunk < job.chunks; ++chunk) {
    auto& state = job.states_[chunk];
    if (state.load(std::memory_order_acquire) == Job::done) continue;
    if (since == Clock::time_point{}) since = Clock::now();
    while (state.load(std::memory_order_acquire) == Job::open) {
      if (Clock::now() - since > patience) {
        uint8_t open = Job::open;
        if (state.compare_exchange_strong(open, Job::done, std::memory_order_acq_rel)) job.compute(chunk, nullptr);
        break;
      }
      pause();
    }
    // Set aside while it copies a few kilobytes: rare, but then it needs this processor.
    for (int spins = 0; state.load(std::memory_order_acquire) != Job::done; ++spins) {
      if (spins < 1000) {
        pause();
      } else {
        sched_yield();
      }
    }
  }
}

void Pool::work() {
  Scratch scratch;
  uint32_t seen = 0;
  while (true) {
    for (const auto since = Clock::now(); epoch_.load(std::memory_order_acquire) == seen && Clock::now() - since < kSpin;) pause();
    if (epoch_.load() == seen) {
      {
        const std::lock_guard hold(guard_);
        if (epoch_.load() == seen) asleep_ = true;
      }
      epoch_.wait(seen);
    }
    seen = epoch_.load();
    if (stopping_.load()) return;
    std::shared_ptr<Job> job;
    {
      const std::lock_guard hold(guard_);
      job = job_;
    }
    if (job == nullptr) continue;
    for (int64_t chunk; (chunk = job->next_.fetch_add(1, std::memory_order_relaxed)) < job->chunks;) {
      std::byte* result = scratch.of(job->result_bytes(chunk));
      if (result == nullptr) break;  // no memory: the caller helps
      job->compute(chunk, result);
      uint8_t open = Job::open;
      if (job->states_[chunk].compare_exchange_strong(open, Job::committing, std::memory_order_acquire)) {
        job->commit(chunk, result);
        job->states_[chunk].store(Job::done, std::memory_order_release);
      }
    }
  }
}

void Pool::start(int workers) {
  stopping_.store(false);
  asked_ = workers;
  try {
    for (int i = 0; i < workers; ++i) workers_.emplace_back([this] { work(); });
  } catch (const std::system_error&) {  // the system has no more threads to give: those that run, if any, are enough
  } catch (const std::bad_alloc&) {     // or no memory for one
  }
}

void Pool::stop() {
  stopping_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (auto& worker : workers_) worker.join();
  workers_.clear();
  asked_ = 0;
}

void Pool::resize(int threads) {
  const std::lock_guard lock(calls_);
  wanted.store(threads, std::memory_order_relaxed);
  if (asked_ != threads - 1 || static_cast<int>(workers_.size()) != asked_) stop();
}

namespace {

std::atomic<Pool*> the_pool{nullptr};

// A child has none of its parent's threads, and maybe a lock that one of them held.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });

// Never destroyed: its threads end with the process.
Pool& pool() {
  Pool* found = the_pool.load(std::memory_order_acquire);
  if (found == nullptr) {
    auto made = std::make_unique<Pool>();
    if (the_pool.compare_exchange_strong(found, made.get(), std::memory_order_acq_rel)) found = made.release();
  }
  return *found;
}

}  // namespace

int threads() { return wanted_threads(); }

const char* bad_threads_variable() {
  const char* value = std::getenv("WF_THREADS");
  if (value == nullptr || *value == 0) return nullptr;
  const bool digits = std::all_of(value, value + std::strlen(value), [](char c) { return c >= '0' && c <= '9'; });
  const long count = digits ? std::strtol(value, nullptr, 10) : 0;
  return count >= 1 && count <= kMostThreads ? nullptr : value;
}

void set_threads(int count) { pool().resize(std::clamp(count, 1, kMostThreads)); }

void run(const std::shared_ptr<Job>& job) { pool().run(job); }

}  // namespace wf
