// Symmetric squares in row-major order: the upper triangle from the lower one, in registers.
#pragma once

#include "simd.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

// The block of rows i .. and columns p .., one vector wide, all of it below the diagonal.
template <class T>
BACKMATCH_INLINE void mirror_block(T* square, int64_t pitch, int64_t i, int64_t p) {
  constexpr int kWidth = kLanes<T>;
  Vec<T> entry[kWidth];
#pragma GCC unroll 16
  for (int l = 0; l < kWidth; ++l) entry[l] = load(square + (i + l) * pitch + p);
  transpose<T>(entry);
#pragma GCC unroll 16
  for (int l = 0; l < kWidth; ++l) store(square + (p + l) * pitch + i, entry[l]);
}

// The block whose corner is entry (i, i): lane c of row l comes from the mirror image if c > l.
template <class T>
BACKMATCH_INLINE void mirror_corner(T* square, int64_t pitch, int64_t i) {
  constexpr int kWidth = kLanes<T>;
  IntVec<T> lane{};
  for (int l = 0; l < kWidth; ++l) lane[l] = l;
  Vec<T> entry[kWidth];
  T* place = square + i * pitch + i;
#pragma GCC unroll 16
  for (int l = 0; l < kWidth; ++l) entry[l] = load(place + l * pitch);
  transpose<T>(entry);
  for (int l = 0; l < kWidth; ++l) {
    const IntVec<T> upper = lane > (IntVec<T>{} + static_cast<typename Simd<T>::Index>(l));
    store(place + l * pitch, upper ? entry[l] : load(place + l * pitch));
  }
}

// Fills the upper triangle. Blocks that would run past the end are moved back to end there: what
// they write twice is the same both times.
template <class T>
void mirror_lower(T* square, int64_t n, int64_t pitch) {
  constexpr int kWidth = kLanes<T>;
  if (n < 2 * kWidth) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t p = 0; p < i; ++p) square[p * pitch + i] = square[i * pitch + p];
    return;
  }
  for (int64_t first = 0; first < n; first += kWidth) {
    const int64_t i = first < n - kWidth ? first : n - kWidth;
    for (int64_t p = 0; p < i; p += kWidth)
      mirror_block(square, pitch, i, p < i - kWidth ? p : i - kWidth);
    mirror_corner(square, pitch, i);
  }
}

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
