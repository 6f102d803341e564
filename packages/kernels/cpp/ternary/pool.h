// Threads for short parallel loops that keep their speed when another process takes a processor away.
//
// A product of a few megabytes takes 100 us. Threads that meet at a barrier are then as slow as the slowest, and a thread that the
// kernel has set aside for a neighbour's sake comes back milliseconds later. Here nobody waits for a thread that is not running:
//
// * A job is cut into chunks, which whoever runs takes from a counter; the caller works, too.
// * A worker computes a chunk into memory of its own and copies the result where it belongs only after claiming the chunk. A caller
//   who finds no chunk left, but some unfinished, claims and computes those itself; a worker that comes late loses its claim, and
//   throws its result away.
// * So a worker may still read a job's inputs when the job is long over: a job owns them, and workers own the job.
//
// Results depend on neither the number of threads nor their luck, because a chunk's result does not depend on who computes it.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace wf {

// A parallel loop over chunks [0, chunks), which owns (or shares) all that it reads.
class Job {
 public:
  static constexpr int64_t kMostChunks = 256;

  virtual ~Job() = default;

  // How many bytes of results a chunk has.
  virtual int64_t result_bytes(int64_t chunk) const = 0;
  // Computes a chunk into `result` (aligned to 64 bytes), or where it belongs if `result` is null. Runs on any thread, more than once
  // for some chunks, and after `run` has returned: what the job does not own may be touched only if `result` is null.
  virtual void compute(int64_t chunk, std::byte* result) const noexcept = 0;
  // Copies a chunk's result where it belongs. Runs before `run` returns.
  virtual void commit(int64_t chunk, const std::byte* result) const noexcept = 0;

  int64_t chunks = 0;  // at most kMostChunks

 private:
  friend class Pool;
  enum State : uint8_t { open, committing, done };
  std::atomic<int64_t> next_{0};
  std::array<std::atomic<uint8_t>, kMostChunks> states_{};
};

// How many threads compute, the caller's included: at first WF_THREADS, else OMP_NUM_THREADS, else the number of processors that
// this process may use. With 1 there are no others. Any thread may call.
int threads();
// The value of WF_THREADS if it is no number of threads; null if it is one, empty or absent.
const char* bad_threads_variable();
void set_threads(int count);  // from 1 to kMostThreads; waits for a job that runs
constexpr int kMostThreads = 64;

// Computes a job's every chunk and returns. Any thread may call: while one thread's job has the workers, others compute theirs alone.
// Threads are started by the first call that needs them, and again in the child after a fork.
void run(const std::shared_ptr<Job>& job);

}  // namespace wf
