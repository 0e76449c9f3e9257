// Launches noted instead of made: what a launcher would start on a device that need not exist.
//
// While a DryRun exists, device_limits() of its thread returns the limits that it was given, and
// launch() notes the kernel's name and shape and returns. Nothing on the device is touched, so the
// addresses in the arguments may be null. Host code only; includes no CUDA header.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace backmatch::cuda {

struct DeviceLimits {
  int64_t shared_bytes;  // dynamic shared memory one block may opt in to
  int64_t multiprocessors;
};

struct LaunchShape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

// The innermost one of a thread counts; its end, by an exception too, puts the one before it back.
class DryRun {
 public:
  struct Launch {
    std::string name;
    LaunchShape shape;
  };

  explicit DryRun(const DeviceLimits& limits) : limits(limits), before_(active_) { active_ = this; }
  ~DryRun() { active_ = before_; }
  DryRun(const DryRun&) = delete;
  DryRun& operator=(const DryRun&) = delete;

  // The one of this thread, or null: all that a launch pays for it when there is none.
  static DryRun* active() { return active_; }

  const DeviceLimits limits;
  std::vector<Launch> launches;

 private:
  static inline thread_local DryRun* active_ = nullptr;
  DryRun* const before_;
};

}  // namespace backmatch::cuda
