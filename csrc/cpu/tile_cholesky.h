// Cholesky factor and solve of one system, vectorised over rows.
//
// Layout: the lower triangle is cut into panels of kPanelRows rows; panel i keeps its columns
// 0 .. (i + 1) * kPanelRows (capped at the padded order) one after the other, kPanelRows
// contiguous entries each. Right-hand sides are panels of further rows, one or two vectors wide.
// The factor replaces the matrix in place; the diagonal keeps the reciprocal pivots. Rows past n
// are rows of the identity, entries above the diagonal hold numbers that nothing reads.
//
// The order of operations is that of lane_cholesky.h, entry by entry, and so are the bits.
#pragma once

#include "simd.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

constexpr int kPanelVectors = kBlockVectors;
constexpr int kPanelColumns = kBlockScalars;

template <class T>
constexpr int kPanelRows = kPanelVectors* kLanes<T>;
static_assert(kPanelRows<double> % kPanelColumns == 0, "a block of columns stays in its panel");

BACKMATCH_INLINE int64_t padded_order(int64_t n) {
  return (n + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
}

template <class T>
BACKMATCH_INLINE int64_t tile_panels(int64_t n) {
  return (n + kPanelRows<T> - 1) / kPanelRows<T>;
}

// Elements before panel i.
template <class T>
BACKMATCH_INLINE int64_t tile_offset(int64_t i) {
  return int64_t{kPanelRows<T>} * kPanelRows<T> * (i * (i + 1) / 2);
}

// Index of entry (row, column), column < (row / kPanelRows + 1) * kPanelRows.
template <class T>
BACKMATCH_INLINE int64_t tile_index(int64_t row, int64_t column) {
  return tile_offset<T>(row / kPanelRows<T>) + column * kPanelRows<T> + row % kPanelRows<T>;
}

template <class T, int M>
struct TileSums {
  Vec<T> at[kPanelColumns][M];
};

// sum -= rows[0:depth] columns[0:depth]^T for M vectors of rows; a column of `rows` takes kWide
// entries, one of `columns` a panel's width.
template <class T, int M, int kWide>
BACKMATCH_INLINE void tile_subtract(const T* rows, const T* columns, int64_t depth,
                                    TileSums<T, M>& sums) {
  Vec<T> sum[kPanelColumns][M];
#pragma GCC unroll 8
  for (int c = 0; c < kPanelColumns; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < M; ++v) sum[c][v] = sums.at[c][v];
  for (int64_t p = 0; p < depth; ++p, rows += kWide, columns += kPanelRows<T>) {
    Vec<T> x[M];
#pragma GCC unroll 4
    for (int v = 0; v < M; ++v) x[v] = load(rows + v * kLanes<T>);
#pragma GCC unroll 8
    for (int c = 0; c < kPanelColumns; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < M; ++v) sum[c][v] -= x[v] * columns[c];
  }
#pragma GCC unroll 8
  for (int c = 0; c < kPanelColumns; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < M; ++v) sums.at[c][v] = sum[c][v];
}

// Columns j .. j + kPanelColumns of a row panel. `corner` points at entry (j, j) of the factor.
// In the diagonal panel the corner is part of the panel itself and is finished here, column by
// column, before the next column reads it.
template <class T, int M, int kWide, bool kDiagonal>
BACKMATCH_INLINE void tile_columns(T* rows, const T* columns, T* corner, int64_t j, int32_t& info) {
  TileSums<T, M> sums;
  T* place = rows + j * kWide;
  for (int c = 0; c < kPanelColumns; ++c)
    for (int v = 0; v < M; ++v) sums.at[c][v] = load(place + c * kWide + v * kLanes<T>);
  tile_subtract<T, M, kWide>(rows, columns, j, sums);
  for (int c = 0; c < kPanelColumns; ++c) {
    T* column = place + c * kWide;
    for (int v = 0; v < M; ++v) {
      Vec<T> value = sums.at[c][v];
      for (int q = 0; q < c; ++q) value -= sums.at[q][v] * corner[q * kPanelRows<T> + c];
      sums.at[c][v] = value;
      if (kDiagonal) store(column + v * kLanes<T>, value);
    }
    T* diagonal = corner + c * kPanelRows<T> + c;
    T inverse = *diagonal;
    if (kDiagonal) {
      const bool good = inverse > T(0) && inverse <= Simd<T>::kLargest;
      if (!good && info == 0) info = static_cast<int32_t>(j + c + 1);
      inverse = T(1) / square_root(good ? inverse : T(1));
    }
    for (int v = 0; v < M; ++v) {
      sums.at[c][v] *= inverse;
      store(column + v * kLanes<T>, sums.at[c][v]);
    }
    if (kDiagonal) *diagonal = inverse;
  }
}

// Panel i of the factor, its first M vectors of rows.
template <class T, int M>
void tile_panel(T* matrix, int64_t i, int64_t order, int32_t& info) {
  constexpr int kWide = kPanelRows<T>;
  T* rows = matrix + tile_offset<T>(i);
  const int64_t first = i * kWide;
  for (int64_t j = 0; j < first; j += kPanelColumns) {
    T* columns = matrix + tile_index<T>(j, 0);
    tile_columns<T, M, kWide, false>(rows, columns, columns + j * kWide, j, info);
  }
  const int64_t stop = first + kWide < order ? first + kWide : order;
  for (int64_t j = first; j < stop; j += kPanelColumns) {
    T* columns = rows + (j - first);
    tile_columns<T, M, kWide, true>(rows, columns, columns + j * kWide, j, info);
  }
}

// Factors columns 0 .. n of a matrix of `rows` rows, at least n. Returns info: the first bad pivot
// (1-based), else 0.
template <class T>
int32_t tile_factor(T* matrix, int64_t n, int64_t rows) {
  const int64_t order = padded_order(n);
  const int64_t last = tile_panels<T>(rows) - 1;
  const int64_t rest = (order < rows ? rows : order) - last * kPanelRows<T>;
  int32_t info = 0;
  for (int64_t i = 0; i < last; ++i) tile_panel<T, kPanelVectors>(matrix, i, order, info);
  if (last >= 0 && rest <= kLanes<T>) {
    tile_panel<T, 1>(matrix, last, order, info);
  } else if (last >= 0) {
    tile_panel<T, kPanelVectors>(matrix, last, order, info);
  }
  return info > n ? 0 : info;  // the padding may hold a right-hand side, see tile_vector.h
}

// Solves for the M vectors of right-hand sides in rhs[p * M * kLanes + s], p < padded_order(n).
template <class T, int M>
void tile_solve(T* matrix, int64_t n, T* rhs) {
  constexpr int kWide = M * kLanes<T>;
  const int64_t order = padded_order(n);
  int32_t unused = 0;
  for (int64_t j = 0; j < order; j += kPanelColumns) {
    T* columns = matrix + tile_index<T>(j, 0);
    tile_columns<T, M, kWide, false>(rhs, columns, columns + j * kPanelRows<T>, j, unused);
  }
  for (int64_t j = order - kPanelColumns; j >= 0; j -= kPanelColumns) {
    const T* columns = matrix + tile_index<T>(j, 0);
    const T* corner = columns + j * kPanelRows<T>;
    T* here = rhs + j * kWide;
    for (int v = 0; v < M; ++v) {
      Vec<T> x[kPanelColumns];
#pragma GCC unroll 8
      for (int r = kPanelColumns - 1; r >= 0; --r) {
        x[r] = load(here + r * kWide + v * kLanes<T>);
#pragma GCC unroll 8
        for (int q = kPanelColumns - 1; q > r; --q) x[r] -= x[q] * corner[r * kPanelRows<T> + q];
        x[r] *= corner[r * kPanelRows<T> + r];
        store(here + r * kWide + v * kLanes<T>, x[r]);
      }
      for (int64_t p = 0; p < j; ++p) {
        T* place = rhs + p * kWide + v * kLanes<T>;
        Vec<T> rest = load(place);
#pragma GCC unroll 8
        for (int r = kPanelColumns - 1; r >= 0; --r) rest -= x[r] * columns[p * kPanelRows<T> + r];
        store(place, rest);
      }
    }
  }
}

// Not inlined for the reason given at lane_damp.
template <class T>
__attribute__((noinline)) void tile_damp(T* matrix, int64_t n, T damping) {
  for (int64_t i = 0; i < n; ++i) matrix[tile_index<T>(i, i)] += damping;
}

// Rows n .. up to the end of the panel of the last of `rows` become rows of the identity.
template <class T>
void tile_pad(T* matrix, int64_t n, int64_t rows) {
  const int64_t order = padded_order(n);
  const int64_t end = tile_panels<T>(rows) * kPanelRows<T>;
  for (int64_t first = n / kPanelRows<T> * kPanelRows<T>; first < end; first += kPanelRows<T>)
    for (int64_t column = 0; column < order; ++column)
      for (int64_t row = first < n ? n : first; row < first + kPanelRows<T>; ++row)
        matrix[tile_index<T>(row, column)] = row == column ? T(1) : T(0);
}

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
