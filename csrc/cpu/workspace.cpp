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

namespace {

struct Block {
  unsigned char* start = nullptr;
  int64_t bytes = 0;
};

// Blocks that the calling thread has used before: fresh pages from the system would cost a kernel
// as much as its work (a page fault per 4 KiB, at every call). Freed when the thread ends.
struct Kept {
  static constexpr int kBlocks = 8;
  static constexpr int64_t kBytes = int64_t{32} << 20;
  Block block[kBlocks];
  int64_t bytes = 0;

  ~Kept() {
    for (Block& b : block) std::free(b.start);
  }

  // The smallest block that is large enough, but not wastefully so; empty if there is none.
  Block take(int64_t wanted) {
    Block* best = nullptr;
    for (Block& b : block)
      if (b.bytes >= wanted && b.bytes <= 4 * wanted && (!best || b.bytes < best->bytes)) best = &b;
    if (best == nullptr) return {};
    const Block found = *best;
    bytes -= found.bytes;
    *best = {};
    return found;
  }

  // Keeps a block in place of the smallest one, within kBytes; what does not stay is freed.
  void give(Block given) {
    Block* least = block;
    for (Block& b : block)
      if (b.bytes < least->bytes) least = &b;
    if (given.bytes > least->bytes && bytes - least->bytes + given.bytes <= kBytes) {
      bytes += given.bytes - least->bytes;
      const Block out = *least;
      *least = given;
      given = out;
    }
    std::free(given.start);
  }
};

thread_local Kept kept;

}  // namespace

Workspace::Workspace(int64_t bytes) : bytes_(cache_lines(bytes) + kLine) {
  const Block again = kept.take(bytes_);
  if (again.start != nullptr) {
    start_ = again.start;
    bytes_ = again.bytes;
    return;
  }
  start_ = static_cast<unsigned char*>(std::aligned_alloc(kLine, static_cast<size_t>(bytes_)));
  if (start_ == nullptr) throw std::bad_alloc();
}

Workspace::~Workspace() { kept.give({start_, bytes_}); }

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
