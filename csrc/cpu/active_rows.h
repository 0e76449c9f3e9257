// The active entries of one system's slopes, and rows of a shared matrix cut down to them.
//
// Rows are read a vector at a time: `pick` brings the active entries of a vector to its front,
// `start` counts those before it, so that storing the vectors in ascending order leaves the active
// entries side by side. Levels without such a permutation take them one by one.
#pragma once

#include "simd.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

// Length of a row that is read and written in whole vectors.
template <class T>
BACKMATCH_INLINE int64_t whole_vectors(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// `index` and `scale` hold `count` entries and room for a vector more, `start` and `pick` one item
// per vector of a row.
template <class T>
struct ActiveRows {
  int64_t count;
  int32_t* index;
  T* scale;
  int32_t* start;
  int32_t* pick;
};

// Separate loops: the compiler makes vectors of the first one only.
template <class T>
int64_t count_active(const T* slopes, int64_t n, int64_t stride) {
  int64_t count = 0;
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) count += slopes[i] != T(0);
  } else {
    for (int64_t i = 0; i < n; ++i) count += slopes[i * stride] != T(0);
  }
  return count;
}

// Appends `size` slopes that start at entry `first`, at most one vector of them.
template <class T>
BACKMATCH_INLINE void list_some(const T* slopes, int64_t stride, int64_t first, int64_t size,
                                ActiveRows<T>& rows) {
  constexpr int kPerEntry = sizeof(T) / 4;
  int32_t* pick = rows.pick + first * kPerEntry;
  int32_t* index = rows.index + rows.count;
  T* scale = rows.scale + rows.count;
  int32_t kept = 0;
  for (int32_t l = 0; l < size; ++l) {
    const T slope = slopes[(first + l) * stride];
    for (int w = 0; w < kPerEntry; ++w) pick[kept * kPerEntry + w] = l * kPerEntry + w;
    index[kept] = static_cast<int32_t>(first) + l;
    scale[kept] = slope;
    kept += slope != T(0);
  }
  for (int32_t w = kept * kPerEntry; w < kWords; ++w) pick[w] = 0;
  rows.count += kept;
}

// The same for a whole vector of slopes side by side.
template <class T>
BACKMATCH_INLINE void list_vector(const T* slopes, int64_t first, ActiveRows<T>& rows) {
#if defined(__AVX512F__)
  const Vec<T> slope = load(slopes + first);
  const __m512i zero = _mm512_setzero_si512();
  const __m512i word = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  int32_t* pick = rows.pick + first * (kWords / kLanes<T>);
  int32_t* index = rows.index + rows.count;
  if constexpr (sizeof(T) == 4) {
    const __m512i at = _mm512_add_epi32(word, _mm512_set1_epi32(static_cast<int32_t>(first)));
    const __mmask16 kept = _mm512_cmp_ps_mask((__m512)slope, (__m512)zero, _CMP_NEQ_UQ);
    _mm512_storeu_si512(pick, _mm512_maskz_compress_epi32(kept, word));
    _mm512_storeu_si512(index, _mm512_maskz_compress_epi32(kept, at));
    store(rows.scale + rows.count, (Vec<T>)_mm512_maskz_compress_ps(kept, (__m512)slope));
    rows.count += __builtin_popcount(kept);
  } else {
    const __mmask8 kept = _mm512_cmp_pd_mask((__m512d)slope, (__m512d)zero, _CMP_NEQ_UQ);
    _mm512_storeu_si512(pick, _mm512_maskz_compress_epi64(kept, word));
    const __m256i at = _mm256_add_epi32(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0),
                                        _mm256_set1_epi32(static_cast<int32_t>(first)));
    _mm256_storeu_si256((__m256i*)index, _mm256_maskz_compress_epi32(kept, at));
    store(rows.scale + rows.count, (Vec<T>)_mm512_maskz_compress_pd(kept, (__m512d)slope));
    rows.count += __builtin_popcount(kept);
  }
#else
  list_some(slopes, 1, first, kLanes<T>, rows);
#endif
}

template <class T>
void list_active(const T* slopes, int64_t n, int64_t stride, ActiveRows<T>& rows) {
  constexpr int kWidth = kLanes<T>;
  rows.count = 0;
  for (int64_t first = 0; first < n; first += kWidth) {
    rows.start[first / kWidth] = static_cast<int32_t>(rows.count);
    const int64_t size = n - first < kWidth ? n - first : kWidth;
    if (stride == 1 && size == kWidth) {
      list_vector(slopes, first, rows);
    } else {
      list_some(slopes, stride, first, size, rows);
    }
  }
}

// The vector of a row that holds active entry q; 0 where there is none.
template <class T>
BACKMATCH_INLINE int64_t vector_of(const ActiveRows<T>& rows, int64_t q) {
  return q < 0 ? 0 : rows.index[q] / kLanes<T>;
}

// The active entries begin .. end of R rows, row r into out[r * room + begin ..]; other entries
// there, up to a vector past the last active one, may change too. Rows are readable in whole
// vectors and read up to vector `last`, that of entry end - 1 or a later one: packs pass the same
// for all lanes, whose loops then all take the same turns.
template <class T, int R>
BACKMATCH_INLINE void keep_active(const ActiveRows<T>& rows, const T* const* from, int64_t begin,
                                  int64_t end, int64_t last, T* out, int64_t room) {
  if constexpr (kPermutes) {
    for (int64_t c = vector_of(rows, begin); c <= last; ++c) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        store(out + r * room + rows.start[c],
              permute_words<T>(load(from[r] + c * kLanes<T>), rows.pick + c * kWords));
    }
  } else {
    for (int64_t q = begin; q < end; ++q)
      for (int r = 0; r < R; ++r) out[r * room + q] = from[r][rows.index[q]];
  }
}

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
