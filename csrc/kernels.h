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

// d_j = Z^T D_j y_j with (D_j Z Z^T D_j + damping_j I) y_j = R_j: the minimiser of
// |D_j Z d - R_j|^2 / 2 + damping_j |d|^2 / 2 in dual form. Z: (m, n), D and R: (batch, m),
// d: (batch, n) contiguous.
template <class T>
struct RidgeDualArgs {
  int64_t batch, m, n;
  const T* Z;
  int64_t z_row, z_col;
  const T* D;
  int64_t d_batch, d_col;
  const T* R;
  int64_t r_batch, r_col;
  const T* damping;
  int64_t damping_stride;
  T* d;
  int32_t* info;
};

// (Z^T D_j^2 Z + damping_j I) d_j = Z^T D_j R_j: the same minimiser in primal form. Rows with D == 0
// do not count, whatever Z and R hold there. On CUDA only; the CPU forms G and solves.
template <class T>
using RidgePrimalArgs = RidgeDualArgs<T>;

// ridge_complement: ridge_dual for one damping (damping_stride is not read), float32, and 0/1 slopes
// most of which are 1 in many systems; other systems are solved as by ridge_dual.

// The minimisers of |Z d - R_j|^2 / 2 + damping |d|^2 / 2, one factorisation for all. info: (batch,).
template <class T>
struct RidgeSharedArgs {
  int64_t batch, m, n;
  const T* Z;
  int64_t z_row, z_col;
  const T* R;
  int64_t r_batch, r_col;
  const T* damping;
  T* d;
  int32_t* info;
};

// Rows of slopes D (batch, m), summed over the batch: active = rows with slope not 0, the
// multiply-adds of the solves in dual form and by the complement, the most active rows of a system,
// and whether all slopes are 0 or 1.
struct RidgeCounts {
  double active, dual, complement;
  int64_t most;
  bool binary;
};

template <class T>
struct RidgeCountsArgs {
  int64_t batch, m;
  const T* D;
  int64_t d_batch, d_col;
};

// How well d solves the problem above: error[j] = |Z^T D_j (D_j Z d_j - R_j) + damping_j d_j|^2 and
// size[j] = |Z^T D_j R_j|^2, (batch,) contiguous. D may be null: ones.
template <class T>
struct RidgeErrorArgs {
  int64_t batch, m, n;
  const T* Z;
  int64_t z_row, z_col;
  const T* D;
  int64_t d_batch, d_col;
  const T* R;
  int64_t r_batch, r_col;
  const T* damping;
  int64_t damping_stride;
  const T* d;
  int64_t step_batch, step_col;
  double* error;
  double* size;
};

// Q_j = Z^T (w_j * Z P_j) for every system. Z: (m, n), w: (batch, m) or null for ones, P and Q:
// (batch, n) contiguous.
template <class T>
struct RidgeNormalArgs {
  int64_t batch, m, n;
  const T* Z;
  int64_t z_row, z_col;
  const T* w;
  int64_t w_batch, w_col;
  const T* P;
  T* Q;
};

// Q_j = (D_j K D_j + damping_j I) P_j. K: (n, n), read in full; D: (batch, n), P and Q: (batch, n)
// contiguous.
template <class T>
struct ScaledGramProductArgs {
  int64_t batch, n;
  const T* K;
  int64_t k_row, k_col;
  const T* D;
  int64_t d_batch, d_col;
  const T* damping;
  int64_t damping_stride;
  const T* P;
  T* Q;
};

// One conjugate gradient step of every running system, given Q = A P: X, R, steps, and who runs on.
// Without a preconditioner the next P and rho = |R|^2 as well. P, Q, X, R: (systems, n) contiguous,
// the rest (systems,); target is the |R| to reach. Returns the number of systems still running.
template <class T>
struct CgStepArgs {
  int64_t systems, n, max_steps;
  bool preconditioned;
  T* P;
  const T* Q;
  T* X;
  T* R;
  T* rho;
  const T* target;
  uint8_t* running;
  uint8_t* alive;
  int64_t* steps;
};

// The next direction of every running system from the preconditioned residual Z.
template <class T>
struct CgDirectionArgs {
  int64_t systems, n;
  const T* R;
  const T* Z;
  T* P;
  T* rho;
  const uint8_t* running;
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

// Conjugate gradient on (D_j K D_j + damping_j I) y_j = R_j from y = 0; X_j = D_j y_j. K: (n, n),
// read in full; D and R: (batch, n); X: (batch, n) contiguous. upper = L^-T and lower = L^-1, (n, n)
// contiguous, of a preconditioner L^-T L^-1; null: none. iterations, residual, converged: (batch,).
template <class T>
struct ScaledGramCgArgs {
  int64_t batch, n;
  const T* K;
  int64_t k_row, k_col;
  const T* D;
  int64_t d_batch, d_col;
  const T* R;
  int64_t r_batch, r_col;
  const T* damping;
  int64_t damping_stride;
  const T* upper;
  const T* lower;
  T rtol;
  int64_t max_steps;
  T* X;
  int64_t* iterations;
  T* residual;
  uint8_t* converged;
};

}  // namespace backmatch
