// Cholesky factor and solve of one small system by N lanes of a warp, in registers (N = 8, 16, 32).
//
// Who owns what: lane i holds row i of the matrix in row[0..N) and entry i of the right-hand side;
// 32/N systems share a warp. Systems of order n < N are padded with rows of the identity, which
// stay exact and touch no other row.
// Where it synchronises: only in the shuffles, which all 32 lanes of the warp must reach; nothing
// is shared through memory, so there is nothing to race on. A system with a bad pivot goes on with
// NaN in its own lanes, so the lanes never diverge.
// The trick: column j of the factor visits every lane in the shuffles of the rank-one update.
// Lane j keeps what passes in its own row, right of the diagonal, where the matrix is no longer
// needed. The back substitution, which needs columns, then finds them in registers.
// Considered and rejected: transposing through shared memory (a barrier and 4 KB a warp for
// nothing), compile-time orders n (32 instantiations), dividing by the pivot (the reciprocal on
// the diagonal costs one division a column instead of three).
#pragma once

#include <platform.cuh>

#include <cmath>
#include <limits>

namespace backmatch::cuda {

template <class T>
constexpr T kLargest = std::numeric_limits<T>::max();
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

template <class T>
__device__ __forceinline__ bool is_good_pivot(T pivot) {
  return pivot > T(0) && pivot <= kLargest<T>;  // false for NaN and infinity
}

// Factors the lower triangle held in `row` (entries right of the diagonal are ignored). After it
// lane i holds L[i][j] for j < i, 1 / L[i][i], and L[j][i] for j > i. Returns the LAPACK info.
template <int N, class T>
__device__ __forceinline__ int32_t lane_factor(T (&row)[N], int lane) {
  int32_t info = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const T pivot = shuffle(row[j], j, N);
    if (info == 0 && !is_good_pivot(pivot)) info = j + 1;
    const T inverse = T(1) / std::sqrt(pivot);
    const T scaled = row[j] * inverse;
#pragma unroll
    for (int c = j + 1; c < N; ++c) {
      const T visitor = shuffle(scaled, c, N);
      if (lane > j) {
        row[c] -= scaled * visitor;
      } else if (lane == j) {
        row[c] = visitor;
      }
    }
    if (lane > j) {
      row[j] = scaled;
    } else if (lane == j) {
      row[j] = inverse;
    }
  }
  return info;
}

// Solves L L^T x = b with the rows lane_factor left; lane i passes b[i] and gets x[i].
template <int N, class T>
__device__ __forceinline__ T lane_solve(const T (&row)[N], T b, int lane) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (lane == j) b *= row[j];
    const T known = shuffle(b, j, N);
    if (lane > j) b -= row[j] * known;
  }
#pragma unroll
  for (int j = N - 1; j >= 0; --j) {
    if (lane == j) b *= row[j];
    const T known = shuffle(b, j, N);
    if (lane < j) b -= row[j] * known;
  }
  return b;
}

}  // namespace backmatch::cuda
