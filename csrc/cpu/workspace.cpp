#include "workspace.h"

#include <cstdlib>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace backmatch {

namespace {
constexpr int64_t kLine = 64;
// Below this many operations starting threads costs more than it saves.
constexpr double kParallelFlops = 4e5;
}  // namespace

int64_t cache_lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

Workspace::Workspace(int64_t bytes)
    : start_(static_cast<unsigned char*>(
          std::aligned_alloc(kLine, static_cast<size_t>(cache_lines(bytes) + kLine)))) {
  if (start_ == nullptr) throw std::bad_alloc();
}

Workspace::~Workspace() { std::free(start_); }

int threads_for(int64_t tasks, double flops) {
#ifdef _OPENMP
  if (tasks < 2 || flops < kParallelFlops || omp_in_parallel()) return 1;
  const int64_t most = omp_get_max_threads();
  return static_cast<int>(tasks < most ? tasks : most);
#else
  (void)tasks;
  (void)flops;
  return 1;
#endif
}

int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

int64_t tasks_at_a_time(int64_t tasks, int threads) {
  const int64_t share = tasks / (int64_t{8} * threads);
  return share < 1 ? 1 : share;
}

}  // namespace backmatch
