// How the rows of slopes look: what the choice between the routes of the ridge family needs.
#include "kernels_simd.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

template <class T>
RidgeCounts ridge_counts(const RidgeCountsArgs<T>& a) {
  RidgeCounts out{0, 0, 0, 0, true};
  for (int64_t j = 0; j < a.batch; ++j) {
    const T* D = a.D + j * a.d_batch;
    int64_t active = 0, ones = 0;
    for (int64_t i = 0; i < a.m; ++i) {
      const T slope = D[i * a.d_col];
      active += slope != T(0);
      ones += slope == T(1);
    }
    const double on = static_cast<double>(active);
    const double least = active < a.m - active ? on : static_cast<double>(a.m) - on;
    out.active += on;
    out.dual += on * on * (on / 6 + 2);
    out.complement += least * least * (least / 6 + 2);
    if (active > out.most) out.most = active;
    out.binary = out.binary && ones == active;
  }
  return out;
}

template RidgeCounts ridge_counts<float>(const RidgeCountsArgs<float>&);
template RidgeCounts ridge_counts<double>(const RidgeCountsArgs<double>&);

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
