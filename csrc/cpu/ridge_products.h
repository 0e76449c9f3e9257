// The products around the solves of the ridge family: K = Z Z^T and d = X Z; see product.h.
//
// They are here, and not left to a BLAS, because for a layer's sizes the calls, the second half of K
// and the passes over memory in between cost as much as the products themselves.
#pragma once

#include "product.h"
#include "workspace.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

// Rows of one task. A multiple of kBlockScalars.
constexpr int64_t kRowsAtATime = 32;

BACKMATCH_INLINE int64_t row_blocks(int64_t rows) {
  return (rows + kRowsAtATime - 1) / kRowsAtATime;
}

// All panels of B (depth x columns).
template <class T>
void pack_all(const T* B, int64_t row, int64_t column, int64_t depth, int64_t columns, T* packed) {
  const int64_t panels = product_panels<T>(columns);
  const int threads =
      threads_for(panels, static_cast<double>(depth) * static_cast<double>(columns));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < panels; ++p) pack_product(B, row, column, depth, columns, p, packed);
}

// out (rows x columns) = A (rows x depth, rows a_row apart) times what is packed.
template <class T>
void multiply_rows(const T* A, int64_t a_row, int64_t rows, int64_t depth, const T* packed,
                   int64_t columns, T* out) {
  const int threads = threads_for(row_blocks(rows), 2 * static_cast<double>(rows) *
                                                        static_cast<double>(depth) *
                                                        static_cast<double>(columns));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < row_blocks(rows); ++block) {
    const int64_t first = block * kRowsAtATime;
    const int64_t count = rows - first < kRowsAtATime ? rows - first : kRowsAtATime;
    multiply<T>(A + first * a_row, a_row, count, depth, packed, out + first * columns, columns,
                columns);
  }
}

// Rows of Z made contiguous where they are not.
template <class T>
const T* contiguous_rows(const T* Z, int64_t row, int64_t column, int64_t rows, int64_t depth,
                         T* copy, int64_t* copy_row) {
  if (column == 1) {
    *copy_row = row;
    return Z;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t q = 0; q < depth; ++q) copy[r * depth + q] = Z[r * row + q * column];
  *copy_row = depth;
  return copy;
}

// K (m x m), its lower triangle, from Z (m x n) and Z^T packed. Nobody reads what lies above.
template <class T>
void gram_rows(const T* Z, int64_t z_row, int64_t z_col, int64_t m, int64_t n, const T* packed,
               T* K) {
  const double size = static_cast<double>(m);
  const int threads = threads_for(row_blocks(m), size * size * static_cast<double>(n));
  const int64_t bytes =
      z_col == 1 ? 0 : cache_lines(kRowsAtATime * n * static_cast<int64_t>(sizeof(T)));
  const Workspace copies(bytes * threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t block = row_blocks(m) - 1; block >= 0; --block) {
    const int64_t first = block * kRowsAtATime;
    const int64_t rows = m - first < kRowsAtATime ? m - first : kRowsAtATime;
    int64_t stride;
    const T* from = contiguous_rows(Z + first * z_row, z_row, z_col, rows, n,
                                    copies.at<T>(thread_number() * bytes), &stride);
    multiply<T>(from, stride, rows, n, packed, K + first * m, m, first + rows);
  }
}

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
