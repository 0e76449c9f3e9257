// X_j = D_j y_j with (D_j K D_j + damping_j I) y_j = R_j: many systems, one K for all.
//
// K is read from cache and scaled, damped, factored and solved in place: no matrix of a system is
// ever formed in main memory while it fits on chip. Kernels chosen by n alone:
//  - n <= 64, one thread or a group of lanes a system, in registers (scaled_gram_small.cuh).
//  - n > 64: one block a system. Rows with D == 0 are squeezed out first, so that a system with half
//    its rows active costs an eighth. Where the rest fits on chip it is solved there
//    (scaled_gram_solve_panels_kernel, panel_cholesky.cuh), else in the block's slot of the
//    workspace (scaled_gram_solve_staged_kernel, panel_stage.cuh). Which launch takes a system is
//    decided by the number of its active rows and never shows in the result: the launches differ
//    in threads and shared memory only, and each passes over the systems of the others.
// Who owns what: a system belongs to one thread, lane group or block, which alone writes its X and
// info; K, D, R and damping are only read. Each warp counts the active rows of one system of a group, warp
// 0 lists those of the system to solve in order (a ballot a 32 rows: the list has one writer, is the
// same in every run, and takes n / 32 steps of the n^3 / 3).
// Where it synchronises: the headers say; here a barrier after the counts, after the list, after
// the load, before the shared store is used for the next system, and before the next counts. No
// atomics.
// Considered and rejected: a prefix sum by the whole block (more barriers than it saves steps up to
// n = 1024), masking without squeezing (eight times the work at half activity), a copy
// of K in shared memory that all systems use (takes the room of the factor; K is in L2), one launch with room for n rows (one
// block a multiprocessor at n = 256, where half-active systems leave room for five).
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

// Counts the active rows of a system, and lists them where `list` has room. Called by one warp.
template <class T>
__device__ __forceinline__ int find_active(const ScaledGramArgs<T>& args, int64_t system,
                                           const ActiveRows<T>* list) {
  const int lane = thread_index() % kWarp;
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
  for (int e = thread_index_here(); e < s.tiles * kTile * s.columns; e += block_threads()) {
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

// One system from list to store, in the store at `memory`; `stage` is null where that is on chip.
template <class T, bool kStaged>
__device__ __forceinline__ void scaled_gram_solve_system(const ScaledGramArgs<T>& args,
                                                         int64_t system, int count,
                                                         const PanelLayout& layout,
                                                         unsigned char* memory, T* stage,
                                                         int32_t* status) {
  const int tiles = tiles_of(count);
  T* factor = reinterpret_cast<T*>(memory);
  T* rhs = factor + panel_offset(tiles);
  T* slope = rhs + tiles * kTile * layout.columns;
  const ActiveRows<T> rows{slope, reinterpret_cast<int32_t*>(slope + tiles * kTile), count};
  const PanelSystem<T> s{factor, rhs, tiles, layout.columns, status};
  if (thread_index() == 0) *status = 0;
  if (thread_index() < kWarp) find_active(args, system, &rows);
  sync_block();
  load_system(args, system, rows, s);
  sync_block();
  bool solved;
  if constexpr (kStaged) {
    solved = forward_staged(s, layout.stage, stage);
  } else {
    solved = forward(s, true);
  }
  if (solved) backward(s);
  store_system(args, system, rows, s, solved);
  sync_block();  // a failed factorisation ends with all threads reading the status
}

// Calls solve(system, count) for the block's systems of `fewest` to `most` tiles of active rows.
// Each warp counts the rows of one system of a group, so that passing one over costs little.
template <class T, class Solve>
__device__ __forceinline__ void for_each_of_size(const ScaledGramArgs<T>& args, int group,
                                                 int fewest, int most, int32_t* counts,
                                                 const Solve& solve) {
  for (int64_t first = block_index() * group; first < args.batch; first += grid_blocks() * group) {
    const int warp = thread_index() / kWarp;
    if (warp < group && first + warp < args.batch) {
      const int count = find_active<T>(args, first + warp, nullptr);
      if (thread_index() % kWarp == 0) counts[warp] = count;
    }
    sync_block();
    for (int member = 0; member < group && first + member < args.batch; ++member) {
      const int count = counts[member];
      if (tiles_of(count) >= fewest && tiles_of(count) <= most) solve(first + member, count);
    }
    sync_block();
  }
}

// What one launch takes of the batch.
struct SizeClass {
  int fewest, most;  // tiles of active rows
  int group;         // systems counted at a time, at most a block's warps
};

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads, panel_blocks(kThreads))
    scaled_gram_solve_panels_kernel(ScaledGramArgs<T> args, PanelLayout layout, SizeClass sizes) {
  unsigned char* shared = shared_memory();
  int32_t* status = reinterpret_cast<int32_t*>(shared);
  const auto solve = [&](int64_t system, int count) {
    scaled_gram_solve_system<T, false>(args, system, count, layout, shared + kSharedHeader, nullptr,
                                       status);
  };
  for_each_of_size(args, sizes.group, sizes.fewest, sizes.most, status + 1, solve);
}

template <class T>
__global__ void __launch_bounds__(kPanelThreads, 1)
    scaled_gram_solve_staged_kernel(ScaledGramArgs<T> args, PanelLayout layout, SizeClass sizes,
                                    unsigned char* workspace) {
  unsigned char* shared = shared_memory();
  int32_t* status = reinterpret_cast<int32_t*>(shared);
  T* stage = reinterpret_cast<T*>(shared + kSharedHeader);
  unsigned char* slot = workspace + block_index() * layout.slot_bytes;
  const auto solve = [&](int64_t system, int count) {
    scaled_gram_solve_system<T, true>(args, system, count, layout, slot, stage, status);
  };
  for_each_of_size(args, sizes.group, sizes.fewest, sizes.most, status + 1, solve);
}

constexpr int64_t kActiveRowBytes = 12;  // slope and number of an active row, at most

template <class T>
PanelPlan scaled_gram_solve_plan(int64_t batch, int64_t n) {
  return panel_plan<T>(device_limits(), batch, n, 1, kActiveRowBytes);
}

// Systems counted at a time: one a block where the batch does not fill the device.
inline int systems_per_group(int64_t batch, int64_t multiprocessors, int threads) {
  return static_cast<int>(std::clamp<int64_t>(batch / (8 * multiprocessors), 1, threads / kWarp));
}

// The systems of `fewest` to `most` tiles, all of which fit on chip.
template <class T>
void launch_size_class(const ScaledGramArgs<T>& args, const PanelLayout& layout, int fewest,
                       int most, void* stream) {
  const int64_t multiprocessors = device_limits().multiprocessors;
  const int threads = panel_threads<T>(most);
  const SizeClass sizes{fewest, most, systems_per_group(args.batch, multiprocessors, threads)};
  const int64_t groups = (args.batch + sizes.group - 1) / sizes.group;
  const LaunchShape shape{std::min(groups, kBlocksPerMultiprocessor * multiprocessors), threads,
                          kSharedHeader + system_bytes<T>(most, layout.columns, kActiveRowBytes)};
  with_panel_threads<T>(threads, [&](auto threads) {
    launch<scaled_gram_solve_panels_kernel<T, decltype(threads)::value>>(shape, stream, args,
                                                                         layout, sizes);
  });
}

// One launch for each number of blocks that fit a multiprocessor: a system takes the shared memory
// of its active rows, not of n. A small batch goes in one: it fills no multiprocessor anyway.
template <class T>
void launch_scaled_gram_solve_panels(const ScaledGramArgs<T>& args, void* workspace,
                                     void* stream) {
  constexpr int kClassEnds[] = {6, 8, 10, 14};
  const PanelPlan plan = scaled_gram_solve_plan<T>(args.batch, args.n);
  const PanelLayout& layout = plan.layout;
  const int64_t multiprocessors = device_limits().multiprocessors;
  int fewest = 0;
  if (args.batch > multiprocessors) {
    for (const int end : kClassEnds) {
      if (end >= layout.on_chip_tiles) break;
      launch_size_class(args, layout, fewest, end, stream);
      fewest = end + 1;
    }
  }
  launch_size_class(args, layout, fewest, layout.on_chip_tiles, stream);
  if (layout.slot_bytes != 0) {
    const SizeClass sizes{layout.on_chip_tiles + 1, tiles_of(args.n),
                          systems_per_group(args.batch, multiprocessors, kPanelThreads)};
    launch<scaled_gram_solve_staged_kernel<T>>(staged_shape<T>(plan), stream, args, layout, sizes,
                                               static_cast<unsigned char*>(workspace));
  }
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
  launch_scaled_gram_solve_panels(args, workspace, stream);
}

}  // namespace backmatch::cuda
