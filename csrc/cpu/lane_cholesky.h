// Cholesky factor and solve of kLanes systems at once, one system per SIMD lane.
//
// Layout: the lower triangle is cut into block rows of kTile rows. Block row i is a panel of
// kTile * (i + 1) columns, each kTile vectors: panel[p * kTile + r] holds entry (i * kTile + r, p)
// of every lane. The factor replaces it in place; the diagonal keeps the reciprocal pivots, so
// that both substitutions multiply. Rows past n are rows of the identity.
//
// Order of operations: l_ij = (a_ij - l_i0 l_j0 - l_i1 l_j1 - ...) / l_jj, products subtracted one
// by one in ascending order, each with one rounding where the level has a fused multiply-add;
// tile_cholesky.h keeps the same order, so both give the same bits and a caller may pick either
// by batch size. Rows are computed one block row after the other against all earlier ones: the
// current panel stays in the first-level cache while the earlier ones stream past it.
#pragma once

#include "simd.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

constexpr int kTile = 4;
// Columns of a tile kept in registers at once: kTile x kTileColumns sums plus their operands.
constexpr int kTileColumns = kManyRegisters ? 4 : 2;

BACKMATCH_INLINE int64_t lane_blocks(int64_t n) { return (n + kTile - 1) / kTile; }

// Vectors before block row i; lane_vectors(lane_blocks(n)) is the whole factor.
BACKMATCH_INLINE int64_t lane_vectors(int64_t i) { return kTile * kTile / 2 * i * (i + 1); }

// Index of entry (row, column), column <= row.
BACKMATCH_INLINE int64_t lane_index(int64_t row, int64_t column) {
  return lane_vectors(row / kTile) + column * kTile + row % kTile;
}

// tile -= rows[0:depth] columns[0:depth]^T, rows stored R wide, columns kTile wide.
template <class T, int R>
BACKMATCH_INLINE void lane_subtract(const Vec<T>* rows, const Vec<T>* columns, int64_t depth,
                                    Vec<T> (&tile)[R][kTile]) {
#pragma GCC unroll 2
  for (int c0 = 0; c0 < kTile; c0 += kTileColumns) {
    Vec<T> sum[R][kTileColumns];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kTileColumns; ++c) sum[r][c] = tile[r][c0 + c];
    const Vec<T>* x = rows;
    const Vec<T>* y = columns + c0;
    for (int64_t p = 0; p < depth; ++p, x += R, y += kTile) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < kTileColumns; ++c) sum[r][c] -= x[r] * y[c];
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kTileColumns; ++c) tile[r][c0 + c] = sum[r][c];
  }
}

// One R x kTile tile of a row panel against the finished block row j of the factor.
template <class T, int R>
BACKMATCH_INLINE void lane_tile(Vec<T>* rows, const Vec<T>* panel, int64_t j) {
  Vec<T>* place = rows + j * kTile * R;
  const Vec<T>* corner = panel + j * kTile * kTile;
  Vec<T> tile[R][kTile];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kTile; ++c) tile[r][c] = place[c * R + r];
  lane_subtract<T, R>(rows, panel, j * kTile, tile);
#pragma GCC unroll 4
  for (int c = 0; c < kTile; ++c) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int q = 0; q < c; ++q) tile[r][c] -= tile[r][q] * corner[q * kTile + c];
      tile[r][c] *= corner[c * kTile + c];
      place[c * R + r] = tile[r][c];
    }
  }
}

// The diagonal tile of block row i: pivots are checked here and nowhere else.
template <class T>
BACKMATCH_INLINE void lane_corner(Vec<T>* panel, int64_t i, IntVec<T>& info) {
  Vec<T>* place = panel + i * kTile * kTile;
  Vec<T> tile[kTile][kTile];
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kTile; ++c) tile[r][c] = place[c * kTile + r];
  lane_subtract<T, kTile>(panel, panel, i * kTile, tile);
#pragma GCC unroll 4
  for (int c = 0; c < kTile; ++c) {
#pragma GCC unroll 4
    for (int q = 0; q < c; ++q)
#pragma GCC unroll 4
      for (int r = c; r < kTile; ++r) tile[r][c] -= tile[r][q] * tile[c][q];
    const IntVec<T> good = (tile[c][c] > T(0)) & (tile[c][c] <= Simd<T>::kLargest);
    const IntVec<T> first_bad = ~good & (info == 0);
    const auto pivot = static_cast<typename Simd<T>::Index>(i * kTile + c + 1);
    info |= first_bad & (IntVec<T>{} + pivot);
    const Vec<T> one = Vec<T>{} + T(1);
    const Vec<T> inverse = one / vector_square_root<T>(good ? tile[c][c] : one);
    place[c * kTile + c] = inverse;
#pragma GCC unroll 4
    for (int r = c + 1; r < kTile; ++r) {
      tile[r][c] *= inverse;
      place[c * kTile + r] = tile[r][c];
    }
  }
}

// Factors the packed matrices; info gets the first bad pivot of each lane (1-based), else 0.
template <class T>
void lane_factor(Vec<T>* matrix, int64_t blocks, IntVec<T>& info) {
  info = IntVec<T>{};
  for (int64_t i = 0; i < blocks; ++i) {
    Vec<T>* rows = matrix + lane_vectors(i);
    for (int64_t j = 0; j < i; ++j) lane_tile<T, kTile>(rows, matrix + lane_vectors(j), j);
    lane_corner<T>(rows, i, info);
  }
}

// Forward substitution of R right-hand sides: they are R further rows of the factor.
template <class T, int R>
void lane_forward(const Vec<T>* matrix, int64_t blocks, Vec<T>* rhs) {
  for (int64_t j = 0; j < blocks; ++j) lane_tile<T, R>(rhs, matrix + lane_vectors(j), j);
}

// Back substitution, by rows of the factor from the last to the first.
template <class T, int R>
void lane_backward(const Vec<T>* matrix, int64_t blocks, Vec<T>* rhs) {
  for (int64_t i = blocks - 1; i >= 0; --i) {
    const Vec<T>* panel = matrix + lane_vectors(i);
    const Vec<T>* corner = panel + i * kTile * kTile;
    Vec<T>* here = rhs + i * kTile * R;
    for (int s = 0; s < R; ++s) {
      Vec<T> x[kTile];
#pragma GCC unroll 4
      for (int r = kTile - 1; r >= 0; --r) {
        x[r] = here[r * R + s];
#pragma GCC unroll 4
        for (int q = kTile - 1; q > r; --q) x[r] -= corner[r * kTile + q] * x[q];
        x[r] *= corner[r * kTile + r];
        here[r * R + s] = x[r];
      }
      for (int64_t p = 0; p < i * kTile; ++p) {
        Vec<T> rest = rhs[p * R + s];
#pragma GCC unroll 4
        for (int r = kTile - 1; r >= 0; --r) rest -= panel[p * kTile + r] * x[r];
        rhs[p * R + s] = rest;
      }
    }
  }
}

template <class T, int R>
void lane_solve(const Vec<T>* matrix, int64_t blocks, Vec<T>* rhs) {
  lane_forward<T, R>(matrix, blocks, rhs);
  lane_backward<T, R>(matrix, blocks, rhs);
}

// Adds each lane's damping to its diagonal. Not inlined: merged into the packing loops it could
// be contracted with their products in one kernel and not in the other.
template <class T>
__attribute__((noinline)) void lane_damp(Vec<T>* matrix, int64_t n, const Vec<T>& damping) {
  for (int64_t i = 0; i < n; ++i) matrix[lane_index(i, i)] += damping;
}

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
