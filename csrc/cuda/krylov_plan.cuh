// How the launchers of cg and scaled_gram_cg choose threads, slots and shared memory (host code).
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "krylov_block.cuh"

namespace backmatch::cuda {

constexpr int kKrylovOrder = 512;  // largest order, and threads of a block
constexpr int kStagedOrder = 256;  // likewise with the matrix in shared memory
// Largest block of a kernel for R rows a lane and n <= order.
constexpr int most_threads(int R, int order) { return R < 4 ? kWarp * R : order; }
// Threads that share a multiprocessor at the registers these kernels take.
constexpr int64_t kKrylovResidentThreads = 512;

// Rows of a lane in a product, and groups of columns: the smallest with which one warp covers n.
constexpr int rows_per_lane(int64_t n) { return n <= kWarp ? 1 : n <= 2 * kWarp ? 2 : 4; }

struct KrylovPlan {
  bool staged;  // the matrix is copied to shared memory
  LaunchShape shape;
};

// For a block with C slots; shape.blocks is left to the caller.
template <class T, int C>
KrylovPlan krylov_plan(const DeviceLimits& limits, int64_t n) {
  const int R = rows_per_lane(n);
  const int64_t threads = (n + kWarp * R - 1) / (kWarp * R) * (kWarp * R);
  const int64_t staged = krylov_bytes<T, C>(threads, R, n * staged_row<T>(n));
  const bool fits = n <= kStagedOrder && staged <= limits.shared_bytes;
  return {fits, {0, static_cast<int>(threads), fits ? staged : krylov_bytes<T, C>(threads, R, 0)}};
}

// Blocks that can work at the same time.
inline int64_t resident_blocks(const DeviceLimits& limits, const LaunchShape& shape) {
  const int64_t by_memory = limits.shared_bytes / shape.shared_bytes;
  const int64_t by_threads = kKrylovResidentThreads / shape.threads;
  return limits.multiprocessors * std::max<int64_t>(1, std::min(by_memory, by_threads));
}

inline void check_krylov_order(int64_t n, int64_t largest) {
  if (n > largest) {
    throw std::invalid_argument("backmatch CUDA: n must be at most " + std::to_string(largest) +
                                ", got " + std::to_string(n));
  }
}

}  // namespace backmatch::cuda
