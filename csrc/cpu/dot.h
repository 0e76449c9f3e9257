// The dot product of the conjugate gradient kernels: its order of additions depends on n only.
#pragma once

#include "simd.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

constexpr int kSums = 4;  // independent sums, to hide the latency of an addition

template <class T>
BACKMATCH_INLINE T total_of(const Vec<T> (&sum)[kSums]) {
  return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
T dot(const T* a, const T* b, int64_t n) {
  constexpr int kWidth = kLanes<T>;
  Vec<T> sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWidth <= n; i += kSums * kWidth)
#pragma GCC unroll 4
    for (int u = 0; u < kSums; ++u) sum[u] += load(a + i + u * kWidth) * load(b + i + u * kWidth);
  for (; i + kWidth <= n; i += kWidth) sum[0] += load(a + i) * load(b + i);
  T total = total_of<T>(sum);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
