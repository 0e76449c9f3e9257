// The vector work of one conjugate gradient step for many systems, between two operator products.
//
// Every system is a row. Its vectors are read once for p^T q, once for the update of x and r with
// the new |r|, and once for the next direction; a system that is not running is not touched.
#include "dot.h"
#include "kernels_simd.h"
#include "simd.h"
#include "workspace.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

namespace {

// x += alpha p, r -= alpha q; returns |r|^2.
template <class T>
T advance(T alpha, const T* p, const T* q, T* x, T* r, int64_t n) {
  constexpr int kWidth = kLanes<T>;
  Vec<T> sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWidth <= n; i += kSums * kWidth)
#pragma GCC unroll 4
    for (int u = 0; u < kSums; ++u) {
      const int64_t at = i + u * kWidth;
      store(x + at, load(x + at) + load(p + at) * alpha);
      const Vec<T> rest = load(r + at) - load(q + at) * alpha;
      store(r + at, rest);
      sum[u] += rest * rest;
    }
  T result = total_of<T>(sum);
  for (; i < n; ++i) {
    x[i] += alpha * p[i];
    r[i] -= alpha * q[i];
    result += r[i] * r[i];
  }
  return result;
}

// p = z + beta p
template <class T>
void turn(T beta, const T* z, T* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = z[i] + beta * p[i];
}

template <class T>
void step_system(const CgStepArgs<T>& a, int64_t s) {
  const int64_t at = s * a.n;
  const T curvature = dot(a.P + at, a.Q + at, a.n);
  const bool sound = curvature > T(0) && curvature <= Simd<T>::kLargest && a.rho[s] > T(0);
  if (!sound) {
    a.alive[s] = a.running[s] = 0;
    return;
  }
  const T rr = advance(a.rho[s] / curvature, a.P + at, a.Q + at, a.X + at, a.R + at, a.n);
  ++a.steps[s];
  a.running[s] = square_root(rr) > a.target[s] && a.steps[s] < a.max_steps;
  if (!a.running[s] || a.preconditioned) return;
  turn(rr / a.rho[s], a.R + at, a.P + at, a.n);
  a.rho[s] = rr;
}

template <class T>
int threads_of(int64_t systems, int64_t n) {
  return threads_for(systems, 8 * static_cast<double>(systems) * static_cast<double>(n));
}

}  // namespace

template <class T>
int64_t cg_step(const CgStepArgs<T>& a) {
  const int threads = threads_of<T>(a.systems, a.n);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t s = 0; s < a.systems; ++s)
    if (a.running[s]) step_system(a, s);
  int64_t running = 0;
  for (int64_t s = 0; s < a.systems; ++s) running += a.running[s];
  return running;
}

template <class T>
void cg_direction(const CgDirectionArgs<T>& a) {
  const int threads = threads_of<T>(a.systems, a.n);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t s = 0; s < a.systems; ++s) {
    if (!a.running[s]) continue;
    const int64_t at = s * a.n;
    const T rho = dot(a.R + at, a.Z + at, a.n);
    turn(rho / a.rho[s], a.Z + at, a.P + at, a.n);
    a.rho[s] = rho;
  }
}

template int64_t cg_step<float>(const CgStepArgs<float>&);
template int64_t cg_step<double>(const CgStepArgs<double>&);
template void cg_direction<float>(const CgDirectionArgs<float>&);
template void cg_direction<double>(const CgDirectionArgs<double>&);

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
