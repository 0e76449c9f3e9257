// d_j = argmin |Z d - R_j|^2 / 2 + damping |d|^2 / 2: one factor of the smaller of Z^T Z and Z Z^T
// for all systems.
#include "kernels_simd.h"
#include "ridge_products.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

namespace {

// to (columns x rows, contiguous) = the transpose of from (rows x columns, contiguous)
template <class T>
void transpose_copy(const T* from, int64_t rows, int64_t columns, T* to) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) to[c * rows + r] = from[r * columns + c];
}

template <class T>
void spread_info(const RidgeSharedArgs<T>& a, int32_t info) {
  for (int64_t j = 0; j < a.batch; ++j) a.info[j] = info;
}

// d = (R (Z Z^T + damping I)^-1) Z
template <class T>
void solve_wide(const RidgeSharedArgs<T>& a, T* packed, T* matrix, T* X, T* rows) {
  int32_t info;
  pack_all(a.Z, a.z_col, a.z_row, a.n, a.m, packed);
  gram_rows(a.Z, a.z_row, a.z_col, a.m, a.n, packed, matrix);
  spd_solve<T>({1, a.m, a.batch, matrix, 0, a.m, 1, a.damping, 0, a.R, 0, a.r_col, a.r_batch, X,
                &info});
  transpose_copy(X, a.m, a.batch, rows);
  pack_all(a.Z, a.z_row, a.z_col, a.m, a.n, packed);
  multiply_rows(rows, a.m, a.batch, a.m, packed, a.n, a.d);
  spread_info(a, info);
}

// d = (R Z) (Z^T Z + damping I)^-1
template <class T>
void solve_tall(const RidgeSharedArgs<T>& a, T* packed, T* matrix, T* X, T* rows) {
  int32_t info;
  pack_all(a.Z, a.z_row, a.z_col, a.m, a.n, packed);
  gram_rows(a.Z, a.z_col, a.z_row, a.n, a.m, packed, matrix);
  const T* R = a.R;
  int64_t stride = a.r_batch;
  if (a.r_col != 1) {
    for (int64_t j = 0; j < a.batch; ++j)
      for (int64_t i = 0; i < a.m; ++i) rows[j * a.m + i] = R[j * a.r_batch + i * a.r_col];
    R = rows;
    stride = a.m;
  }
  multiply_rows(R, stride, a.batch, a.m, packed, a.n, a.d);
  spd_solve<T>({1, a.n, a.batch, matrix, 0, a.n, 1, a.damping, 0, a.d, 0, 1, a.n, X, &info});
  transpose_copy(X, a.n, a.batch, a.d);
  spread_info(a, info);
}

}  // namespace

template <class T>
void ridge_shared(const RidgeSharedArgs<T>& a) {
  constexpr int64_t kSize = sizeof(T);
  if (a.batch == 0) return;
  const int64_t forward = product_elements<T>(a.n, a.m), back = product_elements<T>(a.m, a.n);
  const bool wide = a.n > a.m;
  const int64_t order = wide ? a.m : a.n;
  const int64_t packed_bytes = cache_lines(kSize * (forward > back ? forward : back));
  const int64_t X_at = packed_bytes + cache_lines(order * order * kSize);
  const int64_t rows_at = X_at + cache_lines(order * a.batch * kSize);
  const Workspace memory(rows_at + a.batch * a.m * kSize);
  (wide ? solve_wide<T> : solve_tall<T>)(a, memory.at<T>(0), memory.at<T>(packed_bytes),
                                         memory.at<T>(X_at), memory.at<T>(rows_at));
}

template void ridge_shared<float>(const RidgeSharedArgs<float>&);
template void ridge_shared<double>(const RidgeSharedArgs<double>&);

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
