// Checks every memory access of an emulated kernel: what compute-sanitizer's memcheck, racecheck
// and initcheck do on a device.
//
// The kernels are compiled with -fsanitize=thread but linked with memory_check.cpp in place of the
// sanitizer's runtime, so each load and store calls check_access. Watched memory has a shadow of
// its last writer and readers. Two accesses of one word, one of them a write, by two threads race
// unless a sync_block or sync_warp that both passed lies between them. Shuffles and ballots order no
// memory, and two blocks are never ordered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace backmatch::emulator {

// A point in the execution of a block.
struct Moment {
  int64_t block = -1;     // -1: never
  int32_t thread = 0;
  uint32_t block_barriers = 0;  // passed so far by the block
  uint32_t warp_barriers = 0;   // sync_warps passed so far by the thread's warp
};

enum class Contents { kInput, kOutput };  // an input is initialised and must not be written

// Watches `bytes` at `start`; accesses up to `guard` bytes before or after it are out of bounds.
void watch(const char* name, const void* start, int64_t bytes, int64_t guard, Contents contents);
// Stops watching all memory, or what is watched under `name`.
void forget_all();
void forget(const char* name);
// Makes what is watched under `name` uninitialised again.
void forget_accesses(const char* name);
// A launch is ordered after all that was enqueued before it: what earlier ones wrote is initialised.
void order_accesses();

// The thread whose accesses are checked from now on; nullptr: none.
void set_current(const Moment* moment);
// What a thread calls when it has a finding; it does not return.
void set_stop(void (*stop)());
// A vector access that the device would refuse is a finding.
void require_aligned(const void* pointer, std::size_t bytes);
// The first finding since the last call, empty if none.
std::string take_finding();

}  // namespace backmatch::emulator
