// The active rows of Z for one system: those whose weight is not 0, listed window by window.
//
// Who owns what: a group of threads, a warp or the block, lists the rows of its own system in its
// own part of shared memory. A row has one writer, and its place follows from ballots and their
// counts: the list is the same in every run.
// Where it synchronises: between counting and listing, here; the caller has a barrier before the
// list is read and one before the next window.
// Considered and rejected: listing by one warp (kWindow / 32 dependent reads of weights in a row
// while the others wait), a list of all rows (their number is not bounded).
#pragma once

#include <platform.cuh>

namespace backmatch::cuda {

constexpr int kMaxChunk = 16;  // rows of Z in shared memory at a time, at most
constexpr int kWindow = 256;   // rows of Z whose weights are looked at together
constexpr int kSegments = kWindow / kWarp;

// The threads that work on one system: a warp, or the whole block.
struct Group {
  int rank;     // of this thread
  int threads;  // a multiple of kWarp
};

template <class T>
__device__ __forceinline__ T at_byte(const T* start, int64_t bytes) {
  return *reinterpret_cast<const T*>(reinterpret_cast<const char*>(start) + bytes);
}

// The active rows of a window, in order, then zeros up to a multiple of kMaxChunk.
template <class T>
struct ActiveRows {
  int64_t* offset;  // from the first row of Z, in bytes
  T* weight;
  int32_t* counts;  // kSegments

  static constexpr int64_t kBytes =
      kWindow * int64_t(sizeof(int64_t) + sizeof(T)) + kSegments * int64_t(sizeof(int32_t));

  __device__ __forceinline__ explicit ActiveRows(unsigned char* memory)
      : offset(reinterpret_cast<int64_t*>(memory)),
        weight(reinterpret_cast<T*>(offset + kWindow)),
        counts(reinterpret_cast<int32_t*>(weight + kWindow)) {}

  // Lists the rows of Z from `base` on, at most kWindow, that are before `end` and whose weight_of
  // is not 0 (NaN counts); the group does it together, and calls placed(place, row, weight) for
  // each. Returns their number. Has a barrier inside;
  // the caller puts one before the list is read, and one before the next call.
  template <bool kOneWarp, class WeightOf, class Placed>
  __device__ __forceinline__ int find(const Group& group, int64_t base, int64_t end,
                                      int64_t row_stride, const WeightOf& weight_of,
                                      const Placed& placed) const {
    const int lane = group.rank % kWarp;
    const int size = static_cast<int>(end - base < kWindow ? end - base : kWindow);
    for (int s = group.rank / kWarp; s < kSegments; s += group.threads / kWarp) {
      const int i = s * kWarp + lane;
      const unsigned active = ballot(i < size && weight_of(base + i) != 0);
      if (lane == 0) counts[s] = count_bits(active);
    }
    sync_group<kOneWarp>();
    for (int s = group.rank / kWarp; s * kWarp < size; s += group.threads / kWarp) {
      const int i = s * kWarp + lane;
      const T own = i < size ? weight_of(base + i) : T(0);
      const unsigned active = ballot(own != 0);
      int place = count_bits(active & ((1u << lane) - 1));
      for (int q = 0; q < s; ++q) place += counts[q];
      if (own != 0) {
        offset[place] = (base + i) * row_stride * int64_t(sizeof(T));
        weight[place] = own;
        placed(place, base + i, own);
      }
    }
    int total = 0;
#pragma unroll
    for (int q = 0; q < kSegments; ++q) total += counts[q];
    const int padding = total + group.rank;
    if (group.rank < kMaxChunk && padding < kWindow) {
      offset[padding] = 0;
      weight[padding] = T(0);
    }
    return total;
  }
};

}  // namespace backmatch::cuda
