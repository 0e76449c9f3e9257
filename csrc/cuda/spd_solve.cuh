// (A_j + damping_j I) X_j = B_j for a batch of symmetric positive definite A_j.
//
// Kernels chosen by n alone so that a system's bits depend on nothing else:
//  - n <= 64, one thread or a group of lanes a system, all in registers (spd_solve_small.cuh).
//  - n > 64, spd_solve_panels_kernel: one block a system (panel_cholesky.cuh), the factor in shared
//    memory where it fits, else in the block's slot of the workspace. Right-hand sides pass in
//    groups of up to 32; the first group rides along with the factorisation.
// Who owns what: a system belongs to one thread, lane group or block, which alone writes its X and
// info. Panel blocks stride over the batch, so any grid does for any batch. A, damping, B are only
// read.
// Where it synchronises: see the two headers; here a barrier after each load of shared data and
// one between two systems. No atomics, nothing between blocks.
// Considered and rejected: pointer arrays (a strided batch needs none), one kernel a right-hand
// side group (factors again), a fallback to a library for large n (every n works here, and the
// caller is free to hand large systems to a library by n).
#pragma once

#include "../kernels.h"
#include "panel_plan.cuh"
#include "spd_solve_small.cuh"

namespace backmatch::cuda {

// A thread loads the entries that it stored in the pass before: no barrier between the two.
template <class T>
__device__ __forceinline__ void load_columns(const SpdSolveArgs<T>& args, int64_t system,
                                             int64_t first, const PanelSystem<T>& s) {
  const T* B = args.B + system * args.b_batch + first * args.b_col;
  for (int e = thread_index(); e < s.tiles * kTile * s.columns; e += block_threads()) {
    const int i = e / s.columns;
    const int c = e % s.columns;
    const bool live = i < args.n && first + c < args.k;
    s.rhs[e] = live ? B[i * args.b_row + c * args.b_col] : T(0);
  }
}

template <class T>
__device__ __forceinline__ void store_columns(const SpdSolveArgs<T>& args, int64_t system,
                                              int64_t first, const PanelSystem<T>& s) {
  T* X = args.X + system * args.n * args.k + first;
  for (int e = thread_index(); e < args.n * s.columns; e += block_threads()) {
    const int i = e / s.columns;
    const int c = e % s.columns;
    if (first + c < args.k) X[i * args.k + c] = s.rhs[e];
  }
}

// One system from load to store, in the store at `memory`.
template <class T>
__device__ __forceinline__ void spd_solve_system(const SpdSolveArgs<T>& args, int64_t system,
                                                 int columns, unsigned char* memory,
                                                 int32_t* status) {
  const int tiles = tiles_of(args.n);
  T* factor = reinterpret_cast<T*>(memory);
  const PanelSystem<T> s{factor, factor + panel_offset(tiles), tiles, columns, status};
  const T* A = args.A + system * args.a_batch;
  const T damping = args.damping[system * args.damping_stride];
  if (thread_index() == 0) *status = 0;
  load_matrix(s, static_cast<int>(args.n), [&](int i, int c) {
    const T entry = A[i * args.a_row + c * args.a_col];
    return i == c ? entry + damping : entry;
  });

  bool solved = true;
  for (int64_t first = 0; first == 0 || first < args.k; first += columns) {  // k = 0: info only
    load_columns(args, system, first, s);
    sync_block();
    solved = forward(s, first == 0);
    if (!solved) break;
    backward(s);
    store_columns(args, system, first, s);
  }
  if (!solved) {
    T* X = args.X + system * args.n * args.k;
    for (int64_t e = thread_index(); e < args.n * args.k; e += block_threads()) X[e] = kNaN<T>;
  }
  if (thread_index() == 0) args.info[system] = *status;
  sync_block();  // a failed factorisation ends with all threads reading the status
}

template <class T>
__global__ void __launch_bounds__(kPanelThreads)
    spd_solve_panels_kernel(SpdSolveArgs<T> args, PanelLayout layout, unsigned char* workspace) {
  unsigned char* shared = shared_memory();
  int32_t* status = reinterpret_cast<int32_t*>(shared);
  for (int64_t system = block_index(); system < args.batch; system += grid_blocks()) {
    // Two calls, so that the compiler sees which memory it is and emits its own instructions.
    if (layout.slot_bytes == 0) {
      spd_solve_system(args, system, layout.columns, shared + kSharedHeader, status);
    } else {
      unsigned char* slot = workspace + block_index() * layout.slot_bytes;
      spd_solve_system(args, system, layout.columns, slot, status);
    }
  }
}

template <class T>
PanelPlan spd_solve_plan(int64_t batch, int64_t n, int64_t k) {
  PanelPlan plan = panel_plan<T>(device_limits(), batch, n, k, 0);
  // All systems have one order: where it does not fit, shared memory holds the status alone.
  if (plan.layout.slot_bytes != 0) plan.shape.shared_bytes = kSharedHeader;
  return plan;
}

template <class T>
int64_t spd_solve_workspace(int64_t batch, int64_t n, int64_t k) {
  check_order(n);
  if (batch == 0 || n <= kSmallOrder) return 0;
  return spd_solve_plan<T>(batch, n, k).workspace_bytes;
}

template <class T>
void launch_spd_solve(const SpdSolveArgs<T>& args, void* workspace, void* stream) {
  check_order(args.n);
  if (args.batch == 0) return;
  if (args.n <= kSmallOrder) return launch_spd_solve_small(args, stream);
  const PanelPlan plan = spd_solve_plan<T>(args.batch, args.n, args.k);
  launch<spd_solve_panels_kernel<T>>(plan.shape, stream, args, plan.layout,
                                   static_cast<unsigned char*>(workspace));
}

}  // namespace backmatch::cuda
