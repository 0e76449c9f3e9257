// X_j = D_j y_j with (D_j K D_j + damping_j I) y_j = R_j: one K for the whole batch.
//
// Every system is gathered from K straight into a thread's scratch, its inactive rows (D == 0)
// left out, and solved there; no matrix of a system is ever in main memory. Systems are taken in
// the order of their number of active rows, so that the lanes of a pack waste little on padding.
#include "factor_plan.h"
#include "kernels_simd.h"
#include "lane_pack.h"
#include "tile_pack.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

namespace {

// Scratch of one thread. `active` and `scale` hold the rows of up to kLanes systems.
template <class T>
struct Scratch {
  T* factor;
  T* rhs;
  int64_t* active;
  T* scale;
};

template <class T>
int64_t count_active(const ScaledGramArgs<T>& a, int64_t system) {
  const T* D = a.D + system * a.d_batch;
  int64_t count = 0;
  for (int64_t i = 0; i < a.n; ++i) count += D[i * a.d_col] != T(0);
  return count;
}

template <class T>
int64_t list_active(const ScaledGramArgs<T>& a, int64_t system, int64_t* active, T* scale) {
  const T* D = a.D + system * a.d_batch;
  int64_t count = 0;
  for (int64_t i = 0; i < a.n; ++i) {
    const T slope = D[i * a.d_col];
    active[count] = i;
    scale[count] = slope;
    count += slope != T(0);
  }
  return count;
}

// The lower triangle of K as a full contiguous matrix, so that gathers run along rows.
template <class T>
void mirror(const ScaledGramArgs<T>& a, T* full) {
  for (int64_t i = 0; i < a.n; ++i)
    for (int64_t p = 0; p <= i; ++p)
      full[i * a.n + p] = full[p * a.n + i] = a.K[i * a.k_row + p * a.k_col];
}

// Writes the result of one system from y, `step` elements apart, over its active rows.
template <class T>
void finish(const ScaledGramArgs<T>& a, int64_t system, int64_t info, int64_t count,
            const int64_t* active, const T* scale, const T* y, int64_t step) {
  T* x = a.X + system * a.n;
  a.info[system] = static_cast<int32_t>(info == 0 ? 0 : active[info - 1] + 1);
  const T rest = info == 0 ? T(0) : static_cast<T>(__builtin_nan(""));
  for (int64_t i = 0; i < a.n; ++i) x[i] = rest;
  if (info != 0) return;
  for (int64_t q = 0; q < count; ++q) x[active[q]] = scale[q] * y[q * step];
}

// One lane of a pack of order n: its active rows, then rows of the identity.
template <class T>
void gather_lane(const ScaledGramArgs<T>& a, const T* full, int64_t system, int64_t n,
                 int64_t count, const int64_t* active, const T* scale, T* matrix, T* rhs) {
  constexpr int kWidth = kLanes<T>;
  for (int64_t i = 0; i < count; ++i) {
    const T* row = full + active[i] * a.n;
    T* place = matrix + lane_index(i, 0) * kWidth;
    for (int64_t p = 0; p <= i; ++p)
      place[p * kTile * kWidth] = row[active[p]] * scale[i] * scale[p];
    rhs[i * kWidth] = a.R[system * a.r_batch + active[i] * a.r_col];
  }
  for (int64_t i = count; i < n; ++i) {
    T* place = matrix + lane_index(i, 0) * kWidth;
    for (int64_t p = 0; p <= i; ++p) place[p * kTile * kWidth] = p == i ? T(1) : T(0);
    rhs[i * kWidth] = T(0);
  }
}

// Systems order[0 .. count], one per lane; the last has the most active rows. Damping the
// identity rows of a padded lane changes nothing that is read.
template <class T>
void solve_lanes(const ScaledGramArgs<T>& a, const T* full, const int64_t* order, int64_t count,
                 int64_t most, Scratch<T> scratch) {
  constexpr int kWidth = kLanes<T>;
  Vec<T>* matrix = reinterpret_cast<Vec<T>*>(scratch.factor);
  Vec<T>* rhs = reinterpret_cast<Vec<T>*>(scratch.rhs);
  const int64_t n = lane_blocks(most) * kTile;
  int64_t counts[kWidth] = {};
  Vec<T> damping{};
  for (int64_t l = 0; l < kWidth; ++l) {
    int64_t* active = scratch.active + l * a.n;
    T* scale = scratch.scale + l * a.n;
    const int64_t system = order[l < count ? l : 0];
    if (l < count) counts[l] = list_active(a, system, active, scale);
    gather_lane(a, full, system, n, counts[l], active, scale, scratch.factor + l, scratch.rhs + l);
    damping[l] = l < count ? a.damping[system * a.damping_stride] : T(0);
  }
  lane_damp<T>(matrix, most, damping);
  IntVec<T> info;
  lane_factor<T>(matrix, lane_blocks(most), info);
  lane_solve<T, 1>(matrix, lane_blocks(most), rhs);
  for (int64_t l = 0; l < count; ++l) {
    // A bad pivot past the lane's own rows is one of its padding: the system itself is fine.
    const int64_t bad = info[l] > counts[l] ? 0 : info[l];
    finish(a, order[l], bad, counts[l], scratch.active + l * a.n, scratch.scale + l * a.n,
           scratch.rhs + l, kWidth);
  }
}

template <class T>
void gather_tiles(const ScaledGramArgs<T>& a, const T* full, int64_t count, const int64_t* active,
                  const T* scale, T* matrix) {
  for (int64_t first = 0; first < count; first += kPanelRows<T>) {
    const int64_t rows = count - first < kPanelRows<T> ? count - first : kPanelRows<T>;
    T* place = matrix + tile_index<T>(first, 0);
    for (int64_t p = 0; p < first + rows; ++p, place += kPanelRows<T>) {
      const T* row = full + active[p] * a.n;
      for (int64_t r = 0; r < rows; ++r)
        place[r] = row[active[first + r]] * scale[first + r] * scale[p];
    }
  }
  tile_pad(matrix, count);
}

template <class T>
void solve_tiles(const ScaledGramArgs<T>& a, const T* full, int64_t system, Scratch<T> scratch) {
  constexpr int kWidth = kLanes<T>;
  const int64_t count = list_active(a, system, scratch.active, scratch.scale);
  gather_tiles(a, full, count, scratch.active, scratch.scale, scratch.factor);
  tile_damp<T>(scratch.factor, count, a.damping[system * a.damping_stride]);
  const int32_t info = tile_factor(scratch.factor, count);
  for (int64_t p = 0; p < padded_order(count) * kWidth; ++p) scratch.rhs[p] = T(0);
  for (int64_t q = 0; q < count; ++q)
    scratch.rhs[q * kWidth] = a.R[system * a.r_batch + scratch.active[q] * a.r_col];
  if (info == 0) tile_solve<T, 1>(scratch.factor, count, scratch.rhs);
  finish(a, system, info, count, scratch.active, scratch.scale, scratch.rhs, kWidth);
}

// Systems by number of active rows (a stable counting sort), and where each group starts.
template <class T>
void sort_by_active(const ScaledGramArgs<T>& a, int64_t* order, int64_t* counts, int64_t* start) {
  for (int64_t c = 0; c <= a.n + 1; ++c) start[c] = 0;
  for (int64_t j = 0; j < a.batch; ++j) ++start[(counts[j] = count_active(a, j)) + 1];
  for (int64_t c = 0; c <= a.n; ++c) start[c + 1] += start[c];
  for (int64_t j = 0; j < a.batch; ++j) order[start[counts[j]]++] = j;
}

// Bytes of the parts of the scratch, one after the other.
template <class T>
struct Layout {
  int64_t rhs, active, scale, total;

  explicit Layout(int64_t n) {
    constexpr int64_t kSize = sizeof(T);
    rhs = cache_lines(factor_elements<T>(n) * kSize);
    active = rhs + cache_lines(rhs_elements<T>(n) * kSize);
    scale = active + cache_lines((kLanes<T> * n + 1) * static_cast<int64_t>(sizeof(int64_t)));
    total = scale + cache_lines((kLanes<T> * n + 1) * kSize);
  }

  Scratch<T> of(const Workspace& workspace, int64_t thread) const {
    const int64_t at = thread * total;
    return {workspace.at<T>(at), workspace.at<T>(at + rhs), workspace.at<int64_t>(at + active),
            workspace.at<T>(at + scale)};
  }
};

}  // namespace

template <class T>
void scaled_gram_solve(const ScaledGramArgs<T>& a) {
  constexpr int64_t kWidth = kLanes<T>;
  constexpr int64_t kIndex = sizeof(int64_t);
  if (a.batch == 0) return;
  const Workspace shared(a.n * a.n * static_cast<int64_t>(sizeof(T)));
  T* full = shared.at<T>(0);
  mirror(a, full);
  const Workspace lists((3 * a.batch + a.n + 2) * kIndex);
  int64_t* order = lists.at<int64_t>(0);
  int64_t* counts = order + a.batch;
  sort_by_active(a, order, counts, counts + 2 * a.batch);
  // Task t starts at order[first[t]]: a pack of lanes, or one system.
  int64_t* first = counts + a.batch;
  int64_t tasks = 0;
  double flops = 0;
  for (int64_t j = 0; j < a.batch; ++j) flops += solve_flops<T>(counts[j], 1);
  const double idle = idle_share<T>(a.batch, threads_for(a.batch, flops));
  for (int64_t j = 0; j < a.batch; ++tasks) {
    const int64_t end = j + kWidth < a.batch ? j + kWidth : a.batch;
    first[tasks] = j;
    j = lanes_pay<T>(counts[order[end - 1]], end - j, idle) ? end : j + 1;
  }
  const int threads = threads_for(tasks, flops);
  [[maybe_unused]] const int64_t chunk = tasks_at_a_time(tasks, threads * 4);
  const Layout<T> layout(a.n);
  const Workspace workspace(layout.total * threads);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1)
  for (int64_t back = 0; back < tasks; ++back) {
    const int64_t task = tasks - 1 - back;  // the largest systems first: a better balance
    const int64_t j = first[task];
    const int64_t end = task + 1 < tasks ? first[task + 1] : a.batch;
    const Scratch<T> scratch = layout.of(workspace, thread_number());
    if (lanes_pay<T>(counts[order[end - 1]], end - j, idle)) {
      solve_lanes(a, full, order + j, end - j, counts[order[end - 1]], scratch);
    } else {
      solve_tiles(a, full, order[j], scratch);
    }
  }
}

template void scaled_gram_solve<float>(const ScaledGramArgs<float>&);
template void scaled_gram_solve<double>(const ScaledGramArgs<double>&);

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
