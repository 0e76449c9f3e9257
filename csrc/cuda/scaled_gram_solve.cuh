// X_j = D_j y_j with (D_j K D_j + damping_j I) y_j = R_j: many systems, one K for all.
//
// K is read from cache and scaled, damped, factored and solved in place: no matrix of a system is
// ever formed in main memory while it fits on chip. Kernels chosen by n alone:
//  - n <= 64, one thread or a group of lanes a system, in registers (scaled_gram_small.cuh).
//  - n > 64, scaled_gram_solve_panels_kernel: one block a system (panel_cholesky.cuh). Rows with
//    D == 0 are squeezed out first, so that a system with half its rows active costs an eighth.
//    Where the rest fits it is solved in shared memory, else in the block's slot of the workspace;
//    that is decided per system and never shows in the result.
// Who owns what: a system belongs to one thread, lane group or block, which alone writes its X and
// info; K, D, R and damping are only read. Warp 0 lists the active rows in order (a ballot a 32
// rows: the list has one writer, is the same in every run, and takes n / 32 steps of the n^3 / 3).
// Where it synchronises: the two headers say; here a barrier after the count, after the list, after
// the load, and before the shared store is used for the next system. No atomics.
// Considered and rejected: a prefix sum by the whole block (more barriers than it saves steps up to
// n = 1024), masking without squeezing (eight times the work at half activity), a copy
// of K in shared memory that all systems use (takes the room of the factor; K is in L2).
#pragma once

#include "../kernels.h"
#include "panel_plan.cuh"
#include "scaled_gram_small.cuh"

namespace backmatch::cuda {

// The active rows of one system, squeezed together.
template <class T>
struct ActiveRows {
  T* slope;      // D of the p-th active row
  int32_t* row;  // its number
  int count;
};

// Counts the active rows of a system, and lists them where `list` has room. Called by warp 0.
template <class T>
__device__ __forceinline__ int find_active(const ScaledGramArgs<T>& args, int64_t system,
                                           const ActiveRows<T>* list) {
  const int lane = thread_index();
  const T* D = args.D + system * args.d_batch;
  int count = 0;
  for (int64_t base = 0; base < args.n; base += kWarp) {
    const int64_t i = base + lane;
    const T slope = i < args.n ? D[i * args.d_col] : T(0);
    const unsigned active = ballot(slope != T(0));
    if (list != nullptr && slope != T(0)) {
      const int place = count + count_bits(active & ((1u << lane) - 1));
      list->slope[place] = slope;
      list->row[place] = static_cast<int32_t>(i);
    }
    count += count_bits(active);
  }
  return count;
}

template <class T>
__device__ __forceinline__ void load_system(const ScaledGramArgs<T>& args, int64_t system,
                                            const ActiveRows<T>& rows, const PanelSystem<T>& s) {
  const T damping = args.damping[system * args.damping_stride];
  const T* R = args.R + system * args.r_batch;
  load_matrix(s, rows.count, [&](int i, int c) {
    const T entry = args.K[rows.row[i] * args.k_row + rows.row[c] * args.k_col];
    const T scaled = rows.slope[i] * entry * rows.slope[c];
    return i == c ? scaled + damping : scaled;
  });
  for (int e = thread_index(); e < s.tiles * kTile * s.columns; e += block_threads()) {
    const int i = e / s.columns;
    const bool live = e % s.columns == 0 && i < rows.count;
    s.rhs[e] = live ? R[rows.row[i] * args.r_col] : T(0);
  }
}

// X = D y where active, 0 elsewhere; all NaN without a solution.
template <class T>
__device__ __forceinline__ void store_system(const ScaledGramArgs<T>& args, int64_t system,
                                             const ActiveRows<T>& rows, const PanelSystem<T>& s,
                                             bool solved) {
  const T* D = args.D + system * args.d_batch;
  T* X = args.X + system * args.n;
  for (int64_t i = thread_index(); i < args.n; i += block_threads()) {
    if (!solved) {
      X[i] = kNaN<T>;
    } else if (D[i * args.d_col] == T(0)) {
      X[i] = T(0);
    }
  }
  for (int p = thread_index(); solved && p < rows.count; p += block_threads()) {
    X[rows.row[p]] = rows.slope[p] * s.rhs[p * s.columns];
  }
  if (thread_index() == 0) args.info[system] = solved ? 0 : rows.row[*s.status - 1] + 1;
}

// One system from list to store, in the store at `memory`.
template <class T>
__device__ __forceinline__ void scaled_gram_solve_system(const ScaledGramArgs<T>& args,
                                                         int64_t system, int count, int columns,
                                                         unsigned char* memory, int32_t* status) {
  const int tiles = tiles_of(count);
  T* factor = reinterpret_cast<T*>(memory);
  T* rhs = factor + panel_offset(tiles);
  T* slope = rhs + tiles * kTile * columns;
  const ActiveRows<T> rows{slope, reinterpret_cast<int32_t*>(slope + tiles * kTile), count};
  const PanelSystem<T> s{factor, rhs, tiles, columns, status};
  if (thread_index() < kWarp) find_active(args, system, &rows);
  sync_block();
  load_system(args, system, rows, s);
  sync_block();
  const bool solved = forward(s, true);
  if (solved) backward(s);
  store_system(args, system, rows, s, solved);
  sync_block();  // a failed factorisation ends with all threads reading the status
}

template <class T>
__global__ void __launch_bounds__(kPanelThreads)
    scaled_gram_solve_panels_kernel(ScaledGramArgs<T> args, PanelLayout layout,
                                    unsigned char* workspace) {
  unsigned char* shared = shared_memory();
  int32_t* status = reinterpret_cast<int32_t*>(shared);
  int32_t* active = status + 1;
  for (int64_t system = block_index(); system < args.batch; system += grid_blocks()) {
    if (thread_index() < kWarp) {
      const int count = find_active<T>(args, system, nullptr);
      if (thread_index() == 0) {
        *status = 0;
        *active = count;
      }
    }
    sync_block();
    const int count = *active;
    // Two calls, so that the compiler sees which memory it is and emits its own instructions.
    if (tiles_of(count) <= layout.on_chip_tiles) {
      unsigned char* store = shared + kSharedHeader;
      scaled_gram_solve_system(args, system, count, layout.columns, store, status);
    } else {
      unsigned char* slot = workspace + block_index() * layout.slot_bytes;
      scaled_gram_solve_system(args, system, count, layout.columns, slot, status);
    }
  }
}

template <class T>
PanelPlan scaled_gram_solve_plan(int64_t batch, int64_t n) {
  constexpr int64_t kRowBytes = sizeof(T) + sizeof(int32_t);  // slope and number of an active row
  return panel_plan<T>(device_limits(), batch, n, 1, kRowBytes);
}

template <class T>
int64_t scaled_gram_solve_workspace(int64_t batch, int64_t n) {
  check_order(n);
  if (batch == 0 || n <= kSmallOrder) return 0;
  return scaled_gram_solve_plan<T>(batch, n).workspace_bytes;
}

template <class T>
void launch_scaled_gram_solve(const ScaledGramArgs<T>& args, void* workspace, void* stream) {
  check_order(args.n);
  if (args.batch == 0) return;
  if (args.n <= kSmallOrder) return launch_scaled_gram_small(args, stream);
  const PanelPlan plan = scaled_gram_solve_plan<T>(args.batch, args.n);
  launch<scaled_gram_solve_panels_kernel<T>>(plan.shape, stream, args, plan.layout,
                                   static_cast<unsigned char*>(workspace));
}

}  // namespace backmatch::cuda
