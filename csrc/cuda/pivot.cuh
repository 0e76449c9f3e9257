// What a pivot must be, and what a failed system is filled with.
#pragma once

#include <platform.cuh>

#include <limits>

namespace backmatch::cuda {

template <class T>
constexpr T kLargest = std::numeric_limits<T>::max();
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

template <class T>
__device__ __forceinline__ bool is_good_pivot(T pivot) {
  return pivot > T(0) && pivot <= kLargest<T>;  // false for NaN and infinity
}

}  // namespace backmatch::cuda
