// (A_j + damping_j I) X_j = B_j for a batch of symmetric positive definite A_j.
//
// Kernels chosen by n alone so that a system's bits depend on nothing else:
//  - n <= 64, one thread or a group of lanes a system, all in registers (spd_solve_small.cuh).
//  - n > 64, spd_solve_panels_kernel: one block a system, the factor in shared memory
//    (panel_cholesky.cuh); where it does not fit, spd_solve_staged_kernel, the factor in the block's
//    slot of the workspace (panel_stage.cuh). Right-hand sides pass in groups of up to 32; the
//    first group rides along with the factorisation. A is read along whichever direction is
//    contiguous, rows in vectors where they are aligned.
// Who owns what: a system belongs to one thread, lane group or block, which alone writes its X and
// info.
// Panel blocks stride over the batch, so any grid does for any batch. A, damping, B are only read.
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
                                             int first, const PanelSystem<T>& s) {
  const T* B = args.B + system * args.b_batch + int64_t(first) * args.b_col;
  const int columns = recomputed(s.columns);
  for (int e = thread_index_here(); e < s.tiles * kTile * columns; e += block_threads()) {
    const int i = e / columns;
    const int c = e % columns;
    const bool live = i < args.n && first + c < args.k;
    s.rhs[e] = live ? B[i * args.b_row + c * args.b_col] : T(0);
  }
}

template <class T>
__device__ __forceinline__ void store_columns(const SpdSolveArgs<T>& args, int64_t system,
                                              int first, const PanelSystem<T>& s) {
  T* X = args.X + system * args.n * args.k + first;
  const int columns = recomputed(s.columns);
  for (int e = thread_index_here(); e < static_cast<int>(args.n) * columns; e += block_threads()) {
    const int i = e / columns;
    const int c = e % columns;
    if (first + c < args.k) X[i * args.k + c] = s.rhs[e];
  }
}

// Whether rows of A may be read in vectors of 16 bytes: one choice for all systems of a launch.
template <class T>
__device__ __forceinline__ bool has_row_quads(const SpdSolveArgs<T>& args) {
  constexpr int64_t kElements = 16 / sizeof(T);
  return args.a_col == 1 && args.a_row % kElements == 0 && args.a_batch % kElements == 0 &&
         reinterpret_cast<std::uintptr_t>(args.A) % 16 == 0;
}

// A and the damping, along whichever direction of A is contiguous.
template <class T>
__device__ __forceinline__ void load_damped(const SpdSolveArgs<T>& args, int64_t system,
                                            const PanelSystem<T>& s) {
  const T* A = args.A + system * args.a_batch;
  const T damping = args.damping[system * args.damping_stride];
  const int n = static_cast<int>(args.n);
  const auto entry = [&](int i, int c) {
    const T value = A[i * args.a_row + c * args.a_col];
    return i == c ? value + damping : value;
  };
  if (has_row_quads(args)) {
    load_matrix_by_quads(s, n, entry, [&](int i, int c) {
      return vector_at<const Quad<T>>(A + i * args.a_row + c);
    });
  } else {
    load_matrix(s, n, entry, args.a_row == 1 ? Reading::kDownColumns : Reading::kAlongRows);
  }
}

// One system from load to store, in the store at `memory`; `stage` is null where that is on chip.
template <class T, bool kStaged>
__device__ __forceinline__ void spd_solve_system(const SpdSolveArgs<T>& args, int64_t system,
                                                 const PanelLayout& layout, unsigned char* memory,
                                                 T* stage, int32_t* status) {
  const int tiles = tiles_of(args.n);
  const int columns = layout.columns;
  T* factor = reinterpret_cast<T*>(memory);
  const PanelSystem<T> s{factor, factor + panel_offset(tiles), tiles, columns, status};
  if (thread_index() == 0) *status = 0;
  load_damped(args, system, s);

  bool solved = true;
  const int k = static_cast<int>(args.k);
  for (int first = 0; first == 0 || first < k; first += columns) {  // k = 0: info only
    load_columns(args, system, first, s);
    sync_block();
    if (first > 0) {
      substitute(s);
    } else if constexpr (kStaged) {
      solved = forward_staged(s, layout.stage, stage);
    } else {
      solved = forward(s, true);
    }
    if (!solved) break;
    backward(s);
    store_columns(args, system, first, s);
  }
  if (!solved) {
    T* X = args.X + system * args.n * args.k;
    for (int64_t e = thread_index_here(); e < args.n * args.k; e += block_threads()) X[e] = kNaN<T>;
  }
  if (thread_index() == 0) args.info[system] = *status;
  sync_block();  // a failed factorisation ends with all threads reading the status
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads, panel_blocks(kThreads))
    spd_solve_panels_kernel(SpdSolveArgs<T> args, PanelLayout layout) {
  unsigned char* shared = shared_memory();
  int32_t* status = reinterpret_cast<int32_t*>(shared);
  for (int64_t system = block_index(); system < args.batch; system += grid_blocks()) {
    spd_solve_system<T, false>(args, system, layout, shared + kSharedHeader, nullptr, status);
  }
}

template <class T>
__global__ void __launch_bounds__(kPanelThreads, 1)
    spd_solve_staged_kernel(SpdSolveArgs<T> args, PanelLayout layout, unsigned char* workspace) {
  unsigned char* shared = shared_memory();
  int32_t* status = reinterpret_cast<int32_t*>(shared);
  T* stage = reinterpret_cast<T*>(shared + kSharedHeader);
  unsigned char* slot = workspace + block_index() * layout.slot_bytes;
  for (int64_t system = block_index(); system < args.batch; system += grid_blocks()) {
    spd_solve_system<T, true>(args, system, layout, slot, stage, status);
  }
}

template <class T>
PanelPlan spd_solve_plan(int64_t batch, int64_t n, int64_t k) {
  return panel_plan<T>(device_limits(), batch, n, k, 0);
}

template <class T>
void launch_spd_solve_panels(const SpdSolveArgs<T>& args, void* workspace, void* stream) {
  check_columns(args.k);
  const PanelPlan plan = spd_solve_plan<T>(args.batch, args.n, args.k);
  const PanelLayout& layout = plan.layout;
  if (layout.slot_bytes != 0) {
    return launch<spd_solve_staged_kernel<T>>(staged_shape<T>(plan), stream, args, layout,
                                              static_cast<unsigned char*>(workspace));
  }
  with_panel_threads<T>(plan.shape.threads, [&](auto threads) {
    launch<spd_solve_panels_kernel<T, decltype(threads)::value>>(plan.shape, stream, args, layout);
  });
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
  launch_spd_solve_panels(args, workspace, stream);
}

}  // namespace backmatch::cuda
