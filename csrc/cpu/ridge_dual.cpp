// d_j = Z^T D_j y_j with (D_j Z Z^T D_j + damping_j I) y_j = R_j: least squares in dual form, as two
// products around scaled_gram_solve.
#include "kernels_simd.h"
#include "ridge_products.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

template <class T>
void ridge_dual(const RidgeDualArgs<T>& a) {
  constexpr int64_t kSize = sizeof(T);
  if (a.batch == 0) return;
  const int64_t forward = product_elements<T>(a.n, a.m), back = product_elements<T>(a.m, a.n);
  const Workspace packs(kSize * (forward > back ? forward : back));
  T* packed = packs.at<T>(0);
  const int64_t gram_bytes = cache_lines(a.m * a.m * kSize);
  const Workspace solved(gram_bytes + a.batch * a.m * kSize);
  T* K = solved.at<T>(0);
  T* X = solved.at<T>(gram_bytes);
  pack_all(a.Z, a.z_col, a.z_row, a.n, a.m, packed);
  gram_rows(a.Z, a.z_row, a.z_col, a.m, a.n, packed, K);
  scaled_gram_solve<T>({a.batch, a.m, K, a.m, 1, a.D, a.d_batch, a.d_col, a.R, a.r_batch, a.r_col,
                        a.damping, a.damping_stride, X, a.info});
  pack_all(a.Z, a.z_row, a.z_col, a.m, a.n, packed);
  multiply_rows(X, a.m, a.batch, a.m, packed, a.n, a.d);
}

template void ridge_dual<float>(const RidgeDualArgs<float>&);
template void ridge_dual<double>(const RidgeDualArgs<double>&);

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
