// (Z^T D_j^2 Z + damping_j I) d_j = Z^T D_j R_j: the least-squares problem of ridge in primal form.
//
// One block a system. It sums the matrix straight into the packed panels of panel_cholesky.cuh and
// the right-hand side beside them, factors and solves there: no matrix of a system is ever in main
// memory. For orders above kPrimalOrder that fit in shared memory with a chunk of Z; for others
// ridge_primal_fits says no, and the caller forms the matrices with weighted_gram.
// Summing goes in passes: in each pass every warp owns one tile of 32 x 32 of the lower triangle
// (gram_tile.cuh), in registers, and the block goes through the active rows of Z. A chunk holds all
// columns. Orders 64, 128 and 256 have 3, 10 and 36 tiles; in float 2, 3 and 8 warps need 2, 4 and 5
// passes for them.
// Who owns what: a system belongs to one block, which alone writes its d and info. While summing, a
// tile of the factor and an entry of the right-hand side are written by one thread each. Blocks
// stride over the batch; Z, D, R and damping are only read.
// Where it synchronises: in and after the listing of active rows, after a chunk was stored, after
// it was used, before the factorisation, after a system; and as panel_cholesky.cuh says. No
// atomics.
//
// Considered and rejected: G in main memory (written once and read by the solver: 64 KB each at
// order 128 in float, 40 ns of an H100's memory for a system, about as long as summing 128 active
// rows takes by the instruction count), all passes at once with several tiles a warp (32 sums a
// thread and tile; loading is then paid once, but orders above 64 do not fit the registers), two buffers
// for chunks (costs a fifth of the blocks that share a multiprocessor at order 128), orders up to
// 32 (their G is small, and spd_solve solves several systems a warp).
#pragma once

#include "../kernels.h"
#include "gram_tile.cuh"
#include "panel_plan.cuh"

namespace backmatch::cuda {

template <class T>
using PrimalTile = WarpTile<T, 64>;
template <class T>
using PrimalRows = typename PrimalTile<T>::Rows;

constexpr int kPrimalOrder = 32;   // smaller systems share a warp elsewhere
constexpr int kPrimalColumns = 2;  // of a chunk that a thread reads ahead

// Shared memory of a block beyond that of the panels: active rows, their D R, a chunk of Z.
template <class T>
struct PrimalStore {
  ActiveRows<T> rows;
  T* target;
  T* left;
  T* right;
  int stride;

  int width;  // columns, of whole tiles

  static __host__ __device__ __forceinline__ constexpr int width_of(int64_t n) {
    constexpr int kColumns = PrimalTile<T>::kColumns;
    return static_cast<int>((n + kColumns - 1) / kColumns * kColumns);
  }
  static constexpr int64_t bytes(int64_t n) {
    return ActiveRows<T>::kBytes +
           (kWindow + 2 * PrimalRows<T>::size(width_of(n))) * int64_t(sizeof(T));
  }
  __device__ __forceinline__ PrimalStore(unsigned char* memory, int64_t n)
      : rows(memory),
        target(reinterpret_cast<T*>(memory + ActiveRows<T>::kBytes)),
        left(target + kWindow),
        right(left + PrimalRows<T>::size(width_of(n))),
        stride(PrimalRows<T>::stride(width_of(n))),
        width(width_of(n)) {}
};

// The tiles of the lower triangle are numbered row of tiles after row of tiles; so many are in one.
template <class T>
__device__ __forceinline__ int tiles_in_row(int row) {
  return (row * PrimalTile<T>::kRows + PrimalTile<T>::kRows - 1) / PrimalTile<T>::kColumns + 1;
}

// Rows of tile `index` of the lower triangle start at `row`, its columns at `column`.
struct TileStart {
  int row, column;
};

template <class T>
__device__ __forceinline__ TileStart tile_start(int index) {
  int row = 0;
  for (int count; index >= (count = tiles_in_row<T>(row)); ++row) index -= count;
  return {row * PrimalTile<T>::kRows, index * PrimalTile<T>::kColumns};
}

// Reads column `column` of the rows of a chunk that are active; zeros beyond n.
template <class T>
__device__ __forceinline__ void load_rows(const RidgePrimalArgs<T>& args, const int64_t* row,
                                          int active, int column,
                                          T (&value)[PrimalRows<T>::kChunk]) {
  const int count = column < args.n ? active : 0;
  const int64_t own = column * args.z_col * int64_t(sizeof(T));
#pragma unroll
  for (int k = 0; k < PrimalRows<T>::kChunk; ++k) {
    value[k] = k < count ? at_byte(args.Z, row[k] + own) : T(0);
  }
}

// Puts a column of a chunk into shared memory, and its part of Z^T D R to the right-hand side.
template <class T>
__device__ __forceinline__ void store_rows(const PrimalStore<T>& store, const PanelSystem<T>& s,
                                           bool with_target, int start, int active, int column,
                                           T (&value)[PrimalRows<T>::kChunk]) {
  using Rows = PrimalRows<T>;
  Rows::put(store.right, store.stride, column, 0, 1, value);
  if (with_target && column < s.tiles * kTile) {
    T sum = T(0);
#pragma unroll
    for (int k = 0; k < Rows::kChunk; ++k) {
      if (k < active) sum += value[k] * store.target[start + k];
    }
    s.rhs[column * s.columns] += sum;
  }
#pragma unroll
  for (int k = 0; k < Rows::kChunk; ++k) {
    const T slope = store.rows.weight[start + k];
    value[k] *= slope * slope;
  }
  Rows::put(store.left, store.stride, column, 0, 1, value);
}

// Sums this warp's tile over the rows of Z, and the right-hand side if `with_target`.
template <class T>
__device__ __forceinline__ void sum_rows(const RidgePrimalArgs<T>& args, int64_t system,
                                         const PrimalStore<T>& store, const PanelSystem<T>& s,
                                         const TileStart& place, bool busy, bool with_target,
                                         PrimalTile<T>& tile) {
  const int own = thread_index();
  const int threads = block_threads();
  const T* D = args.D + system * args.d_batch;
  const T* R = args.R + system * args.r_batch;
  for (int64_t base = 0; base < args.m; base += kWindow) {
    const int count = store.rows.template find<false>(
        Group{own, threads}, base, args.m, args.z_row,
        [&](int64_t row) { return D[row * args.d_col]; },
        [&](int place_in_list, int64_t row, T slope) {
          store.target[place_in_list] = slope * R[row * args.r_col];
        });
    sync_block();
    T value[kPrimalColumns][PrimalRows<T>::kChunk];
    const auto load = [&](int start) {
#pragma unroll
      for (int u = 0; u < kPrimalColumns; ++u) {
        const int c = own + u * threads;
        if (c < store.width) {
          load_rows(args, store.rows.offset + start, count - start, c, value[u]);
        }
      }
    };
    load(0);
    for (int start = 0; start < count; start += PrimalRows<T>::kChunk) {
      const int active = count - start;
#pragma unroll
      for (int u = 0; u < kPrimalColumns; ++u) {
        const int c = own + u * threads;
        if (c < store.width) store_rows(store, s, with_target, start, active, c, value[u]);
      }
      for (int c = own + kPrimalColumns * threads; c < store.width; c += threads) {
        load_rows(args, store.rows.offset + start, active, c, value[0]);
        store_rows(store, s, with_target, start, active, c, value[0]);
      }
      sync_block();
      load(start + PrimalRows<T>::kChunk);
      if (busy) {
        tile.add(store.left + place.row, store.right + place.column, store.stride, own % kWarp);
      }
      sync_block();
    }
  }
  tile.finish(own % kWarp);
}

// The damped matrix as the factorisation wants it: lower triangle, identity in the padding.
template <class T>
__device__ __forceinline__ void store_tile(const PanelSystem<T>& s, const TileStart& place, int n,
                                           T damping, const PrimalTile<T>& tile) {
  tile.visit(thread_index() % kWarp, [&](int i, int c, T sum) {
    const int row = place.row + i, column = place.column + c;
    const int panel = row / kTile;
    if (panel >= s.tiles || column / kTile > panel) return;
    const T inside = row == column ? sum + damping : sum;
    const T value = row < n && column <= row ? inside : T(row == column);
    T* target = s.factor + panel_offset(panel) + column / kTile * kTileSize;
    target[Tile<T>::at(row % kTile, column % kTile)] = value;
  });
}

template <class T>
__device__ __forceinline__ void form_system(const RidgePrimalArgs<T>& args, int64_t system,
                                            const PrimalStore<T>& store, const PanelSystem<T>& s) {
  const int n = static_cast<int>(args.n);
  const T damping = args.damping[system * args.damping_stride];
  for (int i = thread_index(); i < s.tiles * kTile; i += block_threads()) {
    for (int c = 0; c < s.columns; ++c) s.rhs[i * s.columns + c] = T(0);
  }
  const int warps = block_threads() / kWarp;
  const int end = (n + PrimalTile<T>::kRows - 1) / PrimalTile<T>::kRows * PrimalTile<T>::kRows;
  for (int first = 0; tile_start<T>(first).row < end; first += warps) {
    // In reverse, so that the tile that is factored first is not by chance that of the warp that
    // factors it: the barrier before the factorisation is then needed, and tested, at any order.
    const TileStart place = tile_start<T>(first + warps - 1 - thread_index() / kWarp);
    const bool busy = place.row < end;
    PrimalTile<T> tile;
    sum_rows(args, system, store, s, place, busy, first == 0, tile);
    if (busy) store_tile(s, place, n, damping, tile);
  }
}

template <class T>
__global__ void __launch_bounds__(kPanelThreads)
    ridge_primal_kernel(RidgePrimalArgs<T> args, PanelLayout layout) {
  unsigned char* shared = shared_memory();
  int32_t* status = reinterpret_cast<int32_t*>(shared);
  const int tiles = tiles_of(args.n);
  T* factor = reinterpret_cast<T*>(shared + kSharedHeader);
  T* rhs = factor + panel_offset(tiles);
  const PanelSystem<T> s{factor, rhs, tiles, layout.columns, status};
  T* end = rhs + tiles * kTile * layout.columns;
  const PrimalStore<T> store(reinterpret_cast<unsigned char*>(end), args.n);
  for (int64_t system = block_index(); system < args.batch; system += grid_blocks()) {
    if (thread_index() == 0) *status = 0;
    form_system(args, system, store, s);
    sync_block();
    const bool solved = forward(s, true);
    if (solved) backward(s);
    T* d = args.d + system * args.n;
    for (int c = thread_index(); c < args.n; c += block_threads()) {
      d[c] = solved ? s.rhs[c * s.columns] : kNaN<T>;
    }
    if (thread_index() == 0) args.info[system] = *status;
    sync_block();  // a failed factorisation ends with all threads reading the status
  }
}

template <class T>
PanelPlan ridge_primal_plan(int64_t batch, int64_t n) {
  DeviceLimits limits = device_limits();
  limits.shared_bytes -= PrimalStore<T>::bytes(n);
  PanelPlan plan = panel_plan<T>(limits, batch, n, 1, 0);
  plan.shape.shared_bytes += PrimalStore<T>::bytes(n);
  return plan;
}

template <class T>
bool ridge_primal_fits(int64_t n) {
  check_order(n);
  const int64_t bytes =
      kSharedHeader + system_bytes<T>(tiles_of(n), kQuad, 0) + PrimalStore<T>::bytes(n);
  return n > kPrimalOrder && bytes <= device_limits().shared_bytes;
}

template <class T>
void launch_ridge_primal(const RidgePrimalArgs<T>& args, void* stream) {
  if (!ridge_primal_fits<T>(args.n)) {
    throw std::invalid_argument("backmatch CUDA: ridge_primal does not take n = " +
                                std::to_string(args.n) + " on this device");
  }
  if (args.batch == 0) return;
  const PanelPlan plan = ridge_primal_plan<T>(args.batch, args.n);
  launch<ridge_primal_kernel<T>>(plan.shape, stream, args, plan.layout);
}

}  // namespace backmatch::cuda
