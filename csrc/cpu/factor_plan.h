// Which of the two factorisations serves a group of systems, and the scratch that either needs.
// Both give the same bits, so the choice is free to depend on the batch.
#pragma once

#include "lane_cholesky.h"
#include "tile_cholesky.h"
#include "workspace.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

// Largest order factored in lanes: where a pack stops paying even when every thread has one.
constexpr int64_t kLaneOrder = 256;

// Time of one system alone over its share of a full pack, as measured (AVX-512, n = 32 .. 256).
template <class T>
BACKMATCH_INLINE double cost_alone(int64_t n) {
  const double order = static_cast<double>(n < 1 ? 1 : n);
  return sizeof(T) == 4 ? 260 / order : 0.3 + 150 / order;
}

// What a pack costs more because threads run out of packs before they run out of systems.
template <class T>
BACKMATCH_INLINE double idle_share(int64_t batch, int64_t threads) {
  const int64_t packs = (batch + kLanes<T> - 1) / kLanes<T>;
  const int64_t rounds = (packs + threads - 1) / threads;
  const double idle = static_cast<double>(rounds * threads) / static_cast<double>(packs);
  return idle < static_cast<double>(kLanes<T>) ? idle : static_cast<double>(kLanes<T>);
}

// A pack costs the same however many of its lanes are in use.
template <class T>
BACKMATCH_INLINE bool lanes_pay(int64_t n, int64_t systems, double idle) {
  return n <= kLaneOrder &&
         static_cast<double>(systems) * cost_alone<T>(n) > static_cast<double>(kLanes<T>) * idle;
}

// Scratch elements of one thread for systems of order up to n: the factor, with room for a vector
// of columns past the last diagonal and a row for a right-hand side, then right-hand sides.
template <class T>
BACKMATCH_INLINE int64_t factor_elements(int64_t n) {
  const int64_t most = n < kLaneOrder ? n : kLaneOrder;
  const int64_t lanes = (lane_vectors(lane_blocks(most)) + kTile * kLanes<T>) * kLanes<T>;
  const int64_t tiles = tile_offset<T>(tile_panels<T>(n + 1));
  return lanes > tiles ? lanes : tiles;
}

template <class T>
BACKMATCH_INLINE int64_t rhs_elements(int64_t n) {
  return kTile * kLanes<T> * (n + kPanelColumns + kLanes<T>);
}

template <class T>
BACKMATCH_INLINE int64_t factor_bytes(int64_t n) {
  return cache_lines(factor_elements<T>(n) * static_cast<int64_t>(sizeof(T))) +
         cache_lines(rhs_elements<T>(n) * static_cast<int64_t>(sizeof(T)));
}

template <class T>
BACKMATCH_INLINE double solve_flops(int64_t n, int64_t k) {
  const double order = static_cast<double>(n);
  return order * order * (order / 3 + 2 * static_cast<double>(k));
}

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
