// Moving one system into the row-panel layout of tile_cholesky.h.
#pragma once

#include "tile_cholesky.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

// kLanes full rows from `first` on, columns 0 .. first + kLanes. The corner above the diagonal is
// copied along where that is cheaper than to leave it out; nothing reads it.
template <class T>
void tile_load_row_block(const T* A, int64_t row, int64_t column, int64_t first, T* matrix) {
  constexpr int kWidth = kLanes<T>;
  T* place = matrix + tile_index<T>(first, 0);
  if (row == 1) {
    for (int64_t p = 0; p < first + kWidth; ++p)
      store(place + p * kPanelRows<T>, load(A + first + p * column));
    return;
  }
  for (int64_t p = 0; p < first + kWidth; p += kWidth) {
    if (column == 1) {
      Vec<T> entry[kWidth];
#pragma GCC unroll 16
      for (int l = 0; l < kWidth; ++l) entry[l] = load(A + (first + l) * row + p);
      transpose<T>(entry);
#pragma GCC unroll 16
      for (int c = 0; c < kWidth; ++c) store(place + (p + c) * kPanelRows<T>, entry[c]);
    } else {
      for (int c = 0; c < kWidth; ++c)
        for (int l = 0; l < kWidth; ++l)
          place[(p + c) * kPanelRows<T> + l] =
              p + c <= first + l ? A[(first + l) * row + (p + c) * column] : T(0);
    }
  }
}

// Zeros above the diagonal of every panel: stale numbers there could be subnormal and slow.
template <class T>
void tile_clear_upper(T* matrix, int64_t n) {
  const int64_t order = padded_order(n);
  for (int64_t first = 0; first < n; first += kPanelRows<T>) {
    const int64_t stop = first + kPanelRows<T> < order ? first + kPanelRows<T> : order;
    for (int64_t column = first + 1; column < stop; ++column)
      for (int64_t row = first; row < column; ++row) matrix[tile_index<T>(row, column)] = T(0);
  }
}

template <class T>
void tile_load_matrix(const T* A, int64_t n, int64_t row, int64_t column, int64_t rows, T* matrix) {
  const int64_t whole = n / kLanes<T> * kLanes<T>;
  for (int64_t first = 0; first < whole; first += kLanes<T>)
    tile_load_row_block(A, row, column, first, matrix);
  for (int64_t i = whole; i < n; ++i)
    for (int64_t p = 0; p <= i; ++p) matrix[tile_index<T>(i, p)] = A[i * row + p * column];
  tile_pad(matrix, n, rows);
  tile_clear_upper(matrix, n);
}

// `count` right-hand sides into rhs[p * wide + s], zeros elsewhere.
template <class T>
void tile_load_rhs(const T* B, int64_t n, int64_t row, int64_t column, int64_t count, int64_t wide,
                   T* rhs) {
  for (int64_t p = 0; p < padded_order(n); ++p)
    for (int64_t s = 0; s < wide; ++s)
      rhs[p * wide + s] = p < n && s < count ? B[p * row + s * column] : T(0);
}

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
