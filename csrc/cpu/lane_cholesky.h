// Cholesky factor and solve of kLanes systems at once, one system per SIMD lane.
//
// Layout: the lower triangle is cut into block rows of kTile rows. Block row i is a panel of
// kTile * (i + 1) columns, each kTile vectors: panel[p * kTile + r] holds entry (i * kTile + r, p)
// of every lane. The factor replaces it in place; the diagonal keeps the reciprocal pivots, so
// that both substitutions multiply. The last block row has n % kTile rows; its further places, like
// those above the diagonal, hold numbers that nothing reads.
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

// Columns c0 .. c0 + C of tile -= rows[0:depth] columns[0:depth]^T; a column of `rows` takes kWide
// vectors, one of `columns` kTile.
template <class T, int R, int kWide, int C, int kAll>
BACKMATCH_INLINE void lane_subtract_some(const Vec<T>* rows, const Vec<T>* columns, int64_t depth,
                                         int c0, Vec<T> (&tile)[R][kAll]) {
  Vec<T> sum[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = tile[r][c0 + c];
  columns += c0;
  for (int64_t p = 0; p < depth; ++p, rows += kWide, columns += kTile) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] -= rows[r] * columns[c];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) tile[r][c0 + c] = sum[r][c];
}

template <class T, int R, int kWide, int C>
BACKMATCH_INLINE void lane_subtract(const Vec<T>* rows, const Vec<T>* columns, int64_t depth,
                                    Vec<T> (&tile)[R][C]) {
  if constexpr (C <= kTileColumns) {
    lane_subtract_some<T, R, kWide, C>(rows, columns, depth, 0, tile);
  } else {
    lane_subtract_some<T, R, kWide, kTileColumns>(rows, columns, depth, 0, tile);
    lane_subtract_some<T, R, kWide, C - kTileColumns>(rows, columns, depth, kTileColumns, tile);
  }
}

// One R x C tile of a row panel, kWide vectors a column, against the finished block row j of the
// factor, which has C rows.
template <class T, int R, int kWide, int C>
BACKMATCH_INLINE void lane_tile(Vec<T>* rows, const Vec<T>* panel, int64_t j) {
  Vec<T>* place = rows + j * kTile * kWide;
  const Vec<T>* corner = panel + j * kTile * kTile;
  Vec<T> tile[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) tile[r][c] = place[c * kWide + r];
  lane_subtract<T, R, kWide, C>(rows, panel, j * kTile, tile);
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int q = 0; q < c; ++q) tile[r][c] -= tile[r][q] * corner[q * kTile + c];
      tile[r][c] *= corner[c * kTile + c];
      place[c * kWide + r] = tile[r][c];
    }
  }
}

// The diagonal tile of block row i, R rows: pivots are checked here and nowhere else.
template <class T, int R>
BACKMATCH_INLINE void lane_corner(Vec<T>* panel, int64_t i, IntVec<T>& info) {
  Vec<T>* place = panel + i * kTile * kTile;
  Vec<T> tile[R][R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < R; ++c) tile[r][c] = place[c * kTile + r];
  lane_subtract<T, R, kTile, R>(panel, panel, i * kTile, tile);
#pragma GCC unroll 4
  for (int c = 0; c < R; ++c) {
#pragma GCC unroll 4
    for (int q = 0; q < c; ++q)
#pragma GCC unroll 4
      for (int r = c; r < R; ++r) tile[r][c] -= tile[r][q] * tile[c][q];
    const IntVec<T> good = (tile[c][c] > T(0)) & (tile[c][c] <= Simd<T>::kLargest);
    const IntVec<T> first_bad = ~good & (info == 0);
    const auto pivot = static_cast<typename Simd<T>::Index>(i * kTile + c + 1);
    info |= first_bad & (IntVec<T>{} + pivot);
    const Vec<T> one = Vec<T>{} + T(1);
    const Vec<T> inverse = one / vector_square_root<T>(good ? tile[c][c] : one);
    place[c * kTile + c] = inverse;
#pragma GCC unroll 4
    for (int r = c + 1; r < R; ++r) {
      tile[r][c] *= inverse;
      place[c * kTile + r] = tile[r][c];
    }
  }
}

// Block row i of the factor, R rows.
template <class T, int R>
BACKMATCH_INLINE void lane_block(Vec<T>* matrix, int64_t i, IntVec<T>& info) {
  Vec<T>* rows = matrix + lane_vectors(i);
  for (int64_t j = 0; j < i; ++j)
    lane_tile<T, R, kTile, kTile>(rows, matrix + lane_vectors(j), j);
  lane_corner<T, R>(rows, i, info);
}

// Factors the packed matrices; info gets the first bad pivot of each lane (1-based), else 0.
template <class T>
void lane_factor(Vec<T>* matrix, int64_t n, IntVec<T>& info) {
  info = IntVec<T>{};
  const int64_t whole = n / kTile;
  for (int64_t i = 0; i < whole; ++i) lane_block<T, kTile>(matrix, i, info);
  const int64_t rest = n % kTile;
  if (rest == 1) lane_block<T, 1>(matrix, whole, info);
  if (rest == 2) lane_block<T, 2>(matrix, whole, info);
  if (rest == 3) lane_block<T, 3>(matrix, whole, info);
}

// Forward substitution of R right-hand sides: they are R further rows of the factor.
template <class T, int R>
void lane_forward(const Vec<T>* matrix, int64_t n, Vec<T>* rhs) {
  const int64_t whole = n / kTile;
  for (int64_t j = 0; j < whole; ++j) lane_tile<T, R, R, kTile>(rhs, matrix + lane_vectors(j), j);
  const int64_t rest = n % kTile;
  const Vec<T>* last = matrix + lane_vectors(whole);
  if (rest == 1) lane_tile<T, R, R, 1>(rhs, last, whole);
  if (rest == 2) lane_tile<T, R, R, 2>(rhs, last, whole);
  if (rest == 3) lane_tile<T, R, R, 3>(rhs, last, whole);
}

// The part of block row i, C rows, in the back substitution.
template <class T, int R, int C>
BACKMATCH_INLINE void lane_back_block(const Vec<T>* matrix, int64_t i, Vec<T>* rhs) {
  const Vec<T>* panel = matrix + lane_vectors(i);
  const Vec<T>* corner = panel + i * kTile * kTile;
  Vec<T>* here = rhs + i * kTile * R;
  for (int s = 0; s < R; ++s) {
    Vec<T> x[C];
#pragma GCC unroll 4
    for (int r = C - 1; r >= 0; --r) {
      x[r] = here[r * R + s];
#pragma GCC unroll 4
      for (int q = C - 1; q > r; --q) x[r] -= corner[r * kTile + q] * x[q];
      x[r] *= corner[r * kTile + r];
      here[r * R + s] = x[r];
    }
    for (int64_t p = 0; p < i * kTile; ++p) {
      Vec<T> rest = rhs[p * R + s];
#pragma GCC unroll 4
      for (int r = C - 1; r >= 0; --r) rest -= panel[p * kTile + r] * x[r];
      rhs[p * R + s] = rest;
    }
  }
}

// Back substitution, by rows of the factor from the last to the first.
template <class T, int R>
void lane_backward(const Vec<T>* matrix, int64_t n, Vec<T>* rhs) {
  const int64_t whole = n / kTile;
  const int64_t rest = n % kTile;
  if (rest == 1) lane_back_block<T, R, 1>(matrix, whole, rhs);
  if (rest == 2) lane_back_block<T, R, 2>(matrix, whole, rhs);
  if (rest == 3) lane_back_block<T, R, 3>(matrix, whole, rhs);
  for (int64_t i = whole - 1; i >= 0; --i) lane_back_block<T, R, kTile>(matrix, i, rhs);
}

template <class T, int R>
void lane_solve(const Vec<T>* matrix, int64_t n, Vec<T>* rhs) {
  lane_forward<T, R>(matrix, n, rhs);
  lane_backward<T, R>(matrix, n, rhs);
}

// Adds each lane's damping to its diagonal. Not inlined: merged into the packing loops it could
// be contracted with their products in one kernel and not in the other.
template <class T>
__attribute__((noinline)) void lane_damp(Vec<T>* matrix, int64_t n, const Vec<T>& damping) {
  for (int64_t i = 0; i < n; ++i) matrix[lane_index(i, i)] += damping;
}

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
