// Many rows times one matrix: out = A B with A (rows x depth) row-major and B (depth x columns).
//
// B is packed once into panels of kProductColumns columns, the last one filled up with zeros; all
// threads share it. A tile of kBlockScalars rows of A stays in registers against one panel, so that
// the inner loop loads kBlockVectors vectors and broadcasts kBlockScalars scalars for their product.
// Every entry is one sum over the depth in ascending order: its bits depend on its row of A and on
// B only, not on how rows are split.
#pragma once

#include "simd.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

template <class T>
constexpr int64_t kProductColumns = kBlockVectors* kLanes<T>;

template <class T>
BACKMATCH_INLINE int64_t product_panels(int64_t columns) {
  return (columns + kProductColumns<T> - 1) / kProductColumns<T>;
}

template <class T>
BACKMATCH_INLINE int64_t product_elements(int64_t depth, int64_t columns) {
  return product_panels<T>(columns) * depth * kProductColumns<T>;
}

// panel[q * kProductColumns + c] = from[q + c * column] for whole squares of lanes, transposed in
// registers; returns the depth up to which that went.
template <class T>
int64_t pack_transposed(const T* from, int64_t column, int64_t depth, int64_t count, T* panel) {
  constexpr int kWidth = kLanes<T>;
  const int64_t whole = depth / kWidth * kWidth;
  for (int64_t c = 0; c < count; c += kWidth)
    for (int64_t q = 0; q < whole; q += kWidth) {
      Vec<T> square[kWidth];
#pragma GCC unroll 16
      for (int l = 0; l < kWidth; ++l) square[l] = load(from + q + (c + l) * column);
      transpose<T>(square);
#pragma GCC unroll 16
      for (int l = 0; l < kWidth; ++l)
        store(panel + (q + l) * kProductColumns<T> + c, square[l]);
    }
  return whole;
}

// Panel `index` of B. Runs along B's contiguous direction, whichever it is.
template <class T>
void pack_product(const T* B, int64_t row, int64_t column, int64_t depth, int64_t columns,
                  int64_t index, T* packed) {
  constexpr int64_t kWide = kProductColumns<T>;
  const int64_t first = index * kWide;
  const int64_t count = columns - first < kWide ? columns - first : kWide;
  T* panel = packed + index * depth * kWide;
  const T* from = B + first * column;
  if (count < kWide)
    for (int64_t e = 0; e < depth * kWide; ++e) panel[e] = T(0);
  if (column == 1 && count == kWide) {
    for (int64_t q = 0; q < depth; ++q)
#pragma GCC unroll 4
      for (int v = 0; v < kBlockVectors; ++v)
        store(panel + q * kWide + v * kLanes<T>, load(from + q * row + v * kLanes<T>));
  } else if (column == 1) {
    for (int64_t q = 0; q < depth; ++q)
      for (int64_t c = 0; c < count; ++c) panel[q * kWide + c] = from[q * row + c];
  } else {
    const bool squares = row == 1 && count % kLanes<T> == 0;
    const int64_t done = squares ? pack_transposed(from, column, depth, count, panel) : 0;
    for (int64_t c = 0; c < count; ++c)
      for (int64_t q = done; q < depth; ++q) panel[q * kWide + c] = from[q * row + c * column];
  }
}

// R rows of A against one panel: to[r * to_row + c], c < kProductColumns.
template <class T, int R>
BACKMATCH_INLINE void product_tile(const T* A, int64_t a_row, int64_t depth, const T* panel, T* to,
                                   int64_t to_row) {
  Vec<T> sum[R][kBlockVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVectors; ++v) sum[r][v] = Vec<T>{};
  for (int64_t q = 0; q < depth; ++q, panel += kProductColumns<T>) {
    Vec<T> b[kBlockVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVectors; ++v) b[v] = load(panel + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kBlockVectors; ++v) sum[r][v] += b[v] * A[r * a_row + q];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVectors; ++v) store(to + r * to_row + v * kLanes<T>, sum[r][v]);
}

// The same where fewer than kProductColumns columns exist: by way of a tile of its own.
template <class T, int R>
void product_edge(const T* A, int64_t a_row, int64_t depth, const T* panel, T* to, int64_t to_row,
                  int64_t count) {
  constexpr int64_t kWide = kProductColumns<T>;
  alignas(kVectorBytes) T tile[R * kWide];
  product_tile<T, R>(A, a_row, depth, panel, tile, kWide);
  for (int r = 0; r < R; ++r)
    for (int64_t c = 0; c < count; ++c) to[r * to_row + c] = tile[r * kWide + c];
}

template <class T, int R>
BACKMATCH_INLINE void product_rows(const T* A, int64_t a_row, int64_t depth, const T* panel, T* to,
                                   int64_t to_row, int64_t count) {
  if (count == kProductColumns<T>) {
    product_tile<T, R>(A, a_row, depth, panel, to, to_row);
  } else {
    product_edge<T, R>(A, a_row, depth, panel, to, to_row, count);
  }
}

// Columns 0 .. stop of A B for `rows` rows.
template <class T>
void multiply(const T* A, int64_t a_row, int64_t rows, int64_t depth, const T* packed, T* out,
              int64_t out_row, int64_t stop) {
  constexpr int64_t kWide = kProductColumns<T>;
  for (int64_t first = 0; first < stop; first += kWide) {
    const T* panel = packed + first * depth;
    const int64_t count = stop - first < kWide ? stop - first : kWide;
    int64_t r = 0;
    for (; r + kBlockScalars <= rows; r += kBlockScalars)
      product_rows<T, kBlockScalars>(A + r * a_row, a_row, depth, panel, out + r * out_row + first,
                                     out_row, count);
    for (; r + 2 <= rows; r += 2)
      product_rows<T, 2>(A + r * a_row, a_row, depth, panel, out + r * out_row + first, out_row,
                         count);
    for (; r < rows; ++r)
      product_rows<T, 1>(A + r * a_row, a_row, depth, panel, out + r * out_row + first, out_row,
                         count);
  }
}

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
