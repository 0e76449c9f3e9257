// What the device gives at most: independent chains of x = x * a + b in registers.
//
// csrc/cpu/fma_rate.cpp is the same for the processor. No memory is touched but for one store a
// thread, without which the compiler would drop the chains. A multiply-add has a latency of four
// cycles; a scheduler of the multiprocessor holds 16 of these warps, each with kChains independent
// ones, so that neither latency nor the loop's own instructions (unrolled: three for 64) count.
// matrix_rate_kernel does the same for products of double on the matrix units, which no other
// instruction reaches: a warp has Tiles independent accumulators.
// Who owns what: a thread owns its chains, or with its warp its tiles, and sums[its number].
// Nothing is shared, nothing synchronises.
// The values stay those of exact arithmetic for some steps, so that a test can predict them:
// x = x / 2 + 1 / 4 halves its distance to 1 / 2, every tile grows by 4 a b = 1 / 2.
// Considered and rejected: a large matrix product of the library (measures the library; its route,
// TF32 or not, depends on a global setting).
#pragma once

#include <platform.cuh>

namespace backmatch::cuda {

constexpr int kRateThreads = 256;
constexpr int kRateBlocks = 8;  // for each multiprocessor: all 2048 threads that it holds
constexpr int kChains = 8;
constexpr int kRateTiles = 4;

template <class T>
__global__ void __launch_bounds__(kRateThreads, kRateBlocks)
    fma_rate_kernel(int64_t repeats, T a, T b, T* sums) {
  T x[kChains];
#pragma unroll
  for (int c = 0; c < kChains; ++c) x[c] = T(thread_index() % 4 + c);
#pragma unroll 8
  for (int64_t i = 0; i < repeats; ++i) {
#pragma unroll
    for (int c = 0; c < kChains; ++c) x[c] = x[c] * a + b;
  }
  T sum = T(0);
#pragma unroll
  for (int c = 0; c < kChains; ++c) sum += x[c];
  sums[block_index() * block_threads() + thread_index()] = sum;
}

template <int Tiles>
__global__ void __launch_bounds__(kRateThreads, kRateBlocks)
    matrix_rate_kernel(int64_t repeats, double a, double b, double* sums) {
  double tiles[Tiles][2];
#pragma unroll
  for (int t = 0; t < Tiles; ++t) tiles[t][0] = tiles[t][1] = t;
#pragma unroll 8
  for (int64_t i = 0; i < repeats; ++i) {
#pragma unroll
    for (int t = 0; t < Tiles; ++t) multiply_add_8x8x4(tiles[t], a, b);
  }
  double sum = 0;
#pragma unroll
  for (int t = 0; t < Tiles; ++t) sum += tiles[t][0] + tiles[t][1];
  sums[block_index() * block_threads() + thread_index()] = sum;
}

inline LaunchShape rate_shape() {
  return {kRateBlocks * device_limits().multiprocessors, kRateThreads, 0};
}

template <class T>
int64_t fma_rate_workspace() {
  return rate_shape().blocks * kRateThreads * int64_t(sizeof(T));
}

template <class T>
double launch_fma_rate(int64_t repeats, void* workspace, void* stream) {
  const LaunchShape shape = rate_shape();
  launch<fma_rate_kernel<T>>(shape, stream, repeats, T(0.5), T(0.25), static_cast<T*>(workspace));
  return 2.0 * kChains * double(repeats) * double(shape.blocks * shape.threads);
}

inline double matrix_rate(int64_t repeats, void* workspace, void* stream) {
  constexpr double kFlopsPerTile = 2.0 * 8 * 8 * 4;
  const LaunchShape shape = rate_shape();
  launch<matrix_rate_kernel<kRateTiles>>(shape, stream, repeats, 0.5, 0.25,
                                         static_cast<double*>(workspace));
  return kFlopsPerTile * kRateTiles * double(repeats) * double(shape.blocks * shape.threads / kWarp);
}

}  // namespace backmatch::cuda
