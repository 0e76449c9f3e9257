// Declarations of the native kernels: raw pointers, 64-bit sizes and strides, an info array.
//
// Conventions, once for every kernel here and in cuda/:
//  - sizes and strides count elements, not bytes; a stride may be 0 (expanded tensors);
//  - a symmetric argument is read in its lower triangle only, except by cg, which multiplies by it;
//  - damping points to one value per system, damping_stride elements apart (0: one value for all);
//  - info has LAPACK's meaning: 0 solved, k > 0 the leading minor of order k is not positive. A
//    pivot that is NaN, infinite or not > 0 counts, so NaN never gives 0. The result of a system
//    with info != 0 is filled with NaN; its neighbours keep their bits;
//  - the bits of a result depend on its own system and on the SIMD level, never on the number of
//    threads, on how the batch is split, or on the other systems of the batch.
#pragma once

#include <cstdint>

namespace backmatch {

// (A_j + damping_j I) X_j = B_j.  A: (batch, n, n), B: (batch, n, k), X: (batch, n, k) contiguous.
template <class T>
struct SpdSolveArgs {
  int64_t batch, n, k;
  const T* A;
  int64_t a_batch, a_row, a_col;
  const T* damping;
  int64_t damping_stride;
  const T* B;
  int64_t b_batch, b_row, b_col;
  T* X;
  int32_t* info;
};

// X_j = D_j y_j with (D_j K D_j + damping_j I) y_j = R_j, D_j = diag(D[j, :]) and one K for all j.
// K: (n, n), D and R: (batch, n), X: (batch, n) contiguous. Entries with D == 0 drop out: their
// result is exactly 0, and pivot numbers in info still count them.
template <class T>
struct ScaledGramArgs {
  int64_t batch, n;
  const T* K;
  int64_t k_row, k_col;
  const T* D;
  int64_t d_batch, d_col;
  const T* R;
  int64_t r_batch, r_col;
  const T* damping;
  int64_t damping_stride;
  T* X;
  int32_t* info;
};

// G_j = Z^T diag(w_j) Z + damping_j I.  Z: (m, n), w: (batch, m), G: (batch, n, n) contiguous and
// full. A row with w == 0 does not count, whatever it holds.
template <class T>
struct WeightedGramArgs {
  int64_t batch, m, n;
  const T* Z;
  int64_t z_row, z_col;
  const T* w;
  int64_t w_batch, w_col;
  const T* damping;
  int64_t damping_stride;
  T* G;
};

// Conjugate gradient on (A_j + damping_j I) x = b, one Krylov system per batch entry and column.
// X: (batch, n, k) contiguous, start on entry, result on exit. iterations, residual (relative,
// recomputed |b - (A + damping I) x| / |b|) and converged: (batch, k) contiguous.
template <class T>
struct CgArgs {
  int64_t batch, n, k;
  const T* A;
  int64_t a_batch, a_row, a_col;
  const T* damping;
  int64_t damping_stride;
  const T* B;
  int64_t b_batch, b_row, b_col;
  T rtol;
  int64_t max_steps;
  T* X;
  int64_t* iterations;
  T* residual;
  uint8_t* converged;
};

}  // namespace backmatch
