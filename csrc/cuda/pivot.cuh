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

// Kernels that keep 1 / D multiply a system whose diagonal has an entry in this range, but none
// beyond its mirror image, by kLift: 1 / D then exists down to the smallest pivot there is. The
// right-hand sides, or X in the end, are multiplied as well.
template <class T>
constexpr T kTinyDiagonal = sizeof(T) == 4 ? T(0x1p-100) : T(0x1p-900);
template <class T>
constexpr T kHugeDiagonal = T(1) / kTinyDiagonal<T>;
template <class T>
constexpr T kLift = sizeof(T) == 4 ? T(0x1p24) : T(0x1p54);

template <class T>
__device__ __forceinline__ bool is_tiny_diagonal(T entry) {
  return entry > T(0) && entry < kTinyDiagonal<T>;
}

}  // namespace backmatch::cuda
