// Cholesky factor and solve of one system of any order by one block, in 16 x 16 tiles.
//
// The store is that of panel_store.cuh. The factorisation is right-looking, one tile column J at a
// time, in two phases of which the first overlaps the next diagonal tile with everything else:
//   update     warp 0: tile (J, J) minus its last product, then its factor (diagonal_tile.cuh)
//              the others: all other tiles (I, K), K >= J, and the right-hand sides minus the
//              products with tile column J - 1 (panel_update.cuh)
//   (barrier)
//   eliminate  one thread a row: rows below and right-hand sides times L[J, J]^-T
//   (barrier)
// and the back substitution is right-looking, two barriers per J.
// Why it is race-free: in `update` only warp 0 touches tile (J, J), each other piece of tile
// columns J.. has one owner, and tile column J - 1 is only read; in `eliminate` each row has one
// owner and the diagonal tile is only read. `status` is written by warp 0 between two barriers and
// read by all after the second.
// The order of the sums of an entry (tile columns in turn) is the same whoever does them, so the
// result depends neither on the number of threads nor on where the store lies.
//
// What binds (estimated from the instruction count, in cycles per tile column; not measured): warp 0
// needs about 1250 in float and 2150 in double, eliminate and the barriers 500 and 800; the others'
// updates take 48 and 64 a tile, so at n = 256 on average 2000 and 2700, at n = 128 500 and 700. Up
// to n = 160 several blocks share a multiprocessor and hide each other's chain (panel_plan.cuh),
// above it the overlap does.
// Considered and rejected: left-looking (see panel_update.cuh), a third phase that factors the
// diagonal tile alone (all other warps wait half of the time), a dynamic share of the updates for
// warp 0 (an integer atomic per piece, to gain 1/8 of the threads where the updates bind),
// eliminating by a product with the inverse tile (see diagonal_tile.cuh).
#pragma once

#include "diagonal_tile.cuh"

namespace backmatch::cuda {

// Solves L z = row for one row of 16 with the diagonal tile of L, read and written through entry(p).
template <class T, class Entry>
__device__ __forceinline__ void eliminate_row(const T* diagonal, const Entry& entry) {
  const T* tile = diagonal + recomputed(0);  // so that its 136 numbers are not kept for the next row
  T value[kTile];
#pragma unroll
  for (int p = 0; p < kTile; ++p) value[p] = entry(p);
#pragma unroll
  for (int p = 0; p < kTile; ++p) {
    value[p] *= tile[Tile<T>::at(p, p)];
#pragma unroll
    for (int q = p / kQuad; q < kQuadsPerTile; ++q) {
      const Quad<T> below = vector_at<const Quad<T>>(tile + Tile<T>::quad(q, p));
#pragma unroll
      for (int v = 0; v < kQuad; ++v) {
        const int c = Tile<T>::row_in_quad(q, v);
        if (c > p) value[c] -= value[p] * below.v[v];
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kTile; ++p) entry(p) = value[p];
}

// Tile column J times L[J, J]^-T, in rows first_row .. end_row - 1 of the tiles.
template <class T, class Tiles>
__device__ __forceinline__ void eliminate(const Tiles& tiles, const T* diagonal, int J,
                                          int first_row, int end_row) {
  for (int u = thread_index_here(); u < (end_row - first_row) * kTile; u += block_threads()) {
    T* tile = tiles.tile(first_row + u / kTile, J);
    const int r = u % kTile;
    eliminate_row(diagonal, [&](int p) -> T& { return tile[Tile<T>::at(r, p)]; });
  }
}

// rhs[tile J] = L[J, J]^-1 rhs[tile J], one thread a column, the last threads first: the others
// have rows of the matrix.
template <class T>
__device__ __forceinline__ void eliminate_rhs(const PanelSystem<T>& s, const T* diagonal, int J) {
  const int columns = recomputed(s.columns);
  T* const rhs = s.rhs + static_cast<int64_t>(J) * kTile * columns;
  for (int u = block_threads() - 1 - thread_index_here(); u < columns; u += block_threads()) {
    eliminate_row(diagonal, [&](int p) -> T& { return rhs[p * columns + u]; });
  }
}

// Factors tile columns first_column .. end_column - 1 of the range, whose tiles have had all
// products with earlier columns subtracted; where its rows begin at the diagonal, the diagonal
// tiles with the forward substitution of the right-hand sides, else only rows below them.
// Returns false, in all threads, when a pivot was bad; *status then says which. Ends with a barrier.
template <class T, class Tiles>
__device__ __forceinline__ bool factor_columns(const PanelSystem<T>& s, const Tiles& tiles,
                                               const TileRange& range) {
  const bool diagonal = range.first_row == range.first_column;
  for (int J = range.first_column; J < range.end_column; ++J) {
    const int thread = thread_index_here();
    const bool has_left = J > range.first_column;
    const auto left = [&](int I) -> const T* { return tiles.tile(I, J - 1); };
    if (diagonal && thread < kWarp) {
      factor_diagonal(tiles.tile(J, J), has_left ? left(J) : nullptr, J, s.status);
    } else if (has_left) {
      const int busy = diagonal ? kWarp : 0;
      const Team team{thread - busy, block_threads() - busy};
      const int first_row = diagonal ? J : range.first_row;
      const TileRange rest{first_row, range.end_row, J, range.end_column};
      update<T>(tiles, left, rest, diagonal, team);
      if (diagonal) update_rhs(s, left, J - 1, J, range.end_column, team.reversed());
    }
    sync_block();
    if (*s.status != 0) return false;
    const T* tile = tiles.tile(J, J);
    eliminate(tiles, tile, J, diagonal ? J + 1 : range.first_row, range.end_row);
    if (diagonal) eliminate_rhs(s, tile, J);
    sync_block();
  }
  return true;
}

// Forward substitution of the right-hand sides with a factor that is there. Ends with a barrier.
template <class T>
__device__ __forceinline__ void substitute(const PanelSystem<T>& s) {
  const PackedTiles<T> tiles{s.factor};
  for (int J = 0; J < s.tiles; ++J) {
    eliminate_rhs(s, tiles.tile(J, J), J);
    sync_block();
    const auto left = [&](int I) -> const T* { return tiles.tile(I, J); };
    update_rhs(s, left, J, J + 1, s.tiles, {thread_index_here(), block_threads()});
    sync_block();
  }
}

// Forward substitution of the right-hand sides; with `factoring` also the factorisation. Returns
// false, in all threads, when a pivot was bad; *status then says which. Ends with a barrier.
template <class T>
__device__ __forceinline__ bool forward(const PanelSystem<T>& s, bool factoring) {
  if (factoring) return factor_columns(s, PackedTiles<T>{s.factor}, {0, s.tiles, 0, s.tiles});
  substitute(s);
  return true;
}

// rhs[tile J] = L[J, J]^-T rhs[tile J], one thread a column.
template <class T>
__device__ __forceinline__ void backward_diagonal(const PanelSystem<T>& s, int J) {
  const int columns = recomputed(s.columns);
  const T* tile = PackedTiles<T>{s.factor}.tile(J, J);
  for (int u = thread_index_here(); u < columns; u += block_threads()) {
    T* entry = s.rhs + static_cast<int64_t>(J) * kTile * columns + u;
    T value[kTile];
#pragma unroll
    for (int p = 0; p < kTile; ++p) value[p] = entry[p * columns];
#pragma unroll
    for (int p = kTile - 1; p >= 0; --p) {
      value[p] *= tile[Tile<T>::at(p, p)];
#pragma unroll
      for (int q = 0; q <= p / kQuad; ++q) {
        const Quad<T> before = vector_at<const Quad<T>>(tile + Tile<T>::quad(q, p));
#pragma unroll
        for (int v = 0; v < kQuad; ++v) {
          const int c = Tile<T>::row_in_quad(q, v);
          if (c < p) value[c] -= value[p] * before.v[v];
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kTile; ++p) entry[p * columns] = value[p];
  }
}

// rhs[i] -= L[tile J, i]^T rhs[tile J] for all rows i before tile J, one thread a row and quad.
// The sum starts at place i of the tile's column and wraps around, so that the threads of a warp,
// whose columns lie 16 words apart, read different banks.
template <class T>
__device__ __forceinline__ void backward_subtract(const PanelSystem<T>& s, int J) {
  const int columns = recomputed(s.columns);
  const int rows = J * kTile;
  const T* panel = s.factor + panel_offset(J);
  const T* known = s.rhs + static_cast<int64_t>(rows) * columns;
  for (int u = thread_index_here(); u < rows * (columns / kQuad); u += block_threads()) {
    const int i = u % rows;
    const int column = u / rows * kQuad;
    T* const own = s.rhs + static_cast<int64_t>(i) * columns + column;
    Quad<T> value = vector_at<Quad<T>>(own);
#pragma unroll
    for (int turn = 0; turn < kTile; ++turn) {
      const int place = (turn + i) % kTile;
      const int r = Tile<T>::row_at(place, i % kTile);
      const T entry = panel[static_cast<int64_t>(i) * kTile + place];
      const Quad<T> x = vector_at<const Quad<T>>(known + r * columns + column);
#pragma unroll
      for (int q = 0; q < kQuad; ++q) value.v[q] -= entry * x.v[q];
    }
    vector_at<Quad<T>>(own) = value;
  }
}

// Back substitution of the right-hand sides. Ends with a barrier.
template <class T>
__device__ __forceinline__ void backward(const PanelSystem<T>& s) {
  for (int J = s.tiles - 1; J >= 0; --J) {
    backward_diagonal(s, J);
    sync_block();
    if (J > 0) {
      backward_subtract(s, J);
      sync_block();
    }
  }
}

}  // namespace backmatch::cuda
