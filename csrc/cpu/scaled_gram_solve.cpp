// X_j = D_j y_j with (D_j K D_j + damping_j I) y_j = R_j: one K for the whole batch.
//
// Every system is gathered from K straight into a thread's scratch, its inactive rows (D == 0)
// left out, and solved there; no matrix of a system is ever in main memory. Systems are taken in
// the order of their number of active rows, so that the lanes of a pack waste little on padding.
#include "active_rows.h"
#include "factor_plan.h"
#include "kernels_simd.h"
#include "lane_pack.h"
#include "mirror.h"
#include "tile_pack.h"
#include "tile_vector.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

namespace {

// Scratch of one thread. `scales`, `indices`, `picks` and `starts` have room for one row of every
// lane, `buffers` for kTile of them, `spread` for the slopes of a pack in lanes.
template <class T>
struct Scratch {
  T* factor;
  T* rhs;
  T* spread;
  T* buffers;
  T* scales;
  int32_t* indices;
  int32_t* picks;
  int32_t* starts;
};

// What all threads read: K in full with rows of whole vectors, and a row of zeros.
template <class T>
struct Shared {
  const T* full;
  const T* zeros;
  int64_t pitch;
};

// Entries from one lane's row to the next: a vector may be stored past the last active entry.
template <class T>
BACKMATCH_INLINE int64_t row_room(int64_t n) {
  return whole_vectors<T>(n) + kLanes<T>;
}

template <class T>
const T* slopes_of(const ScaledGramArgs<T>& a, int64_t system) {
  return a.D + system * a.d_batch;
}

// Lists the active rows of a system with the scratch of one lane; scales are zero past them.
template <class T>
ActiveRows<T> active_rows(const ScaledGramArgs<T>& a, int64_t system, int64_t lane,
                          const Scratch<T>& s) {
  const int64_t room = row_room<T>(a.n);
  ActiveRows<T> rows{0, s.indices + lane * room, s.scales + lane * room,
                     s.starts + lane * room, s.picks + lane * room * (kWords / kLanes<T>)};
  if (system >= 0) list_active(slopes_of(a, system), a.n, a.d_col, rows);
  for (int64_t q = rows.count; q < room; ++q) rows.scale[q] = T(0);
  return rows;
}

// The lower triangle of K as a full matrix, zeros past column n and in one row more.
template <class T>
void copy_full(const ScaledGramArgs<T>& a, int64_t pitch, T* full) {
  for (int64_t i = 0; i < a.n; ++i) {
    T* row = full + i * pitch;
    const T* from = a.K + i * a.k_row;
    if (a.k_col == 1) {
      for (int64_t p = 0; p <= i; ++p) row[p] = from[p];
    } else {
      for (int64_t p = 0; p <= i; ++p) row[p] = from[p * a.k_col];
    }
    for (int64_t p = a.n; p < pitch; ++p) row[p] = T(0);
  }
  for (int64_t p = 0; p < pitch; ++p) full[a.n * pitch + p] = T(0);
  mirror_lower(full, a.n, pitch);
}

template <class T>
void gather_rhs(const ScaledGramArgs<T>& a, int64_t system, const ActiveRows<T>& rows, T* to) {
  const T* R = a.R + system * a.r_batch;
  for (int64_t q = 0; q < rows.count; ++q) to[q] = R[rows.index[q] * a.r_col];
}

// Writes the result of one system from y over its active rows.
template <class T>
void finish(const ScaledGramArgs<T>& a, int64_t system, int64_t info, const ActiveRows<T>& rows,
            const T* y) {
  T* x = a.X + system * a.n;
  a.info[system] = static_cast<int32_t>(info == 0 ? 0 : rows.index[info - 1] + 1);
  const T rest = info == 0 ? T(0) : static_cast<T>(__builtin_nan(""));
  for (int64_t i = 0; i < a.n; ++i) x[i] = rest;
  if (info != 0) return;
  for (int64_t q = 0; q < rows.count; ++q) x[rows.index[q]] = rows.scale[q] * y[q];
}

// Points at rows first .. first + kTile of one system, without its slopes: at rows of K where all
// are active, else at `buffer`, `room` entries a row. Past the active rows, zeros. `last`: see
// keep_active.
template <class T>
BACKMATCH_INLINE void active_block(const Shared<T>& k, int64_t n, const ActiveRows<T>& rows,
                                   int64_t first, int64_t last, T* buffer, int64_t room,
                                   const T** block) {
  const int64_t stop = first + kTile < rows.count ? first + kTile : rows.count;
  for (int r = 0; r < kTile; ++r)
    block[r] = first + r < stop ? k.full + rows.index[first + r] * k.pitch : k.zeros;
  if (rows.count == n || first >= stop) return;
  keep_active<T, kTile>(rows, block, 0, stop, last, buffer, room);
  for (int r = 0; first + r < stop; ++r) block[r] = buffer + r * room;
}

// One row of every lane. A chunk is stored whole, as in lane_load_rows; rows past a lane's own
// are rows of the identity.
template <class T>
BACKMATCH_INLINE void scale_row(const T* const* from, int64_t i, const Vec<T>* scale,
                                const IntVec<T>& counts, Vec<T>* matrix) {
  constexpr int kWidth = kLanes<T>;
  Vec<T>* place = matrix + lane_index(i, 0);
  for (int64_t p = 0; p <= i; p += kWidth) {
    Vec<T> entry[kWidth];
    lane_gather<T>(from, p, entry);
#pragma GCC unroll 16
    for (int c = 0; c < kWidth; ++c) place[(p + c) * kTile] = entry[c] * scale[i] * scale[p + c];
  }
  const IntVec<T> own = counts > (IntVec<T>{} + static_cast<typename Simd<T>::Index>(i));
  place[i * kTile] = own ? place[i * kTile] : Vec<T>{} + T(1);
}

// The matrices of a pack of order `most`, a block row at a time.
template <class T>
void gather_pack(const Shared<T>& k, int64_t n, int64_t most, const ActiveRows<T>* rows,
                 const Vec<T>* scale, T* buffers, Vec<T>* matrix) {
  constexpr int kWidth = kLanes<T>;
  const int64_t room = row_room<T>(most);
  IntVec<T> counts{};
  for (int l = 0; l < kWidth; ++l) counts[l] = static_cast<typename Simd<T>::Index>(rows[l].count);
  for (int64_t first = 0; first < most; first += kTile) {
    int64_t last = 0;
    for (int l = 0; l < kWidth; ++l) {
      const int64_t stop = first + kTile < rows[l].count ? first + kTile : rows[l].count;
      const int64_t own = vector_of(rows[l], stop - 1);
      last = own > last ? own : last;
    }
    const T* from[kTile][kWidth];
    for (int l = 0; l < kWidth; ++l) {
      const T* block[kTile];
      active_block(k, n, rows[l], first, last, buffers + l * kTile * room, room, block);
      for (int r = 0; r < kTile; ++r) from[r][l] = block[r];
    }
    for (int r = 0; r < kTile && first + r < most; ++r)
      scale_row(from[r], first + r, scale, counts, matrix);
  }
}

// Systems order[0 .. count], one per lane; the last has the most active rows. Damping the
// identity rows of a padded lane changes nothing that is read.
template <class T>
void solve_lanes(const ScaledGramArgs<T>& a, const Shared<T>& k, const int64_t* order,
                 int64_t count, int64_t most, const Scratch<T>& s) {
  constexpr int kWidth = kLanes<T>;
  Vec<T>* matrix = reinterpret_cast<Vec<T>*>(s.factor);
  Vec<T>* rhs = reinterpret_cast<Vec<T>*>(s.rhs);
  Vec<T>* scale = reinterpret_cast<Vec<T>*>(s.spread);
  const int64_t room = row_room<T>(a.n);
  ActiveRows<T> rows[kWidth];
  const T* lane[kWidth];
  Vec<T> damping{};
  for (int64_t l = 0; l < kWidth; ++l) {
    rows[l] = active_rows(a, l < count ? order[l] : -1, l, s);
    lane[l] = rows[l].scale;
    damping[l] = l < count ? a.damping[order[l] * a.damping_stride] : T(0);
  }
  lane_load_vector<T>(lane, whole_vectors<T>(most), 1, scale, 1);
  gather_pack(k, a.n, most, rows, scale, s.buffers, matrix);
  lane_damp<T>(matrix, most, damping);
  for (int64_t l = 0; l < kWidth; ++l) {
    T* buffer = s.buffers + l * room;
    if (l < count) gather_rhs(a, order[l], rows[l], buffer);
    for (int64_t q = rows[l].count; q < whole_vectors<T>(most); ++q) buffer[q] = T(0);
    lane[l] = buffer;
  }
  lane_load_vector<T>(lane, whole_vectors<T>(most), 1, rhs, 1);
  IntVec<T> info;
  lane_factor<T>(matrix, most, info);
  lane_solve<T, 1>(matrix, most, rhs);
  lane_store_vector<T>(rhs, 1, whole_vectors<T>(most), s.buffers, room, 1, count);
  for (int64_t l = 0; l < count; ++l) {
    // A bad pivot past the lane's own rows is one of its padding: the system itself is fine.
    const int64_t bad = info[l] > rows[l].count ? 0 : info[l];
    finish(a, order[l], bad, rows[l], s.buffers + l * room);
  }
}

// Column p of a panel is a piece of row p: the matrix is symmetric.
template <class T>
void gather_tiles(const Shared<T>& k, int64_t n, const ActiveRows<T>& rows, T* buffer, T* matrix) {
  constexpr int kWidth = kLanes<T>;
  for (int64_t p = 0; p < rows.count; ++p) {
    const int64_t begin = p / kPanelRows<T> * kPanelRows<T>;
    const T* row = k.full + rows.index[p] * k.pitch;
    if (rows.count < n) {
      const int64_t last = vector_of(rows, rows.count - 1);
      keep_active<T, 1>(rows, &row, begin, rows.count, last, buffer, 0);
      row = buffer;
    }
    for (int64_t first = begin; first < rows.count; first += kWidth)
      store(matrix + tile_index<T>(first, p),
            load(row + first) * load(rows.scale + first) * rows.scale[p]);
  }
  tile_pad(matrix, rows.count, rows.count + 1);
  tile_clear_upper(matrix, rows.count);
}

template <class T>
void solve_tiles(const ScaledGramArgs<T>& a, const Shared<T>& k, int64_t system,
                 const Scratch<T>& s) {
  const ActiveRows<T> rows = active_rows(a, system, 0, s);
  gather_tiles(k, a.n, rows, s.buffers, s.factor);
  tile_damp<T>(s.factor, rows.count, a.damping[system * a.damping_stride]);
  gather_rhs(a, system, rows, s.buffers);
  tile_put_vector(s.buffers, 1, rows.count, s.factor);
  const int32_t info = tile_factor(s.factor, rows.count, rows.count + 1);
  if (info == 0) tile_back_vector(s.factor, rows.count, s.rhs);
  finish(a, system, info, rows, s.rhs);
}

// Systems by number of active rows (a stable counting sort), and where each group starts.
template <class T>
void sort_by_active(const ScaledGramArgs<T>& a, int64_t* order, int64_t* counts, int64_t* start) {
  for (int64_t c = 0; c <= a.n + 1; ++c) start[c] = 0;
  for (int64_t j = 0; j < a.batch; ++j) {
    counts[j] = count_active(slopes_of(a, j), a.n, a.d_col);
    ++start[counts[j] + 1];
  }
  for (int64_t c = 0; c <= a.n; ++c) start[c + 1] += start[c];
  for (int64_t j = 0; j < a.batch; ++j) order[start[counts[j]]++] = j;
}

// Bytes of the parts of the scratch, one after the other.
template <class T>
struct Layout {
  int64_t rhs, spread, buffers, scales, indices, picks, starts, total;

  explicit Layout(int64_t n) {
    constexpr int64_t kSize = sizeof(T);
    const int64_t entries = kLanes<T> * row_room<T>(n);
    rhs = cache_lines(factor_elements<T>(n) * kSize);
    spread = rhs + cache_lines(rhs_elements<T>(n) * kSize);
    buffers = spread + cache_lines(rhs_elements<T>(n) * kSize);
    scales = buffers + cache_lines(kTile * entries * kSize);
    indices = scales + cache_lines(entries * kSize);
    picks = indices + cache_lines(entries * 4);
    starts = picks + cache_lines(entries * kSize);
    total = starts + cache_lines(entries * 4);
  }

  Scratch<T> of(const Workspace& workspace, int64_t thread) const {
    const int64_t at = thread * total;
    return {workspace.at<T>(at),
            workspace.at<T>(at + rhs),
            workspace.at<T>(at + spread),
            workspace.at<T>(at + buffers),
            workspace.at<T>(at + scales),
            workspace.at<int32_t>(at + indices),
            workspace.at<int32_t>(at + picks),
            workspace.at<int32_t>(at + starts)};
  }
};

}  // namespace

template <class T>
void scaled_gram_solve(const ScaledGramArgs<T>& a) {
  constexpr int64_t kWidth = kLanes<T>;
  constexpr int64_t kIndex = sizeof(int64_t);
  if (a.batch == 0) return;
  const int64_t pitch = row_room<T>(a.n);
  const Workspace shared((a.n + 1) * pitch * static_cast<int64_t>(sizeof(T)));
  const Shared<T> k{shared.at<T>(0), shared.at<T>(a.n * pitch * int64_t{sizeof(T)}), pitch};
  copy_full(a, pitch, shared.at<T>(0));
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
      solve_lanes(a, k, order + j, end - j, counts[order[end - 1]], scratch);
    } else {
      solve_tiles(a, k, order[j], scratch);
    }
  }
}

template void scaled_gram_solve<float>(const ScaledGramArgs<float>&);
template void scaled_gram_solve<double>(const ScaledGramArgs<double>&);

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
