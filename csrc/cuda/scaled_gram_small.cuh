// scaled_gram_solve for n <= 64: one thread a system up to n = 8 (thread_cholesky.cuh), a group of
// 4 to 32 lanes above (group_cholesky.cuh). K's lower triangle is copied to shared memory once a
// block and gathered from there: no matrix of a system is formed anywhere but in registers.
//
// n <= 8: a row with D == 0 becomes a row of the identity.
// 9 <= n <= 64: the active rows of a system are squeezed to the end of the group's frame, and the
// loops start where the fullest system of the warp starts: with half the rows active an eighth of
// the multiply-adds is left. Rows of the frame before a system's own first are rows of the
// identity, which stay exact, so that a system's bits do not depend on its neighbours. Their
// entries come from a row and a column of zeros that border K, times a slope of 0.
// Who owns what: a warp lists the active rows of its systems, lane i of it row i (two ballots where
// n > 32), and writes X of its own systems in order of rows; a group owns its list and slab.
// Where it synchronises: one sync_block, between K and the lists and their readers; sync_warp
// before the back substitution and before X is read from shared memory, besides those of
// group_cholesky.cuh.
// Considered and rejected: K from the cache (a gather of 16 rows a load: as many sectors as from
// shared memory, at a fraction of its rate), threads or groups by the number of active rows (a
// system's bits would depend on how it is dispatched, and warps would diverge).
#pragma once

#include "../kernels.h"
#include "thread_cholesky.cuh"

namespace backmatch::cuda {

// ---- n <= 8 -------------------------------------------------------------------------------------

template <class T, int N>
__global__ void __launch_bounds__(kWarp) scaled_gram_thread_kernel(ScaledGramArgs<T> args) {
  T* slab = reinterpret_cast<T*>(shared_memory());
  T* K = slab + kWarp * kThreadStride;
  const int lane = thread_index();
  const int64_t system = block_index() * kWarp;
  const int live = static_cast<int>(args.batch - system < kWarp ? args.batch - system : kWarp);
  if (N == 1 && args.n == 0) {  // nothing to solve, but info to write
    if (lane < live) args.info[system + lane] = 0;
    return;
  }
  for (int e = lane; e < N * N; e += kWarp) {
    K[e] = e % N <= e / N ? args.K[e / N * args.k_row + e % N * args.k_col] : T(0);
  }
  const T damping = lane < live ? args.damping[(system + lane) * args.damping_stride] : T(0);
  const T* D = args.D + system * args.d_batch;
  const T* R = args.R + system * args.r_batch;
  fill_slab<2 * N>(slab, lane, [&](int s, int i) {  // D, then R
    if (s >= live) return T(0);
    return i < N ? D[s * args.d_batch + i * args.d_col]
                 : R[s * args.r_batch + (i - N) * args.r_col];
  });
  sync_warp();

  T* own = slab + lane * kThreadStride;
  T slope[N];
  T b[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    slope[i] = own[i];
    b[i] = slope[i] != T(0) ? own[N + i] : T(0);  // a slope of NaN is active and fails as a pivot
  }
  T t[triangle(N, 0)];
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int c = 0; c <= i; ++c) {
      const bool both = slope[i] != T(0) && slope[c] != T(0);
      t[triangle(i, c)] = both ? slope[i] * K[i * N + c] * slope[c] : T(c == i);
    }
    if (slope[i] != T(0)) t[triangle(i, i)] += damping;
  }
  const T lift = lift_tiny<N>(t);
#pragma unroll
  for (int i = 0; i < N; ++i) b[i] *= lift;
  const int32_t info = thread_factor<N>(t);
  if (lane < live) args.info[system + lane] = info;
  thread_solve<N>(t, b);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const T x = slope[i] != T(0) ? slope[i] * b[i] : T(0);
    own[i] = info == 0 ? x : kNaN<T>;
  }
  sync_warp();
#pragma unroll 1
  for (int e = lane; e < N * live; e += kWarp) {
    args.X[system * N + e] = slab[e / N * kThreadStride + e % N];
  }
}

// ---- 9 <= n <= 64 -------------------------------------------------------------------------------

// The shared memory of a block: K with its border, then for each warp the slabs, slopes and row
// numbers of its systems, which rows are active, and whether the solution failed.
template <class G>
struct GramShared {
  using T = typename G::T;
  static constexpr int N = G::N;
  static constexpr int kLine = N + G::Q;  // lanes (p, q) read different banks when all are active
  static constexpr int kMatrix = (N + 1) * kLine;
  static constexpr int kWords = (N + kWarp - 1) / kWarp;  // of 32 rows
  static constexpr int kWarps = N > kWarp ? 4 : 2;        // a block
  static constexpr int64_t kMatrixBytes = (kMatrix * int64_t(sizeof(T)) + 15) / 16 * 16;
  static constexpr int64_t kWarpBytes =
      G::kSystems * ((G::kSlab + N) * int64_t(sizeof(T)) +
                     (N + kWords + 1) * int64_t(sizeof(int32_t)));
  static constexpr int64_t kWarpStride = (kWarpBytes + 15) / 16 * 16;
  static constexpr int64_t kBytes = kMatrixBytes + kWarps * kWarpStride;

  const T* K;
  T* slabs;
  T* slope;          // of the rows in the frame, N a system; 0 where there is none
  int32_t* row;      // their numbers; N, the border, where there is none
  uint32_t* active;  // a bit a row, kWords a system
  int32_t* failed;   // a system

  __device__ __forceinline__ GramShared(unsigned char* memory, int warp)
      : K(reinterpret_cast<T*>(memory)),
        slabs(reinterpret_cast<T*>(memory + kMatrixBytes + warp * kWarpStride)),
        slope(slabs + G::kSystems * G::kSlab),
        row(reinterpret_cast<int32_t*>(slope + G::kSystems * N)),
        active(reinterpret_cast<uint32_t*>(row + G::kSystems * N)),
        failed(reinterpret_cast<int32_t*>(active + G::kSystems * kWords)) {}
};

template <class G>
__device__ __forceinline__ void load_gram(const ScaledGramArgs<typename G::T>& args,
                                          typename G::T* K) {
  using S = GramShared<G>;
  constexpr int kThreads = S::kWarps * kWarp;
#pragma unroll 1
  for (int base = thread_index(); base < S::kMatrix; base += kInFlight * kThreads) {
    typename G::T values[kInFlight];
#pragma unroll
    for (int v = 0; v < kInFlight; ++v) {
      const int e = base + v * kThreads;
      const int i = e / S::kLine;
      const int c = e % S::kLine;
      values[v] = i < args.n && c <= i ? args.K[i * args.k_row + c * args.k_col] : 0;
    }
#pragma unroll
    for (int v = 0; v < kInFlight; ++v) {
      const int e = base + v * kThreads;
      if (e < S::kMatrix) K[e] = values[v];
    }
  }
}

// Lists the active rows of the warp's systems at the end of their frames, with D and R. Returns the
// first row of the frame that any of them uses.
template <class G>
__device__ __forceinline__ int list_active(const ScaledGramArgs<typename G::T>& args,
                                           int64_t system, int live, const GramShared<G>& memory) {
  using T = typename G::T;
  constexpr int N = G::N;
  constexpr int kWords = GramShared<G>::kWords;
  const int lane = thread_index() % kWarp;
  T slopes[G::kSystems * kWords];
  T rhs[G::kSystems * kWords];
#pragma unroll
  for (int v = 0; v < G::kSystems * kWords; ++v) {
    const int64_t s = system + v / kWords;
    const int i = v % kWords * kWarp + lane;
    const bool inside = v / kWords < live && i < args.n;
    slopes[v] = inside ? args.D[s * args.d_batch + i * args.d_col] : T(0);
    rhs[v] = inside ? args.R[s * args.r_batch + i * args.r_col] : T(0);
  }
  int start = N;
#pragma unroll
  for (int s = 0; s < G::kSystems; ++s) {
    unsigned words[kWords];
    int front = N;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      words[w] = ballot(slopes[s * kWords + w] != T(0));  // true for NaN
      front -= count_bits(words[w]);
      if (lane == 0) memory.active[s * kWords + w] = words[w];
    }
    T* slope = memory.slope + s * N;
    int32_t* row = memory.row + s * N;
    T* known = memory.slabs + s * G::kSlab + G::kKnown;
    int place = front;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int f = place + count_bits(words[w] & ((1u << lane) - 1));
      if (words[w] >> lane & 1) {
        slope[f] = slopes[s * kWords + w];
        row[f] = w * kWarp + lane;
        known[f] = rhs[s * kWords + w];
      }
      place += count_bits(words[w]);
    }
#pragma unroll
    for (int f = lane; f < N; f += kWarp) {
      if (f < front) {
        slope[f] = 0;
        row[f] = N;
        known[f] = 0;
      }
    }
    start = front < start ? front : start;
  }
  return start;
}

// How many of a system's rows are active.
template <class G>
__device__ __forceinline__ int count_active(const GramShared<G>& memory, int s) {
  int count = 0;
#pragma unroll
  for (int w = 0; w < GramShared<G>::kWords; ++w) {
    count += count_bits(memory.active[s * GramShared<G>::kWords + w]);
  }
  return count;
}

template <class G, class T>
__device__ __forceinline__ void gather_matrix(T (&t)[G::kEntries], const GroupLane<G>& at,
                                              const GramShared<G>& memory, int start, T damping) {
  using S = GramShared<G>;
  const T* slope = memory.slope + at.system * G::N;
  const int32_t* row = memory.row + at.system * G::N;
  const int front = G::N - count_active(memory, at.system);
  T row_slope[G::kRows];
  int row_start[G::kRows];
#pragma unroll
  for (int a = 0; a < G::kRows; ++a) {
    row_slope[a] = slope[a * G::P + at.p];
    row_start[a] = row[a * G::P + at.p] * S::kLine;
  }
#pragma unroll
  for (int b = 0; b < G::kBlocks; ++b) {
    if (b < start) continue;
    const int column = b * G::Q + at.q;
    const T column_slope = slope[column];
    const T* K = memory.K + row[column];
#pragma unroll
    for (int a = b / G::M; a < G::kRows; ++a) {
      T& entry = t[G::slot(a, b)];
      entry = row_slope[a] * K[row_start[a]] * column_slope;
      if (a == b / G::M && a * G::P + at.p == column) entry += column < front ? T(1) : damping;
    }
  }
}

template <class G>
__device__ __forceinline__ void store_solutions(const ScaledGramArgs<typename G::T>& args,
                                                int64_t system, int live,
                                                const GramShared<G>& memory) {
  using T = typename G::T;
  constexpr int kWords = GramShared<G>::kWords;
  const int lane = thread_index() % kWarp;
#pragma unroll 1
  for (int s = 0; s < G::kSystems && s < live; ++s) {
    int f = G::N - count_active(memory, s);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const unsigned word = memory.active[s * kWords + w];
      const int own = f + count_bits(word & ((1u << lane) - 1));
      const int i = w * kWarp + lane;
      T x = 0;
      if (word >> lane & 1) x = memory.slope[s * G::N + own] * memory.slabs[s * G::kSlab + own];
      if (i < args.n) args.X[(system + s) * args.n + i] = memory.failed[s] ? kNaN<T> : x;
      f += count_bits(word);
    }
  }
}

template <class T, int P, int Q, int N>
__global__ void __launch_bounds__(GramShared<Group<T, P, Q, N>>::kWarps * kWarp)
    scaled_gram_group_kernel(ScaledGramArgs<T> args) {
  using G = Group<T, P, Q, N>;
  using S = GramShared<G>;
  const int warp = thread_index() / kWarp;
  const S memory(shared_memory(), warp);
  const GroupLane<G> at(thread_index(), memory.slabs);
  const int64_t system = (block_index() * S::kWarps + warp) * G::kSystems;
  const int64_t left = args.batch - system;
  const int live = static_cast<int>(left < 0 ? 0 : left < G::kSystems ? left : G::kSystems);
  clear_columns(at);
  const int start = list_active(args, system, live, memory) / Q;
  load_gram<G>(args, reinterpret_cast<T*>(shared_memory()));
  const int64_t own = system + at.system;
  const T damping = at.system < live ? args.damping[own * args.damping_stride] : T(0);
  sync_block();

  T t[G::kEntries] = {};
  gather_matrix(t, at, memory, start, damping);
  const T lift = lift_tiny(t, at);
  T* const known = at.slab + G::kKnown;
  T b[G::kRows];
#pragma unroll
  for (int a = 0; a < G::kRows; ++a) b[a] = known[a * P + at.p] * lift;
  group_forward(t, b, at, start, known, at.lane == 0, true);
  sync_warp();
  const int bad = first_bad_column(at, start * Q);
  group_backward(t, at, start, known, at.slab);  // the exchange of columns is over
  if (at.lane == 0) {
    memory.failed[at.system] = bad < N;
    if (at.system < live) args.info[own] = bad < N ? memory.row[at.system * N + bad] + 1 : 0;
  }
  sync_warp();
  store_solutions<G>(args, system, live, memory);
}

// ---- launch -------------------------------------------------------------------------------------

template <class T, int P, int Q, int N>
void launch_scaled_gram_group(const ScaledGramArgs<T>& args, void* stream) {
  using G = Group<T, P, Q, N>;
  using S = GramShared<G>;
  constexpr int64_t kSystems = S::kWarps * G::kSystems;
  const LaunchShape shape{(args.batch + kSystems - 1) / kSystems, S::kWarps * kWarp, S::kBytes};
  launch<scaled_gram_group_kernel<T, P, Q, N>>(shape, stream, args);
}

// n <= kSmallOrder and batch > 0.
template <class T>
void launch_scaled_gram_small(const ScaledGramArgs<T>& args, void* stream) {
  const int64_t n = args.n;
  if (n <= kThreadOrder) {
    return with_thread_order(n == 0 ? 1 : n, [&](auto order) {
      constexpr int N = decltype(order)::value;
      LaunchShape shape = thread_shape<T>(args.batch);
      shape.shared_bytes += N * N * sizeof(T);
      launch<scaled_gram_thread_kernel<T, N>>(shape, stream, args);
    });
  }
  if (n <= 16) return launch_scaled_gram_group<T, 2, 2, 16>(args, stream);
  if constexpr (sizeof(T) == 4) {
    if (n <= 24) return launch_scaled_gram_group<T, 2, 2, 24>(args, stream);
    if (n <= 32) return launch_scaled_gram_group<T, 2, 2, 32>(args, stream);
    if (n <= 48) return launch_scaled_gram_group<T, 4, 2, 48>(args, stream);
    return launch_scaled_gram_group<T, 4, 4, 64>(args, stream);
  } else {
    if (n <= 24) return launch_scaled_gram_group<T, 2, 2, 24>(args, stream);
    if (n <= 32) return launch_scaled_gram_group<T, 4, 2, 32>(args, stream);
    if (n <= 48) return launch_scaled_gram_group<T, 4, 4, 48>(args, stream);
    return launch_scaled_gram_group<T, 8, 4, 64>(args, stream);
  }
}

}  // namespace backmatch::cuda
