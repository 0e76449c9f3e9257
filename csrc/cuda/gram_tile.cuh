// What the kernels that form weighted Gram matrices share: the active rows of a window of Z, and the
// tile of Z^T diag(w) Z that one warp sums up.
//
// Rows of weight 0 are squeezed out before anything is read of them: they cost nothing and what they
// hold cannot leak. A system's sum therefore runs over its active rows in order, in chunks of
// kChunk rows padded with zeros, which change no bit: it depends on the system alone.
// The rows of a chunk lie in shared memory twice, times their weight (`left`) and as they are
// (`right`), row after row; tile entry (a, b) is the sum over rows k of left[k][a] right[k][b].
//
// float: 8 x 8 sums a thread, 4 vectors read for 64 multiply-adds; orders of 32 and less have
// fewer sums a thread and, below 32, split the rows of a chunk over lanes, whose sums are added in
// a fixed order at the end. double: 8 x 8 tiles of the matrix units, 32 x 32 a warp, 8 numbers read
// for 16 products of 256 multiply-adds. The row stride (a multiple of 16 plus 4) lets the four rows
// that a matrix unit takes lie in different banks, and keeps vectors of floats aligned.
//
// Considered and rejected, by count, not by measurement (an H100 multiplies and adds 33.5 G pairs
// of floats a second; this file's loop can issue some 80 % of them):
//  - weights that are 0 or 1 on the bf16 matrix units: all pairs z_a z_b of a row, split into three
//    bf16, times the weights of 128 systems. It needs 3 m n^2 operations for a system however few
//    rows are active, where squeezing leaves m n^2 / 2 at half activity: at 60 % of the dense
//    rate (mma.sync) 5.1 m n^2 fs against 9.3, and forming, splitting and storing the pairs takes
//    a quarter more: 1.4 times at best, less for a batch that is no multiple of 128, nothing at a
//    third of the rows. Sums would be truncated, and two kernels and a flag a system are needed.
//  - the same sums as three tf32 products: 5 m n^2 / 2 fs, up to 1.8 times, for weights of any kind;
//    but each product then errs by up to 2^-21 instead of 2^-24 and sums are truncated.
#pragma once

#include <platform.cuh>

#include <type_traits>

namespace backmatch::cuda {

constexpr int kChunk = 8;            // rows of Z in shared memory at a time
constexpr int kWindow = 256;         // rows of Z whose weights are looked at together
constexpr int kSegments = kWindow / kWarp;

// The threads that work on one system: a warp, or the whole block.
struct Group {
  int rank;     // of this thread
  int threads;  // a multiple of kWarp
};

template <bool kOneWarp>
__device__ __forceinline__ void sync_group() {
  if constexpr (kOneWarp) {
    sync_warp();
  } else {
    sync_block();
  }
}

template <class T>
__device__ __forceinline__ T at_byte(const T* start, int64_t bytes) {
  return *reinterpret_cast<const T*>(reinterpret_cast<const char*>(start) + bytes);
}

// The active rows of a window, in order, then zeros up to a multiple of kChunk. In shared memory.
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
  // is not 0 (NaN counts); the group does it together, and calls placed(place in the list, row, weight)
  // for each. Returns their number. Has a barrier inside;
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
    if (group.rank < kChunk && padding < kWindow) {
      offset[padding] = 0;
      weight[padding] = T(0);
    }
    return total;
  }
};

struct alignas(16) FourFloats {
  float v[4];
};

// Tile of kAcross x kDown threads with 4 kLeft x 4 kRight sums each; the warp's 32 lanes hold
// kSlices such tiles, of every kSlices-th row.
template <int kDown, int kAcross, int kLeft, int kRight>
struct VectorTile {
  static constexpr int kRows = 4 * kDown * kLeft;
  static constexpr int kColumns = 4 * kAcross * kRight;
  static constexpr int kSlices = kWarp / (kDown * kAcross);
  float sum[4 * kLeft][4 * kRight] = {};

  __device__ __forceinline__ static int down(int lane) { return lane / kAcross % kDown * 4; }
  __device__ __forceinline__ static int across(int lane) { return lane % kAcross * 4; }

  // Adds the rows of a chunk.
  __device__ __forceinline__ void add(const float* left, const float* right, int stride, int lane) {
    const int first = lane / (kDown * kAcross);
    left += first * stride + down(lane);
    right += first * stride + across(lane);
#pragma unroll
    for (int k = 0; k < kChunk / kSlices; ++k) {
      FourFloats a[kLeft], b[kRight];
#pragma unroll
      for (int q = 0; q < kLeft; ++q) {
        a[q] = vector_at<const FourFloats>(left + k * kSlices * stride + q * 4 * kDown);
      }
#pragma unroll
      for (int q = 0; q < kRight; ++q) {
        b[q] = vector_at<const FourFloats>(right + k * kSlices * stride + q * 4 * kAcross);
      }
#pragma unroll
      for (int r = 0; r < 4 * kLeft; ++r) {
#pragma unroll
        for (int c = 0; c < 4 * kRight; ++c) sum[r][c] += a[r / 4].v[r % 4] * b[c / 4].v[c % 4];
      }
    }
  }

  // Adds up the slices; all lanes then hold the sums of their tile.
  __device__ __forceinline__ void finish(int lane) {
    if constexpr (kSlices > 1) {
#pragma unroll
      for (int r = 0; r < 4 * kLeft; ++r) {
#pragma unroll
        for (int c = 0; c < 4 * kRight; ++c) {
#pragma unroll
          for (int step = kDown * kAcross; step < kWarp; step *= 2) {
            sum[r][c] += shuffle(sum[r][c], lane ^ step, kWarp);
          }
        }
      }
    }
  }

  // entry(a, b, sum) for every sum of this lane.
  template <class Entry>
  __device__ __forceinline__ void visit(int lane, const Entry& entry) const {
    if (lane >= kDown * kAcross) return;
#pragma unroll
    for (int c = 0; c < 4 * kRight; ++c) {
#pragma unroll
      for (int r = 0; r < 4 * kLeft; ++r) {
        entry(r / 4 * 4 * kDown + down(lane) + r % 4, c / 4 * 4 * kAcross + across(lane) + c % 4,
              sum[r][c]);
      }
    }
  }
};

// Tile of kSide x kSide products of the matrix units.
template <int kSide>
struct MatrixTile {
  static constexpr int kRows = 8 * kSide;
  static constexpr int kColumns = 8 * kSide;
  double sum[kSide][kSide][2] = {};

  __device__ __forceinline__ void add(const double* left, const double* right, int stride,
                                      int lane) {
    left += lane % 4 * stride + lane / 4;
    right += lane % 4 * stride + lane / 4;
#pragma unroll
    for (int k = 0; k < kChunk; k += 4) {
      double a[kSide], b[kSide];
#pragma unroll
      for (int q = 0; q < kSide; ++q) {
        a[q] = left[k * stride + q * 8];
        b[q] = right[k * stride + q * 8];
      }
#pragma unroll
      for (int r = 0; r < kSide; ++r) {
#pragma unroll
        for (int c = 0; c < kSide; ++c) multiply_add_8x8x4(sum[r][c], a[r], b[c]);
      }
    }
  }

  __device__ __forceinline__ void finish(int) {}

  template <class Entry>
  __device__ __forceinline__ void visit(int lane, const Entry& entry) const {
#pragma unroll
    for (int r = 0; r < kSide; ++r) {
#pragma unroll
      for (int c = 0; c < 2 * kSide; ++c) {
        entry(r * 8 + lane / 4, c / 2 * 8 + lane % 4 * 2 + c % 2, sum[r][c / 2][c % 2]);
      }
    }
  }
};

// A warp's tile for matrices of order `kOrder` (8, 16, 32, or more: 64).
template <class T, int kOrder>
struct TileOf;
template <>
struct TileOf<float, 8> { using Type = VectorTile<2, 2, 1, 1>; };
template <>
struct TileOf<float, 16> { using Type = VectorTile<4, 4, 1, 1>; };
template <>
struct TileOf<float, 32> { using Type = VectorTile<4, 8, 2, 1>; };
template <>
struct TileOf<float, 64> { using Type = VectorTile<4, 8, 2, 2>; };
template <>
struct TileOf<double, 8> { using Type = MatrixTile<1>; };
template <>
struct TileOf<double, 16> { using Type = MatrixTile<2>; };
template <>
struct TileOf<double, 32> { using Type = MatrixTile<4>; };
template <>
struct TileOf<double, 64> { using Type = MatrixTile<4>; };

template <class T, int kOrder>
using WarpTile = typename TileOf<T, (kOrder < 64 ? kOrder : 64)>::Type;

}  // namespace backmatch::cuda
