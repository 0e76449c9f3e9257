// The two operators of the family that conjugate gradient multiplies by, for all systems at once:
// q = Z^T (w_j * Z p) and q = D_j K D_j p + damping_j p.
//
// A few systems at a time go through both products while they are in cache; see product.h.
#include "kernels_simd.h"
#include "ridge_products.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

namespace {

int64_t rows_of(int64_t block, int64_t batch) {
  const int64_t left = batch - block * kRowsAtATime;
  return left < kRowsAtATime ? left : kRowsAtATime;
}

}  // namespace

template <class T>
void ridge_normal(const RidgeNormalArgs<T>& a) {
  constexpr int64_t kSize = sizeof(T);
  if (a.batch == 0) return;
  const int64_t back_at = cache_lines(product_elements<T>(a.n, a.m) * kSize);
  const Workspace packs(back_at + product_elements<T>(a.m, a.n) * kSize);
  pack_all(a.Z, a.z_col, a.z_row, a.n, a.m, packs.at<T>(0));
  pack_all(a.Z, a.z_row, a.z_col, a.m, a.n, packs.at<T>(back_at));
  const int64_t tasks = row_blocks(a.batch);
  const int threads = threads_for(tasks, 4 * static_cast<double>(a.batch) *
                                             static_cast<double>(a.m) * static_cast<double>(a.n));
  const int64_t bytes = cache_lines(kRowsAtATime * a.m * kSize);
  const Workspace scratch(bytes * threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t first = task * kRowsAtATime, count = rows_of(task, a.batch);
    T* rows = scratch.at<T>(thread_number() * bytes);
    multiply<T>(a.P + first * a.n, a.n, count, a.n, packs.at<T>(0), rows, a.m, a.m);
    for (int64_t j = 0; a.w != nullptr && j < count; ++j)
      for (int64_t i = 0; i < a.m; ++i)
        rows[j * a.m + i] *= a.w[(first + j) * a.w_batch + i * a.w_col];
    multiply<T>(rows, a.m, count, a.m, packs.at<T>(back_at), a.Q + first * a.n, a.n, a.n);
  }
}

template <class T>
void scaled_gram_product(const ScaledGramProductArgs<T>& a) {
  constexpr int64_t kSize = sizeof(T);
  if (a.batch == 0) return;
  const Workspace packs(product_elements<T>(a.n, a.n) * kSize);
  pack_all(a.K, a.k_row, a.k_col, a.n, a.n, packs.at<T>(0));
  const int64_t tasks = row_blocks(a.batch);
  const int threads = threads_for(tasks, 2 * static_cast<double>(a.batch) *
                                             static_cast<double>(a.n) * static_cast<double>(a.n));
  const int64_t bytes = cache_lines(kRowsAtATime * a.n * kSize);
  const Workspace scratch(bytes * threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t first = task * kRowsAtATime, count = rows_of(task, a.batch);
    T* rows = scratch.at<T>(thread_number() * bytes);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < a.n; ++i)
        rows[j * a.n + i] = a.P[(first + j) * a.n + i] * a.D[(first + j) * a.d_batch + i * a.d_col];
    multiply<T>(rows, a.n, count, a.n, packs.at<T>(0), a.Q + first * a.n, a.n, a.n);
    for (int64_t j = 0; j < count; ++j) {
      const T damping = a.damping[(first + j) * a.damping_stride];
      for (int64_t i = 0; i < a.n; ++i) {
        const int64_t at = (first + j) * a.n + i;
        a.Q[at] = a.Q[at] * a.D[(first + j) * a.d_batch + i * a.d_col] + damping * a.P[at];
      }
    }
  }
}

template void ridge_normal<float>(const RidgeNormalArgs<float>&);
template void ridge_normal<double>(const RidgeNormalArgs<double>&);
template void scaled_gram_product<float>(const ScaledGramProductArgs<float>&);
template void scaled_gram_product<double>(const ScaledGramProductArgs<double>&);

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
