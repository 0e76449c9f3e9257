// Products of one matrix with a few vectors, and sums over rows, by one block: what a step of
// conjugate gradient is made of (krylov_block.cuh).
//
// Who owns what: a block has 32 R ceil(n / 32 R) threads, R = 1, 2 or 4; thread t owns row t of
// every vector. In a product a warp works on 32 R rows and one of R groups of columns c, each lane
// on R rows: out[i] = sum_c M[c][i] v[c]. Neighbouring lanes read neighbouring entries of a row of
// M, in one pack of 16 bytes where M is in shared memory, as single words, coalesced at any
// alignment, where it is in global memory. Per c a lane loads R entries of M and W of the vectors
// (a broadcast) for R W multiply-adds: 32 to (4 + 2 packs) at R = 4, W = 8 in float.
// The vectors are kept as v[c * W + w]; the partial sums as partial[(g * W + w) * rows + i], which
// both their writers and their readers reach without bank conflicts.
// Where it synchronises: only in shuffles; callers put a barrier between the writing of `vectors`,
// the product and the reading of `partial`.
// The bits: the sum of a row runs over the columns of a group in order, then over the groups in
// order. Groups depend on n alone; W, the place w of a vector and where M lies do not matter.
// Considered and rejected: fp64 matrix units (8 systems x 8 rows x 4 columns fit; but from n = 256
// on the matrix comes from L2, which bounds the product at 8 bytes per 8 multiply-adds already),
// 16 vectors (64 more registers of sums: spills at 512 threads), M in registers (n <= 128 only).
#pragma once

#include <platform.cuh>

#include <cmath>
#include <limits>

namespace backmatch::cuda {

template <class T>
constexpr T kLargestFinite = std::numeric_limits<T>::max();

template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T v[N];
};

// M[c][i] at at[c * row + i * col]; in shared memory col is 1 and row a multiple of the pack.
template <class T>
struct MatrixView {
  const T* at;
  int64_t row, col;
};

// Which entries M[c][i] are not 0 by construction.
enum class Shape { kFull, kUpper, kLower };  // kUpper: c <= i, kLower: c >= i

// Entries of a row of M that a lane loads at once.
template <class T, int R, bool kShared>
constexpr int kPackOf = !kShared ? 1 : R < 16 / int(sizeof(T)) ? R : 16 / int(sizeof(T));

// Columns whose loads are in flight together: as many as do not spill in blocks of kMost threads.
template <class T, int W, bool kShared, bool kPreconditioned, int kMost>
constexpr int kAheadOf = W == 1 ? 8
                         : kShared || (kMost <= 256 && sizeof(T) == 4) ? 4
                         : kMost <= 256 ? 2
                         : W == 4 && sizeof(T) == 8 ? 1
                         : kPreconditioned && sizeof(T) == 4 ? 1
                                                             : 2;

// sum[r][w] += M[c][row r] v[c * W + w] for c from first to last; load(a) fetches the next column's
// entries of the lane's R rows.
template <int W, int R, int kAhead, class T, class Load>
__device__ __forceinline__ void accumulate(const T* vectors, int first, int last, const Load& load,
                                           T (&sum)[R][W]) {
  constexpr int kVectors = W * sizeof(T) < 16 ? W : 16 / sizeof(T);
#pragma unroll kAhead
  for (int c = first; c < last; ++c) {
    T a[R];
    load(a);
#pragma unroll
    for (int w = 0; w < W; w += kVectors) {
      const auto v = vector_at<const Pack<T, kVectors>>(vectors + c * W + w);
#pragma unroll
      for (int e = 0; e < kVectors; ++e) {
#pragma unroll
        for (int r = 0; r < R; ++r) sum[r][w + e] += a[r] * v.v[e];
      }
    }
  }
}

template <int W, int R, bool kShared, int kAhead, class T>
__device__ __forceinline__ void multiply(const MatrixView<T>& M, Shape shape, int n,
                                         const T* vectors, T* partial) {
  constexpr int kPack = kPackOf<T, R, kShared>;
  constexpr int kPacks = R / kPack;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int group = warp % R, base = warp / R * (kWarp * R);
  const int begin = shape == Shape::kLower ? base : 0;
  const int beyond = base + kWarp * R;
  const int end = shape == Shape::kUpper && beyond < n ? beyond : n;
  const int share = (end - begin + R - 1) / R;
  const int first = begin + group * share;
  const int last = first + share < end ? first + share : end;

  T sum[R][W] = {};
  if (!kShared && M.col == 1 && beyond <= n) {
    // The usual case takes one pointer: half the instructions of the loop would be addresses.
    const T* entry = M.at + first * M.row + base + lane;
    accumulate<W, R, kAhead>(vectors, first, last, [&](T (&a)[R]) {
#pragma unroll
      for (int r = 0; r < R; ++r) a[r] = entry[r * kWarp];
      entry += M.row;
    }, sum);
  } else {
    // Rows past the end repeat the last pack; nobody reads their sums.
    const int limit = (n + kPack - 1) / kPack * kPack - kPack;
    const T* entry[kPacks];
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int i = base + (j * kWarp + lane) * kPack;
      entry[j] = M.at + (i < limit ? i : limit) * M.col + first * M.row;
    }
    accumulate<W, R, kAhead>(vectors, first, last, [&](T (&a)[R]) {
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        const Pack<T, kPack> pack = vector_at<const Pack<T, kPack>>(entry[j]);
        entry[j] += M.row;
#pragma unroll
        for (int e = 0; e < kPack; ++e) a[j * kPack + e] = pack.v[e];
      }
    }, sum);
  }
#pragma unroll
  for (int w = 0; w < W; ++w) {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      Pack<T, kPack> pack;
#pragma unroll
      for (int e = 0; e < kPack; ++e) pack.v[e] = sum[j * kPack + e][w];
      const int i = base + (j * kWarp + lane) * kPack;
      vector_at<Pack<T, kPack>>(partial + (group * W + w) * block_threads() + i) = pack;
    }
  }
}

// Elements from row to row of a matrix of order n in shared memory.
template <class T>
__host__ __device__ __forceinline__ constexpr int64_t staged_row(int64_t n) {
  constexpr int64_t kPack = 16 / sizeof(T);
  return (n + kPack - 1) / kPack * kPack;
}

// Copies M into shared memory, a warp a row; the columns from n to `row` become 0.
template <class T>
__device__ __forceinline__ void stage(const MatrixView<T>& M, int n, int row, T* to) {
  for (int c = thread_index() / kWarp; c < n; c += block_threads() / kWarp) {
    for (int i = thread_index() % kWarp; i < row; i += kWarp) {
      to[c * row + i] = i < n ? M.at[c * M.row + i * M.col] : T(0);
    }
  }
}

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Larger {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return std::fmax(a, b);  // ignores a NaN
  }
};

// Combines value[s] over the lanes of each warp into scratch[warp * C + s]. Halving the slots with
// the lanes takes 9 shuffles at C = 8, where 8 butterflies take 40; the tree is the same.
template <int C, class Combine, class T>
__device__ __forceinline__ void combine_lanes(T (&value)[C], const Combine& combine, T* scratch) {
  const int lane = thread_index() % kWarp;
#pragma unroll
  for (int span = kWarp / 2; span > 0; span /= 2) {
    const int slots = C * span / (kWarp / 2);  // still in value[]; below 2: one
    const bool upper = (lane & span) != 0;
    if (slots > 1) {
#pragma unroll
      for (int s = 0; s < slots / 2; ++s) {
        const T give = upper ? value[s] : value[s + slots / 2];
        const T keep = upper ? value[s + slots / 2] : value[s];
        value[s] = combine(keep, shuffle(give, lane ^ span, kWarp));
      }
    } else {
      value[0] = combine(value[0], shuffle(value[0], lane ^ span, kWarp));
    }
  }
  constexpr int kLanes = kWarp / C;  // that hold the same slot
  if (lane % kLanes == 0) scratch[thread_index() / kWarp * C + lane / kLanes] = value[0];
}

// The rest of the way, over the warps, for one slot.
template <int C, class Combine, class T>
__device__ __forceinline__ T combine_warps(const T* scratch, int slot, const Combine& combine) {
  T result = scratch[slot];
  for (int warp = 1; warp < block_threads() / kWarp; ++warp) {
    result = combine(result, scratch[warp * C + slot]);
  }
  return result;
}

}  // namespace backmatch::cuda
