// d_j = Z^T D_j y_j with (D_j Z Z^T D_j + damping_j I) y_j = R_j: least squares in dual form.
//
// K = Z Z^T (lower triangle) and d = X Z are products around scaled_gram_solve. They are here, and
// not left to a BLAS, because for a layer's sizes the calls, the second half of K and the passes
// over memory in between cost as much as the products themselves.
#include "kernels_simd.h"
#include "product.h"
#include "workspace.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

namespace {

// Rows of one task. A multiple of kBlockScalars.
constexpr int64_t kRowsAtATime = 32;

template <class T>
int64_t row_blocks(int64_t rows) {
  return (rows + kRowsAtATime - 1) / kRowsAtATime;
}

// Rows of A made contiguous where they are not.
template <class T>
const T* contiguous_rows(const T* A, int64_t row, int64_t column, int64_t rows, int64_t depth,
                         T* copy, int64_t* copy_row) {
  if (column == 1) {
    *copy_row = row;
    return A;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t q = 0; q < depth; ++q) copy[r * depth + q] = A[r * row + q * column];
  *copy_row = depth;
  return copy;
}

// The lower triangle of Z Z^T, whole panels of it: what lies above is not read by anyone.
template <class T>
void gram_rows(const RidgeDualArgs<T>& a, const T* packed, T* K) {
  const double size = static_cast<double>(a.m);
  const int threads =
      threads_for(row_blocks<T>(a.m), size * size * static_cast<double>(a.n));
  const int64_t bytes = a.z_col == 1 ? 0 : cache_lines(kRowsAtATime * a.n * sizeof(T));
  const Workspace copies(bytes * threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t block = row_blocks<T>(a.m) - 1; block >= 0; --block) {
    const int64_t first = block * kRowsAtATime;
    const int64_t rows = a.m - first < kRowsAtATime ? a.m - first : kRowsAtATime;
    int64_t stride;
    const T* from = contiguous_rows(a.Z + first * a.z_row, a.z_row, a.z_col, rows, a.n,
                                    copies.at<T>(thread_number() * bytes), &stride);
    multiply<T>(from, stride, rows, a.n, packed, K + first * a.m, a.m, first + rows);
  }
}

template <class T>
void expand_rows(const RidgeDualArgs<T>& a, const T* X, const T* packed) {
  const int64_t blocks = row_blocks<T>(a.batch);
  const double flops = 2 * static_cast<double>(a.batch) * static_cast<double>(a.m) *
                       static_cast<double>(a.n);
  const int threads = threads_for(blocks, flops);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kRowsAtATime;
    const int64_t rows = a.batch - first < kRowsAtATime ? a.batch - first : kRowsAtATime;
    multiply<T>(X + first * a.m, a.m, rows, a.m, packed, a.d + first * a.n, a.n, a.n);
  }
}

template <class T>
void pack_all(const T* B, int64_t row, int64_t column, int64_t depth, int64_t columns, T* packed) {
  const int64_t panels = product_panels<T>(columns);
  const int threads =
      threads_for(panels, static_cast<double>(depth) * static_cast<double>(columns));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < panels; ++p) pack_product(B, row, column, depth, columns, p, packed);
}

}  // namespace

template <class T>
void ridge_dual(const RidgeDualArgs<T>& a) {
  constexpr int64_t kSize = sizeof(T);
  if (a.batch == 0) return;
  const int64_t packed_forward = product_elements<T>(a.n, a.m);
  const int64_t packed_back = product_elements<T>(a.m, a.n);
  const Workspace packs(kSize * (packed_forward > packed_back ? packed_forward : packed_back));
  T* packed = packs.at<T>(0);
  const int64_t gram_bytes = cache_lines(a.m * a.m * kSize);
  const Workspace solved(gram_bytes + a.batch * a.m * kSize);
  T* K = solved.at<T>(0);
  T* X = solved.at<T>(gram_bytes);
  pack_all(a.Z, a.z_col, a.z_row, a.n, a.m, packed);
  gram_rows(a, packed, K);
  scaled_gram_solve<T>({a.batch, a.m, K, a.m, 1, a.D, a.d_batch, a.d_col, a.R, a.r_batch, a.r_col,
                        a.damping, a.damping_stride, X, a.info});
  pack_all(a.Z, a.z_row, a.z_col, a.m, a.n, packed);
  expand_rows(a, X, packed);
}

template void ridge_dual<float>(const RidgeDualArgs<float>&);
template void ridge_dual<double>(const RidgeDualArgs<double>&);

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
