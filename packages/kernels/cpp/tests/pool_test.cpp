// The thread pool alone, with jobs whose workers are held up on purpose. Exits with 1, and says where, if something is not as it must be.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "ternary/pool.h"

namespace {

void check(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::exit(1);
}

// Chunk i's result is a few numbers made of i and of an input that the job owns.
class Numbers : public wf::Job {
 public:
  static constexpr int64_t kEach = 50;

  Numbers(int64_t count, int64_t seed, int64_t* out) : input_(static_cast<size_t>(count), seed), out_(out) { chunks = count; }
  ~Numbers() override { input_.assign(input_.size(), -1); }  // who reads it now reads nonsense

  static int64_t expected(int64_t chunk, int64_t i, int64_t seed) { return seed * 1000 + chunk * kEach + i; }

  int64_t result_bytes(int64_t) const override { return kEach * 8; }
  void compute(int64_t chunk, std::byte* result) const noexcept override {
    auto* to = result == nullptr ? out_ + chunk * kEach : reinterpret_cast<int64_t*>(result);
    for (int64_t i = 0; i < kEach; ++i) to[i] = expected(chunk, i, input_[static_cast<size_t>(chunk)]);
  }
  void commit(int64_t chunk, const std::byte* result) const noexcept override { std::memcpy(out_ + chunk * kEach, result, kEach * 8); }

 private:
  std::vector<int64_t> input_;
  int64_t* out_;
};

void check_numbers(int64_t count, int64_t seed) {
  std::vector<int64_t> out(static_cast<size_t>(count * Numbers::kEach), -2);
  wf::run(std::make_shared<Numbers>(count, seed, out.data()));
  for (int64_t i = 0; i < count * Numbers::kEach; ++i) {
    check(out[static_cast<size_t>(i)] == Numbers::expected(i / Numbers::kEach, i % Numbers::kEach, seed), "every chunk is computed");
  }
}

struct Gate {
  std::mutex lock;
  std::condition_variable moved;
  int inside = 0, left = 0, late_commits = 0, freed = 0;
  bool open = false, returned = false;

  template <typename F>
  void change(F&& f) {
    const std::lock_guard hold(lock);
    f();
    moved.notify_all();
  }
  template <typename F>
  void until(F&& f) {
    std::unique_lock hold(lock);
    moved.wait(hold, f);
  }
};

// Workers stop in the middle of a chunk until the gate opens. The caller's first chunk waits until every worker has one.
class HeldUp final : public Numbers {
 public:
  HeldUp(int64_t count, int64_t seed, int64_t* out, Gate& gate, int workers)
      : Numbers(count, seed, out), gate_(gate), workers_(workers) {}
  ~HeldUp() override { gate_.change([&] { ++gate_.freed; }); }

  void compute(int64_t chunk, std::byte* result) const noexcept override {
    if (result == nullptr) {
      gate_.until([&] { return gate_.inside == workers_; });
    } else {
      gate_.change([&] { ++gate_.inside; });
      gate_.until([&] { return gate_.open; });
    }
    Numbers::compute(chunk, result);
    if (result != nullptr) gate_.change([&] { ++gate_.left; });
  }
  void commit(int64_t chunk, const std::byte* result) const noexcept override {
    gate_.change([&] { gate_.late_commits += gate_.returned; });
    Numbers::commit(chunk, result);
  }

 private:
  Gate& gate_;
  int workers_;
};

void caller_does_not_wait_for_workers_that_are_held_up(int workers) {
  wf::set_threads(workers + 1);
  constexpr int64_t kCount = 20;
  std::vector<int64_t> out(kCount * Numbers::kEach, -2);
  Gate gate;
  auto job = std::make_shared<HeldUp>(kCount, 3, out.data(), gate, workers);
  wf::run(job);  // would never return if it waited for them
  gate.change([&] { gate.returned = true; });
  for (int64_t i = 0; i < kCount * Numbers::kEach; ++i) {
    check(out[static_cast<size_t>(i)] == Numbers::expected(i / Numbers::kEach, i % Numbers::kEach, 3), "held up chunks are computed");
  }
  job.reset();
  out.assign(out.size(), 77);
  check_numbers(30, 4);  // the next job runs while they are held up
  check(gate.left == 0 && gate.freed == 0, "workers keep what they read alive");
  gate.change([&] { gate.open = true; });
  gate.until([&] { return gate.freed == 1; });
  check(gate.left == workers && gate.late_commits == 0, "late results are thrown away");
  for (const int64_t value : out) check(value == 77, "late workers write nothing");
}

void several_callers_while_the_number_of_threads_changes(int rounds) {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([=] {
      for (int round = 0; round < rounds; ++round) check_numbers(1 + (round * 7 + caller) % 256, caller * rounds + round);
    });
  }
  callers.emplace_back([=] {
    for (int round = 0; round < rounds / 20; ++round) wf::set_threads(1 + round % 5);
  });
  for (auto& caller : callers) caller.join();
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 2000;
  for (int count = 1; count <= 4; ++count) {
    wf::set_threads(count);
    check(wf::threads() == count, "the number of threads is what was set");
    for (const int64_t chunks : {0, 1, 2, 3, 255, 256}) check_numbers(chunks, count);
  }
  for (int workers = 1; workers <= 3; ++workers) caller_does_not_wait_for_workers_that_are_held_up(workers);
  several_callers_while_the_number_of_threads_changes(rounds);
  std::puts("ok");
  return 0;
}
