// Moving kLanes systems into and out of the one-system-per-lane layout.
//
// Unit strides go through register transposes; a chunk that would run past the end is moved back
// to end there, which writes some entries twice and needs no tail loop.
#pragma once

#include "lane_cholesky.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

template <class T>
BACKMATCH_INLINE T* lane_entry(Vec<T>* vectors) {
  return reinterpret_cast<T*>(vectors);
}

// Loads kLanes consecutive entries of every lane and turns them into one vector per entry.
template <class T>
BACKMATCH_INLINE void lane_gather(const T* const* lane, int64_t offset,
                                  Vec<T> (&entry)[kLanes<T>]) {
#pragma GCC unroll 16
  for (int l = 0; l < kLanes<T>; ++l) entry[l] = load(lane[l] + offset);
  transpose<T>(entry);
}

// Lower triangles with unit column stride, n >= kLanes. A chunk is stored whole: what it writes
// past the diagonal lies in later block rows, which are loaded later. (Taking the four rows of a
// block row chunk by chunk, for stores in ascending order, was 5 % slower.)
template <class T>
void lane_load_rows(const T* const* lane, int64_t n, int64_t row, Vec<T>* matrix) {
  constexpr int kWidth = kLanes<T>;
  for (int64_t i = 0; i < n; ++i) {
    Vec<T>* place = matrix + lane_index(i, 0);
    for (int64_t p = 0; p <= i; p += kWidth) {
      const int64_t start = p < n - kWidth ? p : n - kWidth;
      Vec<T> entry[kWidth];
      lane_gather<T>(lane, i * row + start, entry);
#pragma GCC unroll 16
      for (int c = 0; c < kWidth; ++c) place[(start + c) * kTile] = entry[c];
    }
  }
}
// Lower triangles of small contiguous matrices, read as n * n consecutive entries, n * n >= kLanes.
template <class T>
void lane_load_flat(const T* const* lane, int64_t n, Vec<T>* matrix) {
  constexpr int kWidth = kLanes<T>;
  for (int64_t e = 0; e < n * n; e += kWidth) {
    const int64_t start = e < n * n - kWidth ? e : n * n - kWidth;
    Vec<T> entry[kWidth];
    lane_gather<T>(lane, start, entry);
    int64_t i = start / n;
    int64_t p = start % n;
    for (int c = 0; c < kWidth; ++c) {
      if (p <= i) matrix[lane_index(i, p)] = entry[c];
      if (++p == n) {
        p = 0;
        ++i;
      }
    }
  }
}

// lane[l] points at entry (0, 0) of the matrix of lane l.
template <class T>
void lane_load_matrix(const T* const* lane, int64_t n, int64_t row, int64_t column,
                      Vec<T>* matrix) {
  constexpr int kWidth = kLanes<T>;
  if (column == 1 && n >= kWidth) {
    lane_load_rows(lane, n, row, matrix);
  } else if (column == 1 && row == n && n * n >= kWidth) {
    lane_load_flat(lane, n, matrix);
  } else {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t p = 0; p <= i; ++p)
        for (int l = 0; l < kWidth; ++l)
          lane_entry<T>(matrix + lane_index(i, p))[l] = lane[l][i * row + p * column];
  }
}

// One right-hand side of every lane into to[0], to[step], ...
template <class T>
void lane_load_vector(const T* const* lane, int64_t n, int64_t stride, Vec<T>* to, int64_t step) {
  constexpr int kWidth = kLanes<T>;
  if (stride == 1 && n >= kWidth) {
    for (int64_t p = 0; p < n; p += kWidth) {
      const int64_t start = p < n - kWidth ? p : n - kWidth;
      Vec<T> entry[kWidth];
      lane_gather<T>(lane, start, entry);
#pragma GCC unroll 16
      for (int c = 0; c < kWidth; ++c) to[(start + c) * step] = entry[c];
    }
  } else {
    for (int l = 0; l < kWidth; ++l)
      for (int64_t p = 0; p < n; ++p) lane_entry<T>(to + p * step)[l] = lane[l][p * stride];
  }
}

// Fewer entries than lanes, consecutive lanes n entries apart: whole vectors are stored in
// ascending order, each overwriting what the one before wrote too much; the last ones, which
// would leave the lanes' memory, entry by entry.
template <class T>
void lane_store_short(const Vec<T>* from, int64_t step, int64_t n, T* first, int64_t count) {
  constexpr int kWidth = kLanes<T>;
  Vec<T> entry[kWidth];
  for (int c = 0; c < kWidth; ++c) entry[c] = c < n ? from[c * step] : Vec<T>{};
  transpose<T>(entry);
  for (int64_t l = 0; l < count; ++l) {
    if (l * n + kWidth <= count * n) {
      store(first + l * n, entry[l]);
    } else {
      for (int64_t p = 0; p < n; ++p) first[l * n + p] = entry[l][p];
    }
  }
}

// The way back for the first `count` lanes: entry p of lane l goes to first[l * lane + p * stride].
template <class T>
void lane_store_vector(const Vec<T>* from, int64_t step, int64_t n, T* first, int64_t lane,
                       int64_t stride, int64_t count) {
  constexpr int kWidth = kLanes<T>;
  if (stride == 1 && n >= kWidth) {
    for (int64_t p = 0; p < n; p += kWidth) {
      const int64_t start = p < n - kWidth ? p : n - kWidth;
      Vec<T> entry[kWidth];
#pragma GCC unroll 16
      for (int c = 0; c < kWidth; ++c) entry[c] = from[(start + c) * step];
      transpose<T>(entry);
      for (int64_t l = 0; l < count; ++l) store(first + l * lane + start, entry[l]);
    }
  } else if (stride == 1 && lane == n) {
    lane_store_short<T>(from, step, n, first, count);
  } else {
    for (int64_t l = 0; l < count; ++l)
      for (int64_t p = 0; p < n; ++p) first[l * lane + p * stride] = from[p * step][l];
  }
}

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
