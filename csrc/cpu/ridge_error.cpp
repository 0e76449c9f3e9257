// |Z^T D_j (D_j Z d_j - R_j) + damping_j d_j| and |Z^T D_j R_j|: how well d solves its problem.
//
// A few systems at a time go through all three products while they are in cache: no (batch, m)
// or (batch, n) temporary is written.
#include "kernels_simd.h"
#include "ridge_products.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

namespace {

// Systems of one task: their rows, two of them per system, keep a panel of Z busy.
constexpr int64_t kSystemsAtATime = 16;

// Scratch of one thread, rows of kSystemsAtATime systems each.
template <class T>
struct Scratch {
  T* step;      // d, contiguous: (systems, n)
  T* rows;      // D (R - D Z d), then D R: (2 systems, m)
  T* products;  // the same times Z: (2 systems, n)
};

// Squares are summed in double precision: those of large float32 entries would overflow.
template <class T>
double sum_of_squares(const T* v, int64_t n) {
  double partial[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int l = 0; l < 8; ++l)
      partial[l] += static_cast<double>(v[i + l]) * static_cast<double>(v[i + l]);
  double total = ((partial[0] + partial[4]) + (partial[1] + partial[5])) +
                 ((partial[2] + partial[6]) + (partial[3] + partial[7]));
  for (; i < n; ++i) total += static_cast<double>(v[i]) * static_cast<double>(v[i]);
  return total;
}

// missing (on entry Z d) = D (R - D missing) and wanted = D R of one system. A row that is off counts
// for nothing, whatever R holds there.
template <class T>
BACKMATCH_INLINE void weigh(int64_t m, const T* D, int64_t d_col, const T* R, int64_t r_col,
                            T* missing, T* wanted) {
  for (int64_t i = 0; i < m; ++i) {
    const T slope = D[i * d_col], held = R[i * r_col];
    const T r = slope == T(0) ? T(0) : held;
    wanted[i] = slope * r;
    missing[i] = slope * (r - slope * missing[i]);
  }
}

// On entry s.rows holds Z d of the systems, m entries each.
template <class T>
void weigh_rows(const RidgeErrorArgs<T>& a, int64_t first, int64_t count, Scratch<T> s) {
  for (int64_t j = 0; j < count; ++j) {
    const T* R = a.R + (first + j) * a.r_batch;
    T* missing = s.rows + j * a.m;
    T* wanted = s.rows + (count + j) * a.m;
    const T* D = a.D == nullptr ? nullptr : a.D + (first + j) * a.d_batch;
    if (D == nullptr) {
      for (int64_t i = 0; i < a.m; ++i) {
        wanted[i] = R[i * a.r_col];
        missing[i] = wanted[i] - missing[i];
      }
    } else if (a.d_col == 1 && a.r_col == 1) {
      weigh(a.m, D, 1, R, 1, missing, wanted);
    } else {
      weigh(a.m, D, a.d_col, R, a.r_col, missing, wanted);
    }
  }
}

template <class T>
void check_systems(const RidgeErrorArgs<T>& a, int64_t first, int64_t count, const T* packed_rows,
                   const T* packed_columns, Scratch<T> s) {
  for (int64_t j = 0; j < count; ++j)
    for (int64_t c = 0; c < a.n; ++c)
      s.step[j * a.n + c] = a.d[(first + j) * a.step_batch + c * a.step_col];
  multiply<T>(s.step, a.n, count, a.n, packed_rows, s.rows, a.m, a.m);
  weigh_rows(a, first, count, s);
  multiply<T>(s.rows, a.m, 2 * count, a.m, packed_columns, s.products, a.n, a.n);
  for (int64_t j = 0; j < count; ++j) {
    const T damping = a.damping[(first + j) * a.damping_stride];
    T* error = s.products + j * a.n;
    for (int64_t c = 0; c < a.n; ++c) error[c] = damping * s.step[j * a.n + c] - error[c];
    a.error[first + j] = sum_of_squares(error, a.n);
    a.size[first + j] = sum_of_squares(s.products + (count + j) * a.n, a.n);
  }
}

}  // namespace

template <class T>
void ridge_error(const RidgeErrorArgs<T>& a) {
  constexpr int64_t kSize = sizeof(T);
  if (a.batch == 0) return;
  const int64_t rows_bytes = cache_lines(product_elements<T>(a.n, a.m) * kSize);
  const Workspace packs(rows_bytes + product_elements<T>(a.m, a.n) * kSize);
  T* packed_rows = packs.at<T>(0);
  T* packed_columns = packs.at<T>(rows_bytes);
  pack_all(a.Z, a.z_col, a.z_row, a.n, a.m, packed_rows);
  pack_all(a.Z, a.z_row, a.z_col, a.m, a.n, packed_columns);
  const int64_t tasks = (a.batch + kSystemsAtATime - 1) / kSystemsAtATime;
  const double flops = 6 * static_cast<double>(a.batch) * static_cast<double>(a.m) *
                       static_cast<double>(a.n);
  const int threads = threads_for(tasks, flops);
  const int64_t rows_at = cache_lines(kSystemsAtATime * a.n * kSize);
  const int64_t products_at = rows_at + cache_lines(2 * kSystemsAtATime * a.m * kSize);
  const int64_t bytes = products_at + cache_lines(2 * kSystemsAtATime * a.n * kSize);
  const Workspace workspace(bytes * threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t first = task * kSystemsAtATime;
    const int64_t count = a.batch - first < kSystemsAtATime ? a.batch - first : kSystemsAtATime;
    const int64_t at = thread_number() * bytes;
    check_systems(a, first, count, packed_rows, packed_columns,
                  Scratch<T>{workspace.at<T>(at), workspace.at<T>(at + rows_at),
                             workspace.at<T>(at + products_at)});
  }
}

template void ridge_error<float>(const RidgeErrorArgs<float>&);
template void ridge_error<double>(const RidgeErrorArgs<double>&);

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
