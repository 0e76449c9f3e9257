// The factorisation where the factor does not fit on chip: wide panels staged in shared memory.
//
// The store is global workspace, hot in L2. A wide panel of `width` tile columns passes through
// shared memory once, in blocks of `rows` tile rows:
//   fetch      the block's tiles, and the first tile column on their left
//   subtract   for each tile column on the left: all threads update the block with it, while the
//              next one is on its way to the second buffer
//   (barrier)
//   factor     the tile columns of the block, as on chip (panel_cholesky.cuh)
//   store      the block's tiles to the workspace
//   (barrier)
// The first block of a wide panel begins with its diagonal tiles, which stay in shared memory for
// the blocks below them. So the part on the left is read once per wide panel, not once per tile
// column: n^3 / (6 * 16 * width) elements in all, at n = 512 in float with width 4 1.4 MB instead of
// 5.6 MB a system: 60,000 cycles of a multiprocessor's share of L2 against 160,000 of multiply-adds.
// Race-free: a buffer is filled again only after the barrier that ends its use; a thread waits for
// its own copies before the barrier that shows them to the others; workspace slots belong to one
// block. The right-hand sides stay in the workspace (4 to 32 columns, few accesses).
// The order of an entry's sums is that on chip, so are its bits.
// Considered and rejected: a cluster with the factor in distributed shared memory (no host twin,
// one architecture), the update straight from L2 to registers (a thread's eight rows are half a
// sector each, and every value is wanted by eight threads), one block of all rows (no bound on n).
#pragma once

#include <algorithm>

#include "panel_cholesky.cuh"

namespace backmatch::cuda {

constexpr int kMaxStageWidth = 4;

struct StageShape {
  int width;  // tile columns of a wide panel
  int rows;   // tile rows of a block below the diagonal tiles; 0 where there is no stage
};

// Tiles in shared memory: the block, then two buffers for a tile column on its left.
__host__ __device__ constexpr int64_t stage_tiles(const StageShape& shape) {
  return int64_t(shape.width + shape.rows) * (shape.width + 2);
}

// The block in shared memory: rows first_column .. end_column - 1, then rows from `below` on.
template <class T>
struct StagedTiles {
  T* base;
  int first_column, end_column, below;

  __device__ __forceinline__ int width() const { return end_column - first_column; }
  __device__ __forceinline__ int place(int I) const {
    return I < end_column ? I - first_column : I - below + width();
  }
  __device__ __forceinline__ int row_at(int place) const {
    return place < width() ? first_column + place : below + place - width();
  }
  __device__ __forceinline__ T* tile(int I, int J) const {
    return base + (place(I) * width() + J - first_column) * kTileSize;
  }
};

struct alignas(16) Bytes16 {
  unsigned char value[16];
};

// Calls `copy(global, shared)` for every 16 bytes of the block's tiles.
template <class T, class Copy>
__device__ __forceinline__ void for_each_piece(const PanelSystem<T>& s, const StagedTiles<T>& tiles,
                                               const TileRange& range, const Copy& copy) {
  constexpr int kStep = 16 / sizeof(T);
  constexpr int kPieces = kTileSize / kStep;
  const int width = tiles.width();
  const int count = (range.end_row - range.first_row) * width * kPieces;
  for (int u = thread_index_here(); u < count; u += block_threads()) {
    const int I = range.first_row + u / kPieces / width;
    const int J = range.first_column + u / kPieces % width;
    const int e = u % kPieces * kStep;
    if (J <= I) copy(PackedTiles<T>{s.factor}.tile(I, J) + e, tiles.tile(I, J) + e);
  }
}

// Starts to copy tile column K of the block's rows, and of its diagonal tiles' rows, to `buffer`.
template <class T>
__device__ __forceinline__ void fetch_column(const PanelSystem<T>& s, const StagedTiles<T>& tiles,
                                             int end_row, int K, T* buffer) {
  constexpr int kStep = 16 / sizeof(T);
  constexpr int kPieces = kTileSize / kStep;
  const int count = (tiles.width() + end_row - tiles.below) * kPieces;
  for (int u = thread_index_here(); u < count; u += block_threads()) {
    const T* tile = PackedTiles<T>{s.factor}.tile(tiles.row_at(u / kPieces), K);
    copy_to_shared(buffer + u * kStep, tile + u % kPieces * kStep);
  }
}

// Fetches the block and subtracts the products with all tile columns on its left. Begins after and
// ends with a barrier.
template <class T>
__device__ __forceinline__ void gather(const PanelSystem<T>& s, const StagedTiles<T>& tiles,
                                       const TileRange& range, T* buffers, int buffer_size) {
  const bool diagonal = range.first_row == range.first_column;
  for_each_piece(s, tiles, range, [](T* global, T* shared) { copy_to_shared(shared, global); });
  if (range.first_column > 0) fetch_column(s, tiles, range.end_row, 0, buffers);
  wait_for_copies();
  sync_block();
  for (int K = 0; K < range.first_column; ++K) {
    const Team all{thread_index_here(), block_threads()};
    const T* buffer = buffers + K % 2 * buffer_size;
    if (K + 1 < range.first_column) {
      fetch_column(s, tiles, range.end_row, K + 1, buffers + (K + 1) % 2 * buffer_size);
    }
    const auto left = [&](int I) { return buffer + tiles.place(I) * kTileSize; };
    update<T>(tiles, left, range, false, all);
    if (diagonal) update_rhs(s, left, K, range.first_column, range.end_column, all.reversed());
    wait_for_copies();
    sync_block();
  }
}

// forward() with the store in the workspace, through `stage` in shared memory.
template <class T>
__device__ __forceinline__ bool forward_staged(const PanelSystem<T>& s, const StageShape& shape,
                                               T* stage) {
  T* buffers = stage + (shape.width + shape.rows) * shape.width * kTileSize;
  const int buffer_size = (shape.width + shape.rows) * kTileSize;
  for (int first = 0; first < s.tiles; first += shape.width) {
    const int end = smaller(first + shape.width, s.tiles);
    int first_row = first;
    int below = end;
    do {
      const int end_row = smaller(below + shape.rows, s.tiles);
      const StagedTiles<T> tiles{stage, first, end, below};
      const TileRange range{first_row, end_row, first, end};
      gather(s, tiles, range, buffers, buffer_size);
      if (!factor_columns(s, tiles, range)) return false;
      for_each_piece(s, tiles, range, [](T* global, T* shared) {
        vector_at<Bytes16>(global) = vector_at<Bytes16>(shared);
      });
      sync_block();
      first_row = below = end_row;
    } while (below < s.tiles);
  }
  return true;
}

}  // namespace backmatch::cuda
