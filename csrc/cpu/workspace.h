// Scratch memory and thread counts. Defined in workspace.cpp, outside the per-level sources.
#pragma once

#include <cstddef>
#include <cstdint>

namespace backmatch {

// Bytes aligned to a cache line, whatever they hold. Allocated before a parallel region, never
// inside one, so that std::bad_alloc reaches the caller. Up to 32 MiB stay with the calling thread
// for its next call.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  template <class T>
  T* at(int64_t byte) const {
    return reinterpret_cast<T*>(start_ + byte);
  }

 private:
  unsigned char* start_;
  int64_t bytes_;
};

// `bytes` rounded up to whole cache lines.
int64_t cache_lines(int64_t bytes);

// Threads worth using for `tasks` tasks of `flops` operations in all; 1 inside a parallel region.
int threads_for(int64_t tasks, double flops);
int thread_number();

// Tasks a thread takes at a time from a dynamic schedule.
int64_t tasks_at_a_time(int64_t tasks, int threads);

}  // namespace backmatch
