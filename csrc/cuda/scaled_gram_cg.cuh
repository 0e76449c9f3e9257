// Conjugate gradient on (D_j K D_j + damping_j I) y_j = R_j, x_j = D_j y_j: many systems, one K.
//
// A block solves a queue of systems from start to end in 4 or 8 slots (krylov_block.cuh): one pass
// over K a round multiplies the D p of all its slots, and a system that is done leaves its slot to
// the next. No launch and no synchronisation of the grid between steps.
// K is copied to shared memory once where it fits (n <= 214 in float, 144 in double at 8 slots),
// else streamed from L2, n^2 words a round for 8 n^2 multiply-adds. The preconditioner
// L^-T L^-1, if any, is two more passes over half of a matrix each, always from L2.
// 8 slots where K comes from L2 (half the traffic of 4) and where they still give every
// multiprocessor a block; else 4. Never shows in the bits.
// The product is ((p D) K) D + damping p as on the CPU: where D == 0, y = r / damping and x = 0.
// Limits: n <= 512 in float, 256 in double, so that K has at most 1 MB. Beyond, one multiprocessor
// reads K no faster than the library multiplies all systems by it: see backmatch/linalg.
// Estimated from the instruction count, batch 512, 132 multiprocessors, microseconds a step in
// float / double: n = 128 0.9 / 1.3, n = 256 4.3 / 6.5, n = 512 14 / -. A product by the library and
// a fused step take five launches, 10 to 20 microseconds at any of these sizes.
// Considered and rejected: 16 slots in float (spills at n = 512), K in shared memory half by half
// (as many bytes from L2), clusters that share K (no twin on the host).
#pragma once

#include "../kernels.h"
#include "krylov_plan.cuh"

namespace backmatch::cuda {

// The systems of a family as a queue.
template <class T>
struct FamilySystems {
  static constexpr bool kScaled = true, kHasStart = false;
  const ScaledGramCgArgs<T>& a;

  // Block b solves the systems b, b + blocks, b + 2 blocks, ...
  __device__ __forceinline__ Queue queue() const {
    return {block_index(), grid_blocks(), a.batch};
  }
  __device__ __forceinline__ int64_t n() const { return a.n; }
  __device__ __forceinline__ T rtol() const { return a.rtol; }
  __device__ __forceinline__ int64_t max_steps() const { return a.max_steps; }
  __device__ __forceinline__ T right_hand_side(int64_t system, int row) const {
    return a.R[system * a.r_batch + row * a.r_col];
  }
  __device__ __forceinline__ T start(int64_t, int) const { return T(0); }
  __device__ __forceinline__ T slope(int64_t system, int row) const {
    return a.D[system * a.d_batch + row * a.d_col];
  }
  __device__ __forceinline__ T damping(int64_t system) const {
    return a.damping[system * a.damping_stride];
  }
  __device__ __forceinline__ void store(int64_t system, int row, T value) const {
    a.X[system * a.n + row] = value;
  }
  __device__ __forceinline__ void report(int64_t system, int64_t steps, T residual,
                                         bool converged) const {
    a.iterations[system] = steps;
    a.residual[system] = residual;
    a.converged[system] = converged;
  }
};

template <class T>
constexpr int kFamilyOrder = sizeof(T) == 4 ? kKrylovOrder : kKrylovOrder / 2;

template <class T, int C, int R, bool kStaged, bool kPreconditioned, int kMost = kStagedOrder>
__global__ void __launch_bounds__(most_threads(R, kMost), 1)
    scaled_gram_cg_kernel(ScaledGramCgArgs<T> args) {
  const int n = static_cast<int>(args.n);
  const int row = static_cast<int>(staged_row<T>(n));
  const auto store = krylov_store<T, C>(R, kStaged ? n * row : 0);
  const MatrixView<T> K{args.K, args.k_row, args.k_col};
  if (kStaged) stage(K, n, row, store.matrix);
  const FamilySystems<T> systems{args};
  const MatrixView<T> near{store.matrix, row, 1};
  krylov_block<C, R, kStaged, kPreconditioned, kMost>(systems, kStaged ? near : K, args.upper,
                                               args.lower, store);
}

template <class T, int C, bool kPreconditioned>
void launch_scaled_gram_cg_slots(const ScaledGramCgArgs<T>& args, const DeviceLimits& limits,
                                 KrylovPlan plan, void* stream) {
  LaunchShape& shape = plan.shape;
  shape.blocks = std::min((args.batch + C - 1) / C, resident_blocks(limits, shape));
  if constexpr (C == 4) {
    if (args.n <= kWarp) {
      return launch<scaled_gram_cg_kernel<T, 4, 1, true, kPreconditioned>>(shape, stream, args);
    }
    if (args.n <= 2 * kWarp) {
      return launch<scaled_gram_cg_kernel<T, 4, 2, true, kPreconditioned>>(shape, stream, args);
    }
  }
  if (plan.staged) {
    return launch<scaled_gram_cg_kernel<T, C, 4, true, kPreconditioned>>(shape, stream, args);
  }
  if constexpr (C == 8) {
    if (args.n <= kStagedOrder) {
      return launch<scaled_gram_cg_kernel<T, 8, 4, false, kPreconditioned>>(shape, stream, args);
    }
    if constexpr (kFamilyOrder<T> > kStagedOrder) {
      launch<scaled_gram_cg_kernel<T, 8, 4, false, kPreconditioned, kFamilyOrder<T>>>(
          shape, stream, args);
    }
  }
}

template <class T, bool kPreconditioned>
void launch_scaled_gram_cg_choice(const ScaledGramCgArgs<T>& args, void* stream) {
  const DeviceLimits limits = device_limits();
  const KrylovPlan few = krylov_plan<T, 4>(limits, args.n);
  const KrylovPlan many = krylov_plan<T, 8>(limits, args.n);
  const bool fills = args.batch >= 8 * limits.multiprocessors;
  const bool wide = args.n > 2 * kWarp && (!few.staged || (many.staged && fills));
  if (wide) {
    launch_scaled_gram_cg_slots<T, 8, kPreconditioned>(args, limits, many, stream);
  } else {
    launch_scaled_gram_cg_slots<T, 4, kPreconditioned>(args, limits, few, stream);
  }
}

template <class T>
int64_t scaled_gram_cg_largest_order() {
  return kFamilyOrder<T>;
}

template <class T>
void launch_scaled_gram_cg(const ScaledGramCgArgs<T>& args, void* stream) {
  check_krylov_order(args.n, scaled_gram_cg_largest_order<T>());
  if (args.batch == 0 || args.n == 0) return;
  if (args.upper == nullptr) return launch_scaled_gram_cg_choice<T, false>(args, stream);
  launch_scaled_gram_cg_choice<T, true>(args, stream);
}

}  // namespace backmatch::cuda
