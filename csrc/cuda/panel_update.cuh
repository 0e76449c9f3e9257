// The rank-16 update: tiles (I, J) -= left(I) left(J)^T, where nearly all multiply-adds are.
//
// float: a thread owns an 8 x 8 piece, four to a tile, 64 sums in registers: 4 vector loads for 64
// multiply-adds, so that shared memory (4 wavefronts a vector) and the multiply-adds take equally
// long; with the sums themselves in and out, 384 wavefronts for 4 x 1024 multiply-adds: bound at
// 2/3 of the peak rate. 4 x 4 pieces have 2 loads for 16 and end at a half.
//   A thread takes its two row quads in the order that its tile's number in the list says: the
//   eight threads that one wavefront serves belong to two tiles, which lie at the same banks.
// double: a warp owns a tile, 16 products of 8 x 4 by 4 x 8 on the matrix units, IEEE products and
//   sums as with fused multiply-adds, at twice the rate of the vector units. 64 wavefronts for
//   32 cycles of products, so bound at half the rate of the matrix units: the vector units' peak.
//   Column 2 k + i of a product is column (2 k + i) ^ (k / 2) of the tile: with that and the
//   permutation of panel_store.cuh no load or store has a bank conflict.
// right-hand sides: a thread owns 4 rows x 4 columns.
// Race-free: a piece has one owner, `left` is only read.
// Considered and rejected: float on the matrix units by 3xTF32. Two parts of 11 bits and three
// products leave 2^-21 relative where a multiply-add leaves 2^-24: eight times the rounding error
// of potrf. Splitting costs four more instructions an operand; and of the 495 TF/s, a third is left
// for three products, about 60 % of that within reach of mma.sync (only wgmma has more, on tiles of
// 64 rows and one architecture): 100 TF/s before the splitting, where the plain multiply-adds have
// 67 and the diagonal tiles' chain and shared memory bind before either.
// Left-looking updates (sums stay in registers, but a tile column has only 16 (tiles - J) outputs:
// too few threads for 8 x 8 pieces, and chains of up to n steps where few rows are left).
#pragma once

#include <type_traits>

#include "panel_store.cuh"

namespace backmatch::cuda {

// The threads that share a piece of work, numbered from 0.
struct Team {
  int index;
  int size;
  __device__ __forceinline__ Team reversed() const { return {size - 1 - index, size}; }
};

// Tiles (I, J) with rows first_row .. end_row - 1, columns first_column .. end_column - 1, J <= I.
struct TileRange {
  int first_row, end_row, first_column, end_column;

  // A triangle is folded in two, so that no number stands for a tile above the diagonal.
  __device__ __forceinline__ bool is_triangle() const {
    return first_row == first_column && end_row == end_column;
  }
  __device__ __forceinline__ int count() const {
    const int rows = end_row - first_row;
    const int columns = end_column - first_column;
    return is_triangle() ? rows * (rows + 1) / 2 : rows * columns;
  }
  // Tile number t; J > I means that there is none.
  __device__ __forceinline__ void find(int t, int& I, int& J) const {
    if (is_triangle()) {
      const int rows = end_row - first_row;
      const int pair = t / (rows + 1);
      const int place = t % (rows + 1);
      const int longer = rows - pair;
      I = first_row + (place < longer ? longer - 1 : pair);
      J = first_column + (place < longer ? place : place - longer);
    } else {
      const int columns = end_column - first_column;
      I = first_row + t / columns;
      J = first_column + t % columns;
    }
  }
};

// Piece (piece % 2, piece / 2) of a tile; `turn` is 0 or 1.
__device__ __forceinline__ void subtract_piece(float* target, const float* left,
                                               const float* right, int piece, int turn) {
  const int lower = piece % 2;
  const int after = piece / 2;
  const int rows[2] = {(2 * lower + turn) * kQuad, (2 * lower + 1 - turn) * kQuad};
  const int columns[2] = {(2 * after + turn) * kQuad, (2 * after + 1 - turn) * kQuad};
  // Element c of a quad of the right half is column c ^ 1: so even and odd c have their own base.
  const auto sums = [&](int g, int c, int h) -> Quad<float>& {
    float* base = target + columns[g] * kTile + rows[h] + (c % 2 == 0 ? after : -after) * kTile;
    return vector_at<Quad<float>>(base + c * kTile);
  };
  Quad<float> sum[2][kQuad][2];  // column quad, column, row quad
#pragma unroll
  for (int g = 0; g < 2; ++g) {
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
#pragma unroll
      for (int h = 0; h < 2; ++h) sum[g][c][h] = sums(g, c, h);
    }
  }
#pragma unroll 2
  for (int k = 0; k < kTile; ++k) {
    Quad<float> a[2], b[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      a[h] = vector_at<const Quad<float>>(left + rows[h] + k * kTile);
      b[h] = vector_at<const Quad<float>>(right + columns[h] + k * kTile);
    }
#pragma unroll
    for (int g = 0; g < 2; ++g) {
#pragma unroll
      for (int c = 0; c < kQuad; ++c) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int r = 0; r < kQuad; ++r) sum[g][c][h].v[r] -= a[h].v[r] * b[g].v[c];
        }
      }
    }
  }
#pragma unroll
  for (int g = 0; g < 2; ++g) {
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
#pragma unroll
      for (int h = 0; h < 2; ++h) sums(g, c, h) = sum[g][c][h];
    }
  }
}

// One tile, by all lanes of a warp: products of rows r + 8 h by columns `other` + 8 g.
__device__ __forceinline__ void subtract_tile(double* target, const double* left,
                                              const double* right) {
  const int lane = thread_index_here() % kWarp;
  const int r = lane / 4;
  const int k = lane % 4;
  const int own = Tile<double>::at(r, k);
  const int other = Tile<double>::at(r ^ (r >> 2), k);
  const double* const a_row[2] = {left + own, left + (own ^ 8)};
  const double* const b_row[2] = {right + other, right + (other ^ 8)};
  double* sums[2][2];  // row half, element
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int place = Tile<double>::at(r, (2 * k + i) ^ (k >> 1));
    sums[0][i] = target + place;
    sums[1][i] = target + (place ^ 8);
  }
  double sum[2][2][2];  // row half, column half, element
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int g = 0; g < 2; ++g) {
#pragma unroll
      for (int i = 0; i < 2; ++i) sum[h][g][i] = sums[h][i][g * 8 * kTile];
    }
  }
#pragma unroll
  for (int step = 0; step < kTile; step += 4) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        multiply_add_8x8x4(sum[h][g], -a_row[h][step * kTile], b_row[g][step * kTile]);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int g = 0; g < 2; ++g) {
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[h][i][g * 8 * kTile] = sum[h][g][i];
    }
  }
}

// All tiles of the range but, with `skip_first`, its first one: tile(I, J) -= left(I) left(J)^T.
template <class T, class Tiles, class Left>
__device__ __forceinline__ void update(const Tiles& tiles, const Left& left, const TileRange& range,
                                       bool skip_first, const Team& team) {
  constexpr int kPieces = std::is_same_v<T, float> ? 4 : 1;
  constexpr int kThreadsPerPiece = std::is_same_v<T, float> ? 1 : kWarp;
  const int step = team.size / kThreadsPerPiece;
  for (int u = team.index / kThreadsPerPiece; u < range.count() * kPieces; u += step) {
    int I, J;
    range.find(u / kPieces, I, J);
    if (J > I || (skip_first && I == range.first_row && J == range.first_column)) continue;
    if constexpr (std::is_same_v<T, float>) {
      const int piece = u % kPieces;
      if (I == J && piece == 2) continue;  // above the diagonal
      subtract_piece(tiles.tile(I, J), left(I), left(J), piece, u / kPieces % 2);
    } else {
      subtract_tile(tiles.tile(I, J), left(I), left(J));
    }
  }
}

// rhs[tile J] -= left(J) rhs[tile K] for first <= J < end.
template <class T, class Left>
__device__ __forceinline__ void update_rhs(const PanelSystem<T>& s, const Left& left, int K,
                                           int first, int end, const Team& team) {
  const int columns = recomputed(s.columns);
  const int pieces = (end - first) * kQuadsPerTile;
  const T* known = s.rhs + static_cast<int64_t>(K) * kTile * columns;
  for (int u = team.index; u < pieces * (columns / kQuad); u += team.size) {
    const int J = first + u % pieces / kQuadsPerTile;
    const int g = u % kQuadsPerTile;
    const int column = u / pieces * kQuad;
    const T* tile = left(J);
    T* target = s.rhs + static_cast<int64_t>(J) * kTile * columns + column;
    Quad<T> sum[kQuad];
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
      sum[v] = vector_at<const Quad<T>>(target + Tile<T>::row_in_quad(g, v) * columns);
    }
#pragma unroll 4
    for (int k = 0; k < kTile; ++k) {
      const Quad<T> a = vector_at<const Quad<T>>(tile + Tile<T>::quad(g, k));
      const Quad<T> x = vector_at<const Quad<T>>(known + k * columns + column);
#pragma unroll
      for (int v = 0; v < kQuad; ++v) {
#pragma unroll
        for (int q = 0; q < kQuad; ++q) sum[v].v[q] -= a.v[v] * x.v[q];
      }
    }
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
      vector_at<Quad<T>>(target + Tile<T>::row_in_quad(g, v) * columns) = sum[v];
    }
  }
}

}  // namespace backmatch::cuda
