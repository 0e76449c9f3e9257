// The tile of Z^T diag(w) Z that one warp sums up, for the kernels that form such matrices.
//
// Rows of weight 0 are squeezed out (active_rows.cuh) before anything is read of them: they cost
// nothing and what they hold cannot leak. A system's sum therefore runs over its active rows in
// order, in chunks padded with zeros, which change no bit: it depends on the system alone.
// No barriers here, and only finish() of small tiles exchanges numbers, within the warp.
// A chunk lies in shared memory twice, its rows times their weight (`left`) and as they are
// (`right`); tile entry (a, b) is the sum over rows k of left[k, a] right[k, b].
//
// double: 8 x 8 tiles of the matrix units, 32 x 32 a warp.
// float, order above 32: 32 x 32 a warp on the matrix units too, in bf16. A float is the sum of
// three bf16, exactly: its 24 bits, cut into 8, 8 and 8. Of the nine products of two such sums the
// six largest are taken; the others are below 2^-23 of the product together, on average 2^-25, so a
// product is as good as a rounded one. The matrix units cut sums off instead of rounding them:
// therefore a chunk of 16 rows is summed from zero, smallest parts first, and added to the sums of
// the chunks before it by ordinary additions. Parts below 2^-126 may be lost; a product with a
// factor that is not finite is not finite; sums from 2^127 on count as overflow.
// float, order up to 32: vectors of 4 and ordinary multiply-adds; below 32 the rows of a chunk are
// split over lanes, whose sums are added in a fixed order at the end.
// Row strides let the rows or pairs of rows that a matrix unit takes lie in different banks, and
// keep vectors of floats aligned.
//
// Considered and rejected, by count of instructions and published rates, not by measurement (m rows
// with a active ones; in a clock a multiprocessor adds 128 products of floats, or 1340 of bf16 on
// the matrix units, 65 % of their peak; both estimates):
//  - float by ordinary multiply-adds throughout: 8 x 8 sums a thread read 4 vectors for 64
//    multiply-adds, and loading takes a fifth of all instructions: a n^2 / 200 clocks. Six products
//    of bf16 take a n^2 / 400, with one LDS for each matrix instruction.
//  - three products of tf32: as fast, but up to 2^-21 lost in each product.
//  - weights that are 0 or 1 (masks are exact in bf16): all pairs z_a z_b of a row, cut into three
//    bf16, times the weights of 128 systems. That is m n^2 / 890 clocks however few rows are active
//    and a quarter more for the pairs: no gain at half activity, where squeezing leaves a = m / 2,
//    a loss below, and it takes two kernels, a flag a system, and batches of 128.
#pragma once

#include <cmath>
#include <cstring>

#include "active_rows.cuh"

namespace backmatch::cuda {

// A chunk kept row after row.
template <class T>
struct PlainRows {
  static constexpr int kChunk = 8;
  // Numbers a chunk of `columns` columns takes, on one side; a multiple of 4.
  static __host__ __device__ __forceinline__ constexpr int size(int columns) {
    return kChunk * stride(columns);
  }
  static __host__ __device__ __forceinline__ constexpr int stride(int columns) {
    return (columns + 15) / 16 * 16 + 4;
  }
  // Row of the q-th number of the thread that is `first` among `step` threads with its column.
  static __device__ __forceinline__ constexpr int row(int first, int step, int q) {
    return first + q * step;
  }
  template <int kCount>
  static __device__ __forceinline__ void put(T* side, int stride, int column, int first, int step,
                                             const T (&value)[kCount]) {
#pragma unroll
    for (int q = 0; q < kCount; ++q) side[row(first, step, q) * stride + column] = value[q];
  }
};

// A chunk of floats cut into three bf16, kept as pairs of rows: part p of rows 2 k and 2 k + 1 at
// (kPairs p + k) * stride + column.
struct SplitRows {
  static constexpr int kChunk = 16;
  static constexpr int kParts = 3;
  static constexpr int kPairs = kChunk / 2;
  static __host__ __device__ __forceinline__ constexpr int size(int columns) {
    return kParts * kPairs * stride(columns);
  }
  static __host__ __device__ __forceinline__ constexpr int stride(int columns) {
    return (columns + 31) / 32 * 32 + 8;
  }
  static __device__ __forceinline__ constexpr int row(int first, int step, int q) {
    return (first + q / 2 * step) * 2 + q % 2;
  }
  template <int kCount>
  static __device__ __forceinline__ void put(float* side, int stride, int column, int first,
                                             int step, const float (&value)[kCount]) {
#pragma unroll
    for (int q = 0; q < kCount; q += 2) {
      float one = value[q], two = value[q + 1];
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        const uint32_t upper = bits_of(one) >> 16 | (bits_of(two) & 0xffff0000u);
        float* const place = side + (p * kPairs + row(first, step, q) / 2) * stride + column;
        *place = float_of(upper);
        one -= float_of(bits_of(one) & 0xffff0000u);
        two -= float_of(bits_of(two) & 0xffff0000u);
      }
    }
  }

  static __device__ __forceinline__ uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
  }
  static __device__ __forceinline__ float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
};

struct alignas(16) FourFloats {
  float v[4];
};

// Tile of kAcross x kDown threads with 4 kLeft x 4 kRight sums each; the warp's 32 lanes hold
// kSlices such tiles, of every kSlices-th row.
template <int kDown, int kAcross, int kLeft, int kRight>
struct VectorTile {
  using Rows = PlainRows<float>;
  static constexpr int kChunk = Rows::kChunk;
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
  using Rows = PlainRows<double>;
  static constexpr int kChunk = Rows::kChunk;
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

// Tile of 32 x 32 floats, of products of bf16 on the matrix units.
struct SplitTile {
  using Rows = SplitRows;
  static constexpr int kRows = 32;
  static constexpr int kColumns = 32;
  static constexpr int kDown = kRows / 16;
  static constexpr int kAcross = kColumns / 8;
  float sum[kDown][kAcross][4] = {};

  // What a lane passes to the matrix units, of part p: pairs 0 and 4, of columns 0 (and 8).
  template <int kCount>
  __device__ __forceinline__ static void take(const float* side, int stride, int p,
                                              uint32_t (&number)[kCount]) {
#pragma unroll
    for (int q = 0; q < kCount; ++q) {
      const int pair = p * Rows::kPairs + q / (kCount / 2) * 4;
      number[q] = Rows::bits_of(side[pair * stride + q % (kCount / 2) * 8]);
    }
  }

  __device__ __forceinline__ void add(const float* left, const float* right, int stride, int lane) {
    left += lane % 4 * stride + lane / 4;
    right += lane % 4 * stride + lane / 4;
    uint32_t a[kDown][Rows::kParts][4];
#pragma unroll
    for (int r = 0; r < kDown; ++r) {
#pragma unroll
      for (int p = 0; p < Rows::kParts; ++p) take(left + r * 16, stride, p, a[r][p]);
    }
#pragma unroll
    for (int c = 0; c < kAcross; ++c) {
      uint32_t b[Rows::kParts][2];
#pragma unroll
      for (int p = 0; p < Rows::kParts; ++p) take(right + c * 8, stride, p, b[p]);
      float chunk[kDown][4] = {};
#pragma unroll
      for (int total = Rows::kParts - 1; total >= 0; --total) {  // the smallest products first
#pragma unroll
        for (int p = 0; p <= total; ++p) {
#pragma unroll
          for (int r = 0; r < kDown; ++r) multiply_add_16x8x16(chunk[r], a[r][p], b[total - p]);
        }
      }
#pragma unroll
      for (int r = 0; r < kDown; ++r) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[r][c][e] += chunk[r][e];
      }
    }
  }

  // Where cutting off kept an overflow at the largest number, it becomes infinite after all.
  __device__ __forceinline__ void finish(int) {
    constexpr float kOverflow = 0x1p127f;
#pragma unroll
    for (int r = 0; r < kDown; ++r) {
#pragma unroll
      for (int c = 0; c < kAcross; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (std::abs(sum[r][c][e]) >= kOverflow) sum[r][c][e] *= 2;
        }
      }
    }
  }

  template <class Entry>
  __device__ __forceinline__ void visit(int lane, const Entry& entry) const {
#pragma unroll
    for (int r = 0; r < kDown; ++r) {
#pragma unroll
      for (int c = 0; c < kAcross; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          entry(r * 16 + e / 2 * 8 + lane / 4, c * 8 + lane % 4 * 2 + e % 2, sum[r][c][e]);
        }
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
struct TileOf<float, 64> { using Type = SplitTile; };
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
