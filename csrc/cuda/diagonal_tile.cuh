// Cholesky factor of one 16 x 16 diagonal tile by one warp, in registers.
//
// Who owns what: lane (h, l) = 16 h + l holds half of row l: columns 8 (q / 4) + 4 h + q % 4 for
// q = 0 .. 7. Lanes read and write their own entries of the tile alone (entries on and below the
// diagonal, and when storing their mirror images, which no lane reads): no barrier.
// The chain that everything else waits for is pivot -> reciprocal square root -> next pivot. The
// next pivot needs two entries of the column, which every lane fetches while the root is computed:
// a step costs a root and three multiply-adds, and no shuffle. With the update's shuffles beside
// it, estimated 50 to 70 cycles a step in float and 120 in double; a shuffle for each pivot, a
// division and a square root took twice that.
// Considered and rejected: inverting the tile, to make the elimination a matrix product (as long a
// chain again before the first row can start, the elimination is bound by its loads either way,
// and substitution is backward stable whatever the tile); one row a lane, two lanes alike (twice
// the shuffles); 4 x 4 blocks that every lane factors alike (the same chain, more shuffles).
#pragma once

#include <type_traits>

#include "pivot.cuh"
#include "panel_update.cuh"

namespace backmatch::cuda {

constexpr int kHalfTile = kTile / 2;

// Which lanes hold column c of their row, and in which register.
__host__ __device__ constexpr int half_of_column(int c) { return c / kQuad % 2; }
__host__ __device__ constexpr int register_of_column(int c) {
  return c / kHalfTile * kQuad + c % kQuad;
}
__host__ __device__ constexpr int column_of(int q, int half) {
  return q / kQuad * kHalfTile + half * kQuad + q % kQuad;
}

// Factors the tile held in `own`. After it lane (h, l) holds L[l][c] for its columns c < l and
// 1 / L[l][l]; what lies right of the diagonal means nothing. Returns the LAPACK info.
template <class T>
__device__ __forceinline__ int32_t factor_in_registers(T (&own)[kHalfTile], int half, int l) {
  int32_t info = 0;
  T pivot = shuffle(own[0], 0, kWarp);
#pragma unroll
  for (int j = 0; j < kTile; ++j) {
    const T column = own[register_of_column(j)];
    const int holders = half_of_column(j) * kTile;
    const int own_half = recomputed(half);  // 8 sources are computed at a step, not kept for all
    const T entry = shuffle(column, holders + l, kWarp);
    T edge = 0, corner = 0;
    if (j + 1 < kTile) {
      edge = shuffle(column, holders + j + 1, kWarp);
      corner = shuffle(own[register_of_column(j + 1)], half_of_column(j + 1) * kTile + j + 1, kWarp);
    }
    if (info == 0 && !is_good_pivot(pivot)) info = j + 1;
    const T inverse = reciprocal_sqrt(pivot);
    const T scaled = entry * inverse;
    const T twice = scaled * inverse;
#pragma unroll
    for (int q = 0; q < kHalfTile; ++q) {
      if (column_of(q, 1) <= j) continue;  // finished in both halves
      const int c = column_of(q, own_half);
      const T visitor = shuffle(column, holders + c, kWarp);
      if (c > j) own[q] -= twice * visitor;
    }
    if (half == half_of_column(j)) own[register_of_column(j)] = l == j ? inverse : scaled;
    const T step = edge * inverse;
    pivot = corner - step * step;
  }
  return info;
}

// own -= left left^T, in the entries that factor_in_registers wants.
__device__ __forceinline__ void subtract_in_registers(float (&own)[kHalfTile], const float* left,
                                                      int half, int l) {
#pragma unroll 4
  for (int k = 0; k < kTile; ++k) {
    const float mine = left[Tile<float>::at(l, k)];
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const auto others =
          vector_at<const Quad<float>>(left + Tile<float>::quad(2 * g + half, k));
#pragma unroll
      for (int v = 0; v < kQuad; ++v) {
        own[g * kQuad + v] -= mine * others.v[Tile<float>::row_in_quad(2 * g, v) % kQuad];
      }
    }
  }
}

// Factors tile (J, J), after subtracting left left^T where `left` (the tile before it in its row)
// is not null. It is left symmetric, with the reciprocals of L's diagonal on its diagonal: so
// substitution reads one column in either direction. All lanes of one warp.
template <class T>
__device__ __forceinline__ void factor_diagonal(T* tile, const T* left, int J, int32_t* status) {
  constexpr bool kOnMatrixUnits = std::is_same_v<T, double>;
  const int lane = thread_index_here() % kWarp;
  const int half = lane / kTile;
  const int l = lane % kTile;
  if constexpr (kOnMatrixUnits) {
    if (left != nullptr) {
      subtract_tile(tile, left, left);
      sync_warp();
    }
  }
  T own[kHalfTile];
  T* const mine = tile + half * kQuad * kTile;
#pragma unroll
  for (int q = 0; q < kHalfTile; ++q) {
    own[q] = column_of(q, half) <= l ? mine[Tile<T>::at(l, column_of(q, 0))] : T(0);
  }
  if constexpr (!kOnMatrixUnits) {
    if (left != nullptr) subtract_in_registers(own, left, half, l);
  }
  const int32_t info = factor_in_registers(own, half, l);
#pragma unroll
  for (int q = 0; q < kHalfTile; ++q) {
    const int c = column_of(q, half);
    if (c <= l) mine[Tile<T>::at(l, column_of(q, 0))] = own[q];
    if (c < l) tile[Tile<T>::at(c, l)] = own[q];
  }
  if (lane == 0 && info != 0) *status = J * kTile + info;
}

}  // namespace backmatch::cuda
