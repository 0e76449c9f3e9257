// Batched (A_j + damping_j I) X_j = B_j: packs of systems across lanes, the rest one by one.
#include "factor_plan.h"
#include "kernels_simd.h"
#include "lane_pack.h"
#include "tile_pack.h"
#include "tile_vector.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

namespace {

template <class T>
struct Scratch {
  T* factor;
  T* rhs;
};

template <class T>
void fill_nan(T* to, int64_t count) {
  for (int64_t e = 0; e < count; ++e) to[e] = static_cast<T>(__builtin_nan(""));
}

// R right-hand sides of every lane, columns s .. s + R.
template <class T, int R>
void solve_lanes_rhs(const SpdSolveArgs<T>& a, int64_t first, int64_t count, int64_t s,
                     Scratch<T> scratch) {
  constexpr int kWidth = kLanes<T>;
  const Vec<T>* matrix = reinterpret_cast<const Vec<T>*>(scratch.factor);
  Vec<T>* rhs = reinterpret_cast<Vec<T>*>(scratch.rhs);
  const T* from[kWidth];
  for (int c = 0; c < R; ++c) {
    for (int64_t l = 0; l < kWidth; ++l)
      from[l] = a.B + (first + (l < count ? l : 0)) * a.b_batch + (s + c) * a.b_col;
    lane_load_vector<T>(from, a.n, a.b_row, rhs + c, R);
  }
  lane_solve<T, R>(matrix, a.n, rhs);
  for (int c = 0; c < R; ++c) {
    T* to = a.X + first * a.n * a.k + s + c;
    lane_store_vector<T>(rhs + c, R, a.n, to, a.n * a.k, a.k, count);
  }
}

// Asks for the matrices of the pack after this one. Small systems are worked off faster than the
// processor's own prefetching sees their rows coming; large ones are not, and would fill the cache.
template <class T>
BACKMATCH_INLINE void prefetch_pack(const SpdSolveArgs<T>& a, int64_t first) {
  constexpr int64_t kMostBytes = 4096, kLine = 64;
  const int64_t bytes = a.n * a.n * static_cast<int64_t>(sizeof(T));
  if (bytes > kMostBytes || a.a_col != 1 || a.a_row != a.n) return;
  for (int64_t system = first; system < first + kLanes<T> && system < a.batch; ++system) {
    const char* from = reinterpret_cast<const char*>(a.A + system * a.a_batch);
    for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at);
    __builtin_prefetch(a.B + system * a.b_batch);
  }
}

// Systems first .. first + count, one per lane; spare lanes repeat the first one.
template <class T>
void solve_lanes(const SpdSolveArgs<T>& a, int64_t first, int64_t count, Scratch<T> scratch) {
  constexpr int kWidth = kLanes<T>;
  Vec<T>* matrix = reinterpret_cast<Vec<T>*>(scratch.factor);
  const T* from[kWidth];
  Vec<T> damping{};
  for (int64_t l = 0; l < kWidth; ++l) {
    const int64_t system = first + (l < count ? l : 0);
    from[l] = a.A + system * a.a_batch;
    damping[l] = a.damping[system * a.damping_stride];
  }
  lane_load_matrix<T>(from, a.n, a.a_row, a.a_col, matrix);
  prefetch_pack(a, first + kWidth);
  lane_damp<T>(matrix, a.n, damping);
  IntVec<T> info;
  lane_factor<T>(matrix, a.n, info);
  int64_t s = 0;
  for (; s + kTile <= a.k; s += kTile) solve_lanes_rhs<T, kTile>(a, first, count, s, scratch);
  for (; s < a.k; ++s) solve_lanes_rhs<T, 1>(a, first, count, s, scratch);
  for (int64_t l = 0; l < count; ++l) {
    a.info[first + l] = static_cast<int32_t>(info[l]);
    if (info[l] != 0) fill_nan(a.X + (first + l) * a.n * a.k, a.n * a.k);
  }
}

template <class T, int M>
void solve_tiles_rhs(const SpdSolveArgs<T>& a, int64_t system, int64_t s, Scratch<T> scratch) {
  constexpr int64_t kWide = M * kLanes<T>;
  const int64_t count = a.k - s < kWide ? a.k - s : kWide;
  const T* from = a.B + system * a.b_batch + s * a.b_col;
  tile_load_rhs(from, a.n, a.b_row, a.b_col, count, kWide, scratch.rhs);
  tile_solve<T, M>(scratch.factor, a.n, scratch.rhs);
  T* to = a.X + system * a.n * a.k + s;
  for (int64_t p = 0; p < a.n; ++p)
    for (int64_t c = 0; c < count; ++c) to[p * a.k + c] = scratch.rhs[p * kWide + c];
}

// A single right-hand side is a further row of the matrix.
template <class T>
void solve_tiles(const SpdSolveArgs<T>& a, int64_t system, Scratch<T> scratch) {
  constexpr int kWidth = kLanes<T>;
  T* matrix = scratch.factor;
  T* X = a.X + system * a.n * a.k;
  const int64_t rows = a.k == 1 ? a.n + 1 : a.n;
  tile_load_matrix(a.A + system * a.a_batch, a.n, a.a_row, a.a_col, rows, matrix);
  tile_damp<T>(matrix, a.n, a.damping[system * a.damping_stride]);
  if (a.k == 1) tile_put_vector(a.B + system * a.b_batch, a.b_row, a.n, matrix);
  a.info[system] = tile_factor(matrix, a.n, rows);
  if (a.info[system] != 0) {
    fill_nan(X, a.n * a.k);
    return;
  }
  if (a.k == 1) {
    tile_back_vector(matrix, a.n, scratch.rhs);
    for (int64_t p = 0; p < a.n; ++p) X[p] = scratch.rhs[p];
    return;
  }
  int64_t s = 0;
  for (; s + kWidth < a.k; s += 2 * kWidth) solve_tiles_rhs<T, 2>(a, system, s, scratch);
  for (; s < a.k; s += kWidth) solve_tiles_rhs<T, 1>(a, system, s, scratch);
}

}  // namespace

template <class T>
void spd_solve(const SpdSolveArgs<T>& a) {
  constexpr int64_t kWidth = kLanes<T>;
  if (a.batch == 0) return;
  const double flops = solve_flops<T>(a.n, a.k) * static_cast<double>(a.batch);
  const double idle = idle_share<T>(a.batch, threads_for(a.batch, flops));
  const int64_t packs = (lanes_pay<T>(a.n, kWidth, idle) ? a.batch / kWidth : 0) +
                        (lanes_pay<T>(a.n, a.batch % kWidth, idle) ? 1 : 0);
  const int64_t packed = packs * kWidth < a.batch ? packs * kWidth : a.batch;
  const int64_t tasks = packs + a.batch - packed;
  const int threads = threads_for(tasks, flops);
  [[maybe_unused]] const int64_t chunk = tasks_at_a_time(tasks, threads);
  const int64_t bytes = factor_bytes<T>(a.n);
  const int64_t rhs_at = cache_lines(factor_elements<T>(a.n) * static_cast<int64_t>(sizeof(T)));
  const Workspace workspace(bytes * threads);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t start = thread_number() * bytes;
    const Scratch<T> scratch{workspace.at<T>(start), workspace.at<T>(start + rhs_at)};
    if (task < packs) {
      const int64_t first = task * kWidth;
      solve_lanes<T>(a, first, a.batch - first < kWidth ? a.batch - first : kWidth, scratch);
    } else {
      solve_tiles<T>(a, packed + task - packs, scratch);
    }
  }
}

template void spd_solve<float>(const SpdSolveArgs<float>&);
template void spd_solve<double>(const SpdSolveArgs<double>&);

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
