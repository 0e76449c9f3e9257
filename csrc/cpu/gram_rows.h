// One weighted Gram matrix by rows: those with w == 0 are skipped.
//
// The rows with w != 0 are taken kGramRows at a time. Their weighted copy, cut into strips of
// kGramStrip columns, is the left factor; panels of kGramColumns columns of Z, which all threads
// share, are the right one. A panel stays in the first-level cache while the strips stream past it.
// Only vectors that touch the lower triangle are computed.
// Measured and left: weighted panels against shared strips, 15 % slower for n = 512 in float64.
#pragma once

#include <cstddef>

#include "../kernels.h"
#include "mirror.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

constexpr int kGramVectors = kBlockVectors;
constexpr int kGramStrip = kBlockScalars;
constexpr int64_t kGramRows = 256;

template <class T>
constexpr int kGramColumns = kGramVectors* kLanes<T>;

BACKMATCH_INLINE int64_t gram_order(int64_t n) {
  return (n + kGramStrip - 1) / kGramStrip * kGramStrip;
}

template <class T>
BACKMATCH_INLINE int64_t gram_pitch(int64_t n) {
  return (n + kGramColumns<T> - 1) / kGramColumns<T> * kGramColumns<T>;
}

// Vectors of the panel at column p that rows i .. i + kGramStrip need.
template <class T>
BACKMATCH_INLINE int64_t gram_vectors(int64_t i, int64_t p) {
  const int64_t columns = i + kGramStrip - p;
  const int64_t vectors = (columns + kLanes<T> - 1) / kLanes<T>;
  return vectors < kGramVectors ? vectors : kGramVectors;
}

// Scratch of one thread: sums is gram_order rows of gram_pitch entries, strips are the weighted
// ones, listed and weights belong to the rows of one round.
template <class T>
struct GramScratch {
  T* sums;
  T* strips;
  int64_t* listed;
  T* weights;
};

// Lists up to kGramRows rows with w != 0 from row `i` on and moves `i` past them. Weights are
// contiguous in a row.
template <class T>
int64_t list_rows(const WeightedGramArgs<T>& a, int64_t system, int64_t& i, GramScratch<T> s) {
  const T* w = a.w + system * a.w_batch;
  int64_t count = 0;
  for (; i < a.m && count < kGramRows; ++i) {
    const T weight = w[i];
    s.listed[count] = i;
    s.weights[count] = weight;
    count += weight != T(0);
  }
  return count;
}

// A row of a strip, at any address that is aligned for one element.
template <class T>
struct Strip {
  typedef T Row __attribute__((vector_size(kGramStrip * sizeof(T)), aligned(sizeof(T)), may_alias));
};

// strip[q * kGramStrip + c] = w_q Z[listed[q], column + c]; a strip never leaves its panel.
template <class T>
void weigh_strip(const T* panels, int64_t m, int64_t column, int64_t count, GramScratch<T> s) {
  constexpr int64_t kWide = kGramColumns<T>;
  const T* from = panels + column / kWide * m * kWide + column % kWide;
  T* strip = s.strips + column * kGramRows;
  for (int64_t q = 0; q < count; ++q, strip += kGramStrip)
    *reinterpret_cast<typename Strip<T>::Row*>(strip) =
        *reinterpret_cast<const typename Strip<T>::Row*>(from + s.listed[q] * kWide) * s.weights[q];
}

// tile (kGramStrip rows of M vectors, `pitch` apart) += strip^T panel, or = if kFirst.
template <class T, int M, bool kFirst>
void add_products(const T* strip, const T* panel, const int64_t* listed, int64_t count, T* tile,
                  int64_t pitch) {
  Vec<T> sum[kGramStrip][M];
#pragma GCC unroll 8
  for (int c = 0; c < kGramStrip; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < M; ++v)
      sum[c][v] = kFirst ? Vec<T>{} : load(tile + c * pitch + v * kLanes<T>);
  for (int64_t q = 0; q < count; ++q, strip += kGramStrip) {
    const T* row = panel + listed[q] * kGramColumns<T>;
    Vec<T> z[M];
#pragma GCC unroll 4
    for (int v = 0; v < M; ++v) z[v] = load(row + v * kLanes<T>);
#pragma GCC unroll 8
    for (int c = 0; c < kGramStrip; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < M; ++v) sum[c][v] += z[v] * strip[c];
  }
#pragma GCC unroll 8
  for (int c = 0; c < kGramStrip; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < M; ++v) store(tile + c * pitch + v * kLanes<T>, sum[c][v]);
}

// The first M vectors of the panel at column p times the strips begin .. end.
template <class T, int M, bool kFirst>
BACKMATCH_INLINE void add_strips(const T* panel, int64_t p, int64_t begin, int64_t end,
                                 int64_t pitch, int64_t count, GramScratch<T> s) {
  for (int64_t i = begin; i < end; i += kGramStrip)
    add_products<T, M, kFirst>(s.strips + i * kGramRows, panel, s.listed, count,
                               s.sums + i * pitch + p, pitch);
}

// Adds the listed rows to every tile that touches the lower triangle. The last columns, and the
// strips at a panel's corner, need one vector of the panel only.
template <class T, bool kFirst>
void add_rows(const T* panels, int64_t m, int64_t n, int64_t count, GramScratch<T> s) {
  const int64_t order = gram_order(n);
  const int64_t pitch = gram_pitch<T>(n);
  for (int64_t i = 0; i < order; i += kGramStrip) weigh_strip(panels, m, i, count, s);
  for (int64_t p = 0; p < order; p += kGramColumns<T>) {
    const int64_t corner = p + kLanes<T> / kGramStrip * kGramStrip;
    const int64_t narrow = corner < order ? corner : order;
    add_strips<T, 1, kFirst>(panels + p * m, p, p, narrow, pitch, count, s);
    add_strips<T, kGramVectors, kFirst>(panels + p * m, p, narrow, order, pitch, count, s);
  }
}

// Z in panels: entry (q, p + c) of Z at panels[p * m + q * kGramColumns + c], zeros past column n.
template <class T>
void gram_by_rows(const WeightedGramArgs<T>& a, int64_t system, const T* panels,
                  GramScratch<T> s) {
  int64_t i = 0;
  int64_t count = list_rows(a, system, i, s);
  add_rows<T, true>(panels, a.m, a.n, count, s);
  while (i < a.m) {
    count = list_rows(a, system, i, s);
    add_rows<T, false>(panels, a.m, a.n, count, s);
  }
  T* G = a.G + system * a.n * a.n;
  for (int64_t row = 0; row < a.n; ++row) {
    T* to = G + row * a.n;
    const T* sums = s.sums + row * gram_pitch<T>(a.n);
    __builtin_memcpy(to, sums, static_cast<size_t>(row + 1) * sizeof(T));
    to[row] += a.damping[system * a.damping_stride];
  }
  mirror_lower(G, a.n, a.n);
}

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
