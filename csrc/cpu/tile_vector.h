// One right-hand side beside the factor of tile_cholesky.h.
//
// The right-hand side is row n of the matrix: factoring columns 0 .. n leaves there the result of
// the forward substitution, at no cost where the last panel has room. The back substitution takes
// kLanes rows at a time and turns their blocks in registers, so that entries of the result are
// the lanes. Both keep the order of operations of lane_cholesky.h.
#pragma once

#include "tile_cholesky.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

template <class T>
void tile_put_vector(const T* rhs, int64_t stride, int64_t n, T* matrix) {
  T* place = matrix + tile_index<T>(n, 0);
  for (int64_t p = 0; p < n; ++p) place[p * kPanelRows<T>] = rhs[p * stride];
}

// Rows i .. i + kLanes, columns p .. p + kLanes of the factor, one vector per row.
template <class T>
BACKMATCH_INLINE void tile_turn(const T* matrix, int64_t i, int64_t p, Vec<T> (&row)[kLanes<T>]) {
  const T* place = matrix + tile_index<T>(i, p);
#pragma GCC unroll 16
  for (int c = 0; c < kLanes<T>; ++c) row[c] = load(place + c * kPanelRows<T>);
  transpose<T>(row);
}

// x[i .. i + rows] from what is left of them; rows[l] is row i + l of the corner block.
template <class T>
BACKMATCH_INLINE void tile_back_corner(const Vec<T> (&row)[kLanes<T>], int64_t rows, T* x) {
  Vec<T> rest = load(x);
#pragma GCC unroll 16
  for (int r = kLanes<T> - 1; r >= 0; --r) {
    if (r >= rows) continue;
    x[r] = rest[r] * row[r][r];
    rest -= row[r] * x[r];
  }
}

// Solves for the right-hand side in row n; x has room for whole vectors.
template <class T>
void tile_back_vector(const T* matrix, int64_t n, T* x) {
  constexpr int kWidth = kLanes<T>;
  const T* place = matrix + tile_index<T>(n, 0);
  for (int64_t p = 0; p < n; ++p) x[p] = place[p * kPanelRows<T>];
  for (int64_t i = (n - 1) / kWidth * kWidth; i >= 0; i -= kWidth) {
    const int64_t rows = n - i < kWidth ? n - i : kWidth;
    Vec<T> row[kWidth];
    tile_turn(matrix, i, i, row);
    tile_back_corner(row, rows, x + i);
    for (int64_t p = 0; p < i; p += kWidth) {
      tile_turn(matrix, i, p, row);
      Vec<T> rest = load(x + p);
#pragma GCC unroll 16
      for (int r = kWidth - 1; r >= 0; --r)
        if (r < rows) rest -= row[r] * x[i + r];
      store(x + p, rest);
    }
  }
}

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
