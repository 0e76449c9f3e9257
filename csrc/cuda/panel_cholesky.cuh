// Cholesky factor and solve of one system of any order by one block, in 16-row panels.
//
// Storage: the lower triangle, padded by rows of the identity to `tiles` tiles of 16, is kept as
// row panels. Panel I holds rows 16 I .. 16 I + 15 up to its diagonal tile, column after column:
// entry (16 I + r, c) lies at panel_offset(I) + 16 c + r. Right-hand sides are kept row-major,
// entry (i, c) at i * columns + c. So four neighbouring rows of a panel and four neighbouring
// right-hand sides look alike, namely four neighbouring numbers per column, `stride` apart. That
// makes B^T more rows below the matrix: the forward substitution is the factorisation of those
// rows, and one routine does both. The store may be shared memory or global workspace.
//
// The factorisation is left-looking, one tile column J at a time:
//   subtract   every thread, a 4 x 4 piece in registers: rows J.. minus L[., 0:J] L[J, 0:J]^T
//   (barrier)
//   diagonal   warp 0 factors the tile in registers (lane_cholesky.cuh), its two halves alike
//              (a shuffle orders no memory, so a warp barrier divides its loads from its stores)
//   (barrier)
//   eliminate  one thread a row: rows below and right-hand sides times L[J, J]^-T
//   (barrier)
// and the back substitution is right-looking, two barriers per J.
// Why it is race-free: in `subtract` each 4 x 4 piece of tile column J has one owner and all other
// reads are of columns before J; in `diagonal` only warp 0 touches the tile; in `eliminate` each
// row has one owner and the diagonal tile is only read. `status` is written by warp 0 between two
// barriers and read by all after the second.
//
// Considered and rejected: right-looking factorisation (reads and writes the trailing matrix n/16
// times; left-looking writes each entry twice), packed rows (no aligned vectors, ragged edges in
// the inner loop), row-major tiles (four rows are four words 64 bytes apart: eightfold bank
// conflicts in `subtract`), a padded tile stride (6 % more memory, to save one of three wavefronts
// of a loop that the multiply-adds bound already).
#pragma once

#include "lane_cholesky.cuh"

namespace backmatch::cuda {

constexpr int kTile = 16;
constexpr int kQuad = 4;
constexpr int kQuadsPerTile = kTile / kQuad;

template <class T>
struct alignas(16) Quad {
  T v[kQuad];
};

template <class T>
struct PanelSystem {
  T* factor;        // panel_offset(tiles)
  T* rhs;           // tiles * kTile * columns, in the same store
  int tiles;        // order of the padded system / kTile
  int columns;      // right-hand sides, a multiple of kQuad
  int32_t* status;  // in shared memory: 0, or the LAPACK info of the factorisation
};

// Where panel I starts; with I = tiles, how many elements the factor takes.
__host__ __device__ __forceinline__ constexpr int64_t panel_offset(int64_t panel) {
  return panel * (panel + 1) / 2 * (kTile * kTile);
}

// Fills the factor's store: entry(i, c) for c <= i < n, the identity in the padding. The upper
// halves of the diagonal tiles are set to 0; lane_factor ignores them.
template <class T, class Entry>
__device__ __forceinline__ void load_matrix(const PanelSystem<T>& s, int n, const Entry& entry) {
  const int r = thread_index() % kTile;
  for (int I = 0; I < s.tiles; ++I) {
    T* panel = s.factor + panel_offset(I);
    const int i = I * kTile + r;
    for (int c = thread_index() / kTile; c < (I + 1) * kTile; c += block_threads() / kTile) {
      const T value = c <= i && i < n ? entry(i, c) : T(c == i);
      panel[static_cast<int64_t>(c) * kTile + r] = value;
    }
  }
}

template <class T>
__device__ __forceinline__ T* diagonal_tile(const PanelSystem<T>& s, int J) {
  return s.factor + panel_offset(J) + J * kTile * kTile;
}

// Rows from tile row `first` on, then the right-hand sides, numbered through in units of `unit`.
template <class T>
struct Rows {
  T* base;
  int stride;
};

template <class T>
__device__ __forceinline__ Rows<T> rows_at(const PanelSystem<T>& s, int first, int unit,
                                           int index) {
  const int per_tile = kTile / unit;
  const int beyond = index - (s.tiles - first) * per_tile;
  const int panel = first + index / per_tile;
  // One pointer and a choice of offsets: a choice of pointers would hide the memory they point to.
  const int64_t offset = beyond >= 0 ? s.rhs - s.factor + beyond * unit
                                     : panel_offset(panel) + index % per_tile * unit;
  return {s.factor + offset, beyond >= 0 ? s.columns : kTile};
}

// One 4 x 4 piece of tile column J: rows minus (their columns before J) (L[J, before J])^T.
template <class T>
__device__ __forceinline__ void subtract_piece(const Rows<T>& rows, const T* pivot_rows, int J,
                                               int group) {
  T sum[kQuad][kQuad] = {};
  const T* left = rows.base;
  const T* right = pivot_rows + group * kQuad;
  for (int p = 0; p < J * kTile; ++p) {
    const Quad<T> a = *reinterpret_cast<const Quad<T>*>(left);
    const Quad<T> b = *reinterpret_cast<const Quad<T>*>(right);
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
#pragma unroll
      for (int r = 0; r < kQuad; ++r) sum[c][r] += a.v[r] * b.v[c];
    }
    left += rows.stride;
    right += kTile;
  }
#pragma unroll
  for (int c = 0; c < kQuad; ++c) {
    const int64_t column = J * kTile + group * kQuad + c;
    Quad<T>& target = *reinterpret_cast<Quad<T>*>(rows.base + column * rows.stride);
    Quad<T> value = target;
#pragma unroll
    for (int r = 0; r < kQuad; ++r) value.v[r] -= sum[c][r];
    target = value;
  }
}

template <class T>
__device__ __forceinline__ void subtract(const PanelSystem<T>& s, int J, int first) {
  const int quads = (s.tiles - first) * kQuadsPerTile + s.columns / kQuad;
  const T* pivot_rows = s.factor + panel_offset(J);
  for (int u = thread_index(); u < quads * kQuadsPerTile; u += block_threads()) {
    subtract_piece(rows_at(s, first, kQuad, u / kQuadsPerTile), pivot_rows, J, u % kQuadsPerTile);
  }
}

// Factors tile (J, J). It is left symmetric, with the reciprocals of L's diagonal on its diagonal:
// substitution then reads one contiguous column in either direction.
template <class T>
__device__ __forceinline__ void factor_diagonal(const PanelSystem<T>& s, int J) {
  const int lane = thread_index() % kTile;
  T* tile = diagonal_tile(s, J);
  T row[kTile];
#pragma unroll
  for (int c = 0; c < kTile; ++c) row[c] = tile[c * kTile + lane];
  sync_warp();
  const int32_t info = lane_factor<kTile>(row, lane);
  if (thread_index() < kTile) {
#pragma unroll
    for (int c = 0; c < kTile; ++c) tile[c * kTile + lane] = row[c];
  }
  if (thread_index() == 0 && info != 0) *s.status = J * kTile + info;
}

// Rows of tile column J times L[J, J]^-T, from row tile `first` on and the right-hand sides.
template <class T>
__device__ __forceinline__ void eliminate(const PanelSystem<T>& s, int J, int first) {
  const int count = (s.tiles - first) * kTile + s.columns;
  const T* tile = diagonal_tile(s, J);
  for (int u = thread_index(); u < count; u += block_threads()) {
    const Rows<T> row = rows_at(s, first, 1, u);
    T* entry = row.base + static_cast<int64_t>(J) * kTile * row.stride;
    T value[kTile];
#pragma unroll
    for (int p = 0; p < kTile; ++p) value[p] = entry[p * row.stride];
#pragma unroll
    for (int p = 0; p < kTile; ++p) {
      value[p] *= tile[p * kTile + p];
#pragma unroll
      for (int c = p + 1; c < kTile; ++c) value[c] -= value[p] * tile[p * kTile + c];
    }
#pragma unroll
    for (int p = 0; p < kTile; ++p) entry[p * row.stride] = value[p];
  }
}

// Forward substitution of the right-hand sides; with `factoring` also the factorisation. Returns
// false, in all threads, when a pivot was bad; *status then says which. Ends with a barrier.
template <class T>
__device__ __forceinline__ bool forward(const PanelSystem<T>& s, bool factoring) {
  for (int J = 0; J < s.tiles; ++J) {
    if (J > 0) {
      subtract(s, J, factoring ? J : s.tiles);
      sync_block();
    }
    if (factoring) {
      if (thread_index() < kWarp) factor_diagonal(s, J);
      sync_block();
      if (*s.status != 0) return false;
    }
    eliminate(s, J, factoring ? J + 1 : s.tiles);
    sync_block();
  }
  return true;
}

// rhs[tile J] = L[J, J]^-T rhs[tile J], one thread a column.
template <class T>
__device__ __forceinline__ void backward_diagonal(const PanelSystem<T>& s, int J) {
  const T* tile = diagonal_tile(s, J);
  for (int u = thread_index(); u < s.columns; u += block_threads()) {
    T* entry = s.rhs + static_cast<int64_t>(J) * kTile * s.columns + u;
    T value[kTile];
#pragma unroll
    for (int p = 0; p < kTile; ++p) value[p] = entry[p * s.columns];
#pragma unroll
    for (int p = kTile - 1; p >= 0; --p) {
      value[p] *= tile[p * kTile + p];
#pragma unroll
      for (int c = 0; c < p; ++c) value[c] -= value[p] * tile[p * kTile + c];
    }
#pragma unroll
    for (int p = 0; p < kTile; ++p) entry[p * s.columns] = value[p];
  }
}

// rhs[i] -= L[tile J, i]^T rhs[tile J] for all rows i before tile J, one thread a row and quad.
// The sum starts at row i of the tile and wraps around, so that the threads of a warp, whose
// columns lie 16 words apart, read different banks.
template <class T>
__device__ __forceinline__ void backward_subtract(const PanelSystem<T>& s, int J) {
  const int rows = J * kTile;
  const T* panel = s.factor + panel_offset(J);
  const T* known = s.rhs + static_cast<int64_t>(rows) * s.columns;
  for (int u = thread_index(); u < rows * (s.columns / kQuad); u += block_threads()) {
    const int i = u % rows;
    const int column = u / rows * kQuad;
    T* const own = s.rhs + static_cast<int64_t>(i) * s.columns + column;
    Quad<T>& target = *reinterpret_cast<Quad<T>*>(own);
    Quad<T> value = target;
#pragma unroll
    for (int turn = 0; turn < kTile; ++turn) {
      const int r = (turn + i) % kTile;
      const T entry = panel[static_cast<int64_t>(i) * kTile + r];
      const Quad<T> x = *reinterpret_cast<const Quad<T>*>(known + r * s.columns + column);
#pragma unroll
      for (int q = 0; q < kQuad; ++q) value.v[q] -= entry * x.v[q];
    }
    target = value;
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
