// A block emulator: runs a CUDA kernel compiled for the host, thread by thread.
//
// Each CUDA thread of a block is a fiber that runs until it reaches a barrier (sync_block,
// sync_warp, a shuffle or a ballot); which fiber runs next, and in which order the blocks run, is
// drawn from a seed. A barrier that not all threads reach is reported. Memory that the kernel
// touches is checked access by access (memory_check.h): races, reads of what nobody wrote,
// accesses out of bounds. Dynamic shared memory is filled with NaN before each block.
//
// What it does not show: memory ordering weaker than program order, blocks interleaved in time
// (two blocks that touch the same word are reported, though), and how long anything takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace backmatch::emulator {

constexpr int kWarp = 32;
constexpr std::size_t kSlotBytes = 24;

struct DeviceLimits {
  int64_t shared_bytes;
  int64_t multiprocessors;
};

struct LaunchShape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

// The order of threads and blocks of later runs, and the device they pretend to run on.
void configure(uint64_t seed, const DeviceLimits& limits);
const DeviceLimits& device_limits();

// Runs `body` once per thread. Throws std::runtime_error on the first finding.
void run(const char* name, const LaunchShape& shape, const std::function<void()>& body);

// Barriers called at this line of this file (its last path component) do nothing from now on; an
// empty name: all do what they should.
void leave_out(const char* file, int line);

// A copy that a thread has begun and not yet waited for.
struct PendingCopy {
  void* to;
  const void* from;
};

// Called by the threads.
bool is_left_out(const char* file, int line);
int thread_index();
int64_t block_index();
const LaunchShape& shape();
unsigned char* shared_memory();
std::vector<PendingCopy>& pending_copies();  // of this thread
void sync_block();
void sync_warp();
// What each lane of the warp passed as `value`, at most kSlotBytes; valid until the thread's next
// exchange or ballot.
const unsigned char (*share(const void* value, std::size_t bytes))[kSlotBytes];
// `result` receives what lane `source` of the warp passed as `value`.
void exchange(const void* value, std::size_t bytes, int source, void* result);
unsigned ballot(bool predicate);

}  // namespace backmatch::emulator
