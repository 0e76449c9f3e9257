// Conjugate gradient on (A_j + damping_j I) x = b, one Krylov system per batch entry and column.
//
// A system is declared converged on its recomputed residual only. Where the recurrence claims
// convergence and the recomputed residual disagrees, the iteration restarts from the latter.
#include "dot.h"
#include "kernels_simd.h"
#include "simd.h"
#include "workspace.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

namespace {

// One system with its rows made contiguous: row i of A starts at A + i * row.
template <class T>
struct System {
  int64_t n;
  const T* A;
  int64_t row;
  T damping;
};

// Scratch of one thread, each vector n long.
template <class T>
struct Scratch {
  T *x, *b, *r, *p, *Ap, *matrix;
};

// out = (A + damping I) v. kLanes rows at a time: their partial sums are transposed, so that the
// sums over lanes are vector additions too.
template <class T>
void multiply(const System<T>& s, const T* v, T* out) {
  constexpr int kWidth = kLanes<T>;
  const int64_t whole = s.n / kWidth * kWidth;
  int64_t i = 0;
  for (; i < whole; i += kWidth) {
    const T* rows = s.A + i * s.row;
    Vec<T> sum[kWidth] = {};
    for (int64_t c = 0; c < whole; c += kWidth) {
      const Vec<T> x = load(v + c);
#pragma GCC unroll 16
      for (int l = 0; l < kWidth; ++l) sum[l] += load(rows + l * s.row + c) * x;
    }
    transpose<T>(sum);
#pragma GCC unroll 8
    for (int span = kWidth / 2; span > 0; span /= 2)
#pragma GCC unroll 8
      for (int l = 0; l < span; ++l) sum[l] += sum[l + span];
    store(out + i, sum[0] + load(v + i) * s.damping);
    for (int64_t c = whole; c < s.n; ++c)
      for (int l = 0; l < kWidth; ++l) out[i + l] += rows[l * s.row + c] * v[c];
  }
  for (; i < s.n; ++i) out[i] = dot(s.A + i * s.row, v, s.n) + s.damping * v[i];
}

// r = b - (A + damping I) x, returns |r|^2.
template <class T>
T recompute_residual(const System<T>& s, Scratch<T> w) {
  multiply(s, w.x, w.r);
  for (int64_t i = 0; i < s.n; ++i) w.r[i] = w.b[i] - w.r[i];
  return dot(w.r, w.r, s.n);
}

template <class T>
struct Outcome {
  int64_t steps;
  T residual;
  bool converged;
};

// Starts from w.x and leaves the result there.
template <class T>
Outcome<T> solve(const System<T>& s, T rtol, int64_t max_steps, Scratch<T> w) {
  const T norm = square_root(dot(w.b, w.b, s.n));
  if (norm == T(0)) {
    for (int64_t i = 0; i < s.n; ++i) w.x[i] = T(0);
    return {0, T(0), true};
  }
  const T goal = rtol * norm;
  T rr = recompute_residual(s, w);
  for (int64_t i = 0; i < s.n; ++i) w.p[i] = w.r[i];
  bool fresh = true;  // w.r is the recomputed residual of w.x
  int64_t steps = 0;
  while (steps < max_steps && !(fresh && square_root(rr) <= goal)) {
    multiply(s, w.p, w.Ap);
    const T curvature = dot(w.p, w.Ap, s.n);
    // An infinite one: a start or a matrix whose squares leave the range. x stays where it is.
    if (!(curvature > T(0) && curvature <= Simd<T>::kLargest && rr <= Simd<T>::kLargest)) break;
    const T alpha = rr / curvature;
    for (int64_t i = 0; i < s.n; ++i) w.x[i] += alpha * w.p[i];
    for (int64_t i = 0; i < s.n; ++i) w.r[i] -= alpha * w.Ap[i];
    ++steps;
    const T next = dot(w.r, w.r, s.n);
    fresh = square_root(next) <= goal;
    const T beta = next / rr;
    rr = fresh ? recompute_residual(s, w) : next;
    for (int64_t i = 0; i < s.n; ++i) w.p[i] = fresh ? w.r[i] : w.r[i] + beta * w.p[i];
  }
  if (!fresh) rr = recompute_residual(s, w);
  const T residual = square_root(rr) / norm;
  return {steps, residual, residual <= rtol};
}

// The power of two next below the largest entry of b. Dividing by it is exact and keeps the squared
// norms of tiny and huge right-hand sides in range; 1 where there is no such number.
template <class T>
T scale_of(const T* b, int64_t n) {
  T largest = T(0);
  for (int64_t i = 0; i < n; ++i) largest = __builtin_fmax(largest, __builtin_fabs(b[i]));
  if (!(largest > T(0)) || __builtin_isinf(largest)) return T(1);
  return static_cast<T>(__builtin_ldexp(1.0, __builtin_ilogb(largest)));
}

template <class T>
void copy_matrix(const CgArgs<T>& a, int64_t system, T* to) {
  const T* from = a.A + system * a.a_batch;
  for (int64_t i = 0; i < a.n; ++i)
    for (int64_t p = 0; p < a.n; ++p) to[i * a.n + p] = from[i * a.a_row + p * a.a_col];
}

// One column of one batch entry. Rows that are not contiguous are made so first: the copy costs
// less than one step.
template <class T>
void solve_column(const CgArgs<T>& a, int64_t system, int64_t column, Scratch<T> w) {
  System<T> s{a.n, a.A + system * a.a_batch, a.a_row, a.damping[system * a.damping_stride]};
  if (a.a_col != 1) {
    copy_matrix(a, system, w.matrix);
    s.A = w.matrix;
    s.row = a.n;
  }
  T* x = a.X + system * a.n * a.k + column;
  const T* b = a.B + system * a.b_batch + column * a.b_col;
  for (int64_t i = 0; i < a.n; ++i) w.b[i] = b[i * a.b_row];
  const T scale = scale_of(w.b, a.n);
  for (int64_t i = 0; i < a.n; ++i) w.b[i] /= scale;
  for (int64_t i = 0; i < a.n; ++i) w.x[i] = x[i * a.k] / scale;
  const Outcome<T> outcome = solve(s, a.rtol, a.max_steps, w);
  for (int64_t i = 0; i < a.n; ++i) x[i * a.k] = w.x[i] * scale;
  const int64_t entry = system * a.k + column;
  a.iterations[entry] = outcome.steps;
  a.residual[entry] = outcome.residual;
  a.converged[entry] = outcome.converged;
}

}  // namespace

template <class T>
void cg(const CgArgs<T>& a) {
  constexpr int64_t kSize = sizeof(T);
  constexpr double kUsualSteps = 10;
  const int64_t tasks = a.batch * a.k;
  if (tasks == 0) return;
  const int64_t vector = cache_lines(a.n * kSize);
  const int64_t bytes = 5 * vector + cache_lines(a.a_col == 1 ? 0 : a.n * a.n * kSize);
  const double order = static_cast<double>(a.n);
  const int threads =
      threads_for(tasks, 2 * kUsualSteps * order * order * static_cast<double>(tasks));
  [[maybe_unused]] const int64_t chunk = tasks_at_a_time(tasks, threads);
  const Workspace workspace(bytes * threads);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t at = thread_number() * bytes;
    solve_column(a, task / a.k, task % a.k,
                 Scratch<T>{workspace.at<T>(at), workspace.at<T>(at + vector),
                            workspace.at<T>(at + 2 * vector), workspace.at<T>(at + 3 * vector),
                            workspace.at<T>(at + 4 * vector), workspace.at<T>(at + 5 * vector)});
  }
}

template void cg<float>(const CgArgs<float>&);
template void cg<double>(const CgArgs<double>&);

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
