// L D L^T factorisation and solve of one system of order N <= 8 by one thread, in registers, and
// the slab of shared memory through which a warp moves what its 32 systems read and write.
//
// Who owns what: thread l of a warp holds system l's lower triangle and right-hand side. In global
// memory neighbouring lanes touch neighbouring elements of the 32 systems; in the slab system l's
// elements follow each other at l * kThreadStride, an odd stride, so that 32 threads that read
// one element each of their own system read 32 banks.
// Where it synchronises: the caller puts a sync_warp between filling the slab and reading it, and
// between reading it and filling it again. The arithmetic needs none.
// L D L^T rather than Cholesky: see group_cholesky.cuh.
// Considered and rejected: lanes that share a system (8 lanes a system, a row each: a
// shuffle for every multiply-add, and 7 of 8 lanes idle in a division), loads by the owning thread
// (32 systems 4 n^2 bytes apart: a sector for every element), a packed triangle in the slab (36
// instead of 64 numbers, but the slab holds 8 right-hand sides too).
#pragma once

#include "group_cholesky.cuh"

namespace backmatch::cuda {

constexpr int kThreadOrder = 8;    // largest order that a thread takes alone
constexpr int kThreadColumns = 8;  // right-hand sides that pass through the slab at once
constexpr int kThreadStride = kThreadOrder * kThreadColumns + 1;

// slab[s * kThreadStride + i] = element(s, i) for the i < Count of 32 systems, lanes side by side
// along i, then s. The outer loop is rolled: its addresses would fill the registers.
template <int Count, class T, class Element>
__device__ __forceinline__ void fill_slab(T* slab, int lane, const Element& element) {
#pragma unroll 1
  for (int base = lane; base < Count * kWarp; base += kInFlight * kWarp) {
    T values[kInFlight];
#pragma unroll
    for (int v = 0; v < kInFlight; ++v) {
      const int e = base + v * kWarp;
      if (e < Count * kWarp) values[v] = element(e / Count, e % Count);
    }
#pragma unroll
    for (int v = 0; v < kInFlight; ++v) {
      const int e = base + v * kWarp;
      if (e < Count * kWarp) slab[e / Count * kThreadStride + e % Count] = values[v];
    }
  }
}

// The same from 32 Count contiguous elements at a multiple of 16 bytes.
template <int Count, class T>
__device__ __forceinline__ void fill_slab_from(T* slab, int lane, const T* source) {
  constexpr int W = kPackSize<T>;
#pragma unroll 1
  for (int base = lane * W; base < Count * kWarp; base += kInFlight * kWarp * W) {
    Pack<T, W> packs[kInFlight];
#pragma unroll
    for (int v = 0; v < kInFlight; ++v) {
      const int e = base + v * kWarp * W;
      if (e < Count * kWarp) packs[v] = vector_at<const Pack<T, W>>(source + e);
    }
#pragma unroll
    for (int v = 0; v < kInFlight; ++v) {
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const int e = base + v * kWarp * W + w;
        if (e < Count * kWarp) slab[e / Count * kThreadStride + e % Count] = packs[v].v[w];
      }
    }
  }
}

constexpr __host__ __device__ int triangle(int i, int c) { return i * (i + 1) / 2 + c; }

// Multiplies a system of tiny diagonal by a power of two, which it returns for the right-hand sides.
template <int N, class T>
__device__ __forceinline__ T lift_tiny(T (&t)[triangle(N, 0)]) {
  bool tiny = false;
  bool huge = false;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    tiny |= is_tiny_diagonal(t[triangle(i, i)]);
    huge |= t[triangle(i, i)] > kHugeDiagonal<T>;
  }
  const T lift = tiny && !huge ? kLift<T> : T(1);
  if (lift != T(1)) {
#pragma unroll
    for (int e = 0; e < triangle(N, 0); ++e) t[e] *= lift;
  }
  return lift;
}

// Entry (i, c) of the lower triangle lies at t[triangle(i, c)]. After it the strict lower triangle
// holds C = L D and the diagonal 1 / D. Returns the LAPACK info.
template <int N, class T>
__device__ __forceinline__ int32_t thread_factor(T (&t)[triangle(N, 0)]) {
  int32_t info = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    T& pivot = t[triangle(j, j)];
    if (info == 0 && !is_good_pivot(pivot)) info = j + 1;
    pivot = T(1) / pivot;
#pragma unroll
    for (int i = j + 1; i < N; ++i) {
      const T scaled = t[triangle(i, j)] * t[triangle(j, j)];
#pragma unroll
      for (int c = j + 1; c <= i; ++c) t[triangle(i, c)] -= scaled * t[triangle(c, j)];
    }
  }
  return info;
}

// Overwrites b by the solution.
template <int N, class T>
__device__ __forceinline__ void thread_solve(const T (&t)[triangle(N, 0)], T (&b)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    b[j] *= t[triangle(j, j)];
#pragma unroll
    for (int i = j + 1; i < N; ++i) b[i] -= t[triangle(i, j)] * b[j];
  }
#pragma unroll
  for (int j = N - 1; j >= 0; --j) {
    T sum = 0;
#pragma unroll
    for (int i = j + 1; i < N; ++i) sum += t[triangle(i, j)] * b[i];
    b[j] -= t[triangle(j, j)] * sum;
  }
}

// Calls launcher.operator()<n>() for 1 <= n <= kThreadOrder.
template <int N = 1, class Launcher>
void with_thread_order(int64_t n, const Launcher& launcher) {
  if constexpr (N <= kThreadOrder) {
    if (n != N) return with_thread_order<N + 1>(n, launcher);
    launcher(std::integral_constant<int, N>{});
  }
}

// One thread a system, one warp a block: small batches reach every multiprocessor.
template <class T>
LaunchShape thread_shape(int64_t batch) {
  return {(batch + kWarp - 1) / kWarp, kWarp, kWarp * kThreadStride * int64_t(sizeof(T))};
}

}  // namespace backmatch::cuda
