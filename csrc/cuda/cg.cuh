// Conjugate gradient on (A_j + damping_j I) x = b, one Krylov system per batch entry and column: a
// block solves columns of one A_j from start to end (krylov_block.cuh), with no launch and no
// synchronisation of the grid between steps.
//
// A_j is copied to shared memory once for all its columns where it fits (n <= 230 in float, 160 in
// double on a device with 227 KB), else read from L2 at every step. The sum for row i runs down
// column i, over A[c][i], so that neighbouring threads read neighbouring words of a row-major A;
// for the symmetric A that CG needs this is A x.
// One column: a block has one slot. More: 4 slots, refilled from the columns of A_j; with few A_j
// several blocks share the columns of one. None of this shows in the bits.
// What bounds it (estimated from the instruction count): at one column the shared memory, n^2 words
// at 32 a clock, 0.3 microseconds a step at n = 128 in float and as many systems at a time as fit;
// at 4 columns the multiply-adds.
// Considered and rejected: n^2 / 2 words of the triangle (each word used twice, but its second use
// is a sum across threads), A in registers up to n = 128 (a third kernel, for twice the rate at one
// column), larger n than 512 (one multiprocessor reads 64 bytes a clock, all of them together 30
// times that: a product by the library and fused steps win at small batches).
#pragma once

#include "../kernels.h"
#include "krylov_plan.cuh"

namespace backmatch::cuda {

// The columns of one A_j as a queue.
template <class T>
struct DenseColumns {
  static constexpr bool kScaled = false, kHasStart = true;
  const CgArgs<T>& a;
  int64_t batch_entry, part, parts;

  __device__ __forceinline__ Queue queue() const { return {part, parts, a.k}; }
  __device__ __forceinline__ int64_t n() const { return a.n; }
  __device__ __forceinline__ T rtol() const { return a.rtol; }
  __device__ __forceinline__ int64_t max_steps() const { return a.max_steps; }
  __device__ __forceinline__ T right_hand_side(int64_t column, int row) const {
    return a.B[batch_entry * a.b_batch + row * a.b_row + column * a.b_col];
  }
  __device__ __forceinline__ T* x_at(int64_t column, int row) const {
    return a.X + (batch_entry * a.n + row) * a.k + column;
  }
  __device__ __forceinline__ T start(int64_t column, int row) const { return *x_at(column, row); }
  __device__ __forceinline__ T slope(int64_t, int) const { return T(1); }
  __device__ __forceinline__ T damping(int64_t) const {
    return a.damping[batch_entry * a.damping_stride];
  }
  __device__ __forceinline__ void store(int64_t column, int row, T value) const {
    *x_at(column, row) = value;
  }
  __device__ __forceinline__ void report(int64_t column, int64_t steps, T residual,
                                         bool converged) const {
    const int64_t entry = batch_entry * a.k + column;
    a.iterations[entry] = steps;
    a.residual[entry] = residual;
    a.converged[entry] = converged;
  }
};

// Task t: the columns t % parts, t % parts + parts, ... of batch entry t / parts.
template <class T, int C, int R, bool kStaged>
__global__ void __launch_bounds__(most_threads(R, kStaged ? kStagedOrder : kKrylovOrder), 1)
    cg_kernel(CgArgs<T> args, int64_t parts) {
  const int n = static_cast<int>(args.n);
  const int row = static_cast<int>(staged_row<T>(n));
  const auto store = krylov_store<T, C>(R, kStaged ? n * row : 0);
  for (int64_t task = block_index(); task < args.batch * parts; task += grid_blocks()) {
    const DenseColumns<T> columns{args, task / parts, task % parts, parts};
    const MatrixView<T> A{args.A + columns.batch_entry * args.a_batch, args.a_row, args.a_col};
    if (kStaged) stage(A, n, row, store.matrix);
    sync_block();
    const MatrixView<T> near{store.matrix, row, 1};
    const T* none = nullptr;
    constexpr int kMost = kStaged ? kStagedOrder : kKrylovOrder;
    krylov_block<C, R, kStaged, false, kMost>(columns, kStaged ? near : A, none, none, store);
  }
}

template <class T, int C>
void launch_cg_slots(const CgArgs<T>& args, void* stream) {
  // Enough blocks to fill any device several times over; the kernel strides over the rest.
  constexpr int64_t kBlocksPerMultiprocessor = 64;
  const DeviceLimits limits = device_limits();
  KrylovPlan plan = krylov_plan<T, C>(limits, args.n);
  const int64_t wanted = (2 * limits.multiprocessors + args.batch - 1) / args.batch;
  const int64_t parts = std::clamp<int64_t>(wanted, 1, (args.k + C - 1) / C);
  plan.shape.blocks =
      std::min(args.batch * parts, kBlocksPerMultiprocessor * limits.multiprocessors);
  if (args.n <= kWarp) return launch<cg_kernel<T, C, 1, true>>(plan.shape, stream, args, parts);
  if (args.n <= 2 * kWarp) return launch<cg_kernel<T, C, 2, true>>(plan.shape, stream, args, parts);
  if (plan.staged) return launch<cg_kernel<T, C, 4, true>>(plan.shape, stream, args, parts);
  launch<cg_kernel<T, C, 4, false>>(plan.shape, stream, args, parts);
}

template <class T>
int64_t cg_largest_order() {
  return kKrylovOrder;
}

template <class T>
void launch_cg(const CgArgs<T>& args, void* stream) {
  check_krylov_order(args.n, cg_largest_order<T>());
  if (args.batch == 0 || args.k == 0 || args.n == 0) return;
  if (args.k == 1) return launch_cg_slots<T, 1>(args, stream);
  launch_cg_slots<T, 4>(args, stream);
}

}  // namespace backmatch::cuda
