// Weighted Gram matrices of many systems at once, as one matrix product.
//
// Entry (a, b) of G_j is the sum over rows i of w_ji (z_ia z_ib): the products in brackets, one for
// every pair b <= a, serve all systems. Pairs are numbered row by row over the lower triangle and
// taken kPairs at a time, rows kPairRows at a time, so that a block of products stays in the
// first-level cache while the weights of all systems stream past it. The sums of a system are
// kept side by side at the start of its own result and spread over the square at the end.
// A system's sums do not depend on which others are computed beside them.
#pragma once

#include <cstddef>

#include "../kernels.h"
#include "mirror.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

constexpr int64_t kPairRows = 160;  // 64: a third slower, the sums move too often
constexpr int kPairVectors = kBlockVectors;
constexpr int kPairSystems = kBlockScalars;

template <class T>
constexpr int kPairs = kPairVectors* kLanes<T>;

BACKMATCH_INLINE int64_t pair_count(int64_t n) { return n * (n + 1) / 2; }

// Blocks of pairs; a block's products take kPairPitch entries a row, a vector of them to write past
// the last one.
template <class T>
BACKMATCH_INLINE int64_t pair_blocks(int64_t n) {
  return (pair_count(n) + kPairs<T> - 1) / kPairs<T>;
}
template <class T>
constexpr int64_t kPairPitch = kPairs<T> + kLanes<T>;
template <class T>
constexpr int64_t kPairScratch = kPairRows* kPairPitch<T>;

// Row and column of a pair.
struct Pair {
  int64_t row, column;
};

BACKMATCH_INLINE Pair pair_at(int64_t number) {
  int64_t row = 0;
  while (pair_count(row + 1) <= number) ++row;
  return {row, number - pair_count(row)};
}

// products[i * kPairPitch + t] = z_ia z_ib for `size` pairs from `first` on, the pairs of one row
// of the triangle after the other: whole vectors, each overwriting what the one before wrote too
// much.
template <class T>
void form_products(const T* z, int64_t pitch, int64_t rows, Pair first, int64_t size, T* products) {
  for (int64_t t = 0; t < size;) {
    const int64_t run = first.row + 1 - first.column;
    const int64_t stop = t + run < size ? t + run : size;
    for (int64_t u = t; u < stop; u += kLanes<T>) {
      const T* left = z + first.row;
      const T* right = z + first.column + u - t;
      for (int64_t i = 0; i < rows; ++i)
        store(products + i * kPairPitch<T> + u, load(right + i * pitch) * left[i * pitch]);
    }
    t = stop;
    first = {first.row + 1, 0};
  }
}

// sums[s] (M vectors) of S systems += their weights times M vectors of products, or = if fresh.
template <class T, int S, int M>
BACKMATCH_INLINE void add_pairs(const T* products, const T* const* weights, int64_t rows,
                                bool fresh, T* const* sums) {
  Vec<T> sum[S][M];
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < M; ++v) sum[s][v] = fresh ? Vec<T>{} : load(sums[s] + v * kLanes<T>);
  for (int64_t i = 0; i < rows; ++i, products += kPairPitch<T>) {
    Vec<T> pair[M];
#pragma GCC unroll 4
    for (int v = 0; v < M; ++v) pair[v] = load(products + v * kLanes<T>);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
      for (int v = 0; v < M; ++v) sum[s][v] += pair[v] * weights[s][i];
  }
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < M; ++v) store(sums[s] + v * kLanes<T>, sum[s][v]);
}

// The same for `size` pairs. Sums that fill no whole vectors, those of the last block, are kept
// in a copy meanwhile.
template <class T, int S>
void add_block(const T* products, const T* const* weights, int64_t rows, int64_t size, bool fresh,
               T* const* sums) {
  if (size == kPairs<T>) {
    add_pairs<T, S, kPairVectors>(products, weights, rows, fresh, sums);
    return;
  }
  T copy[S][kPairs<T>] = {};
  T* copies[S];
  for (int s = 0; s < S; ++s) {
    copies[s] = copy[s];
    for (int64_t t = 0; !fresh && t < size; ++t) copy[s][t] = sums[s][t];
  }
  if (size <= kLanes<T>) {
    add_pairs<T, S, 1>(products, weights, rows, fresh, copies);
  } else {
    add_pairs<T, S, kPairVectors>(products, weights, rows, fresh, copies);
  }
  for (int s = 0; s < S; ++s)
    for (int64_t t = 0; t < size; ++t) sums[s][t] = copy[s][t];
}

// Rows i .. i + rows of S systems, pairs first .. first + size; weights are contiguous in a row.
template <class T, int S>
BACKMATCH_INLINE void add_systems(const WeightedGramArgs<T>& a, const T* products,
                                  const int64_t* listed, int64_t i, int64_t rows, int64_t first,
                                  int64_t size) {
  const T* weights[S];
  T* sums[S];
  for (int s = 0; s < S; ++s) {
    weights[s] = a.w + listed[s] * a.w_batch + i;
    sums[s] = a.G + listed[s] * a.n * a.n + first;
  }
  add_block<T, S>(products, weights, rows, size, i == 0, sums);
}

// Z as rows of `pitch` entries, readable a vector past the end.
template <class T>
struct PairRows {
  const T* rows;
  int64_t pitch;
};

// Pairs block * kPairs .. of the systems listed[0 .. count].
template <class T>
void sum_pairs(const WeightedGramArgs<T>& a, const PairRows<T>& z, int64_t block,
               const int64_t* listed, int64_t count, T* products) {
  const int64_t first = block * kPairs<T>;
  const int64_t rest = pair_count(a.n) - first;
  const int64_t size = rest < kPairs<T> ? rest : kPairs<T>;
  const Pair pair = pair_at(first);
  int64_t i = 0;
  do {
    const int64_t rows = a.m - i < kPairRows ? a.m - i : kPairRows;
    form_products(z.rows + i * z.pitch, z.pitch, rows, pair, size, products);
    int64_t j = 0;
    for (; j + kPairSystems <= count; j += kPairSystems)
      add_systems<T, kPairSystems>(a, products, listed + j, i, rows, first, size);
    for (; j + 2 <= count; j += 2) add_systems<T, 2>(a, products, listed + j, i, rows, first, size);
    if (j < count) add_systems<T, 1>(a, products, listed + j, i, rows, first, size);
    i += kPairRows;
  } while (i < a.m);
}

// Spreads the sums of a system over its square, from the last row to the first.
template <class T>
void spread_pairs(const WeightedGramArgs<T>& a, int64_t system) {
  T* G = a.G + system * a.n * a.n;
  const T damping = a.damping[system * a.damping_stride];
  for (int64_t row = a.n - 1; row >= 0; --row) {
    T* to = G + row * a.n;
    __builtin_memmove(to, G + pair_count(row), static_cast<size_t>(row + 1) * sizeof(T));
    to[row] += damping;
  }
  mirror_lower(G, a.n, a.n);
}

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
