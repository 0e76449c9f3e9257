// spd_solve for n <= 64: one thread a system up to n = 8, here (thread_cholesky.cuh), a group of
// lanes above (spd_solve_group.cuh).
//
// Who owns what: one warp a block; thread l solves system l of the warp. The matrices come through
// the warp's slab of shared memory, 16 bytes a load where the batch is contiguous and aligned,
// which is decided once a launch and shows in no result; the right-hand sides follow through the
// same slab, one or 8 a pass, and X goes back through it.
// Where it synchronises: between filling the slab and reading it, and before it is filled anew.
#pragma once

#include <type_traits>

#include "../kernels.h"
#include "spd_solve_group.cuh"
#include "thread_cholesky.cuh"

namespace backmatch::cuda {

// One pass of at most C right-hand sides, from `first` on; system `lane` of the warp has `info`.
template <int N, int C, class T>
__device__ __forceinline__ void thread_pass(const SpdSolveArgs<T>& args, int64_t system, int live,
                                            int64_t first, const T (&t)[triangle(N, 0)],
                                            T lift, int32_t info, T* slab) {
  const int lane = thread_index();
  const auto beyond = [&](int s, int c) { return s >= live || first + c >= args.k; };
  fill_slab<N * C>(slab, lane, [&](int s, int i) {
    const T* B = args.B + (system + s) * args.b_batch + (first + i % C) * args.b_col;
    return beyond(s, i % C) ? T(0) : B[i / C * args.b_row];
  });
  sync_warp();
  T* own = slab + lane * kThreadStride;
#pragma unroll 1
  for (int c = 0; c < C && first + c < args.k; ++c) {
    T b[N];
#pragma unroll
    for (int i = 0; i < N; ++i) b[i] = own[i * C + c] * lift;
    thread_solve<N>(t, b);
#pragma unroll
    for (int i = 0; i < N; ++i) own[i * C + c] = info == 0 ? b[i] : kNaN<T>;
  }
  sync_warp();
#pragma unroll 1
  for (int e = lane; e < N * C * kWarp; e += kWarp) {
    const int s = e / (N * C);
    const int i = e % (N * C);
    T* X = args.X + ((system + s) * N + i / C) * args.k + first + i % C;
    if (!beyond(s, i % C)) *X = slab[s * kThreadStride + i];
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kWarp) spd_solve_thread_kernel(SpdSolveArgs<T> args, bool wide) {
  T* slab = reinterpret_cast<T*>(shared_memory());
  const int lane = thread_index();
  const int64_t system = block_index() * kWarp;
  const int live = static_cast<int>(args.batch - system < kWarp ? args.batch - system : kWarp);
  if (N == 1 && args.n == 0) {  // nothing to solve, but info to write
    if (lane < live) args.info[system + lane] = 0;
    return;
  }
  const T* A = args.A + system * args.a_batch;
  const T damping = lane < live ? args.damping[(system + lane) * args.damping_stride] : T(0);
  if (wide && live == kWarp) {
    fill_slab_from<N * N>(slab, lane, A);
  } else {
    fill_slab<N * N>(slab, lane, [&](int s, int i) {
      const T* entry = A + s * args.a_batch + i / N * args.a_row + i % N * args.a_col;
      return s < live && i % N <= i / N ? *entry : T(i % N == i / N);
    });
  }
  sync_warp();
  T t[triangle(N, 0)];
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int c = 0; c <= i; ++c) t[triangle(i, c)] = slab[lane * kThreadStride + i * N + c];
    t[triangle(i, i)] += damping;
  }
  const T lift = lift_tiny<N>(t);
  const int32_t info = thread_factor<N>(t);
  if (lane < live) args.info[system + lane] = info;

  if (args.k == 1) {
    sync_warp();
    thread_pass<N, 1>(args, system, live, 0, t, lift, info, slab);
    return;
  }
#pragma unroll 1
  for (int64_t first = 0; first < args.k; first += kThreadColumns) {
    sync_warp();
    thread_pass<N, kThreadColumns>(args, system, live, first, t, lift, info, slab);
  }
}

// n <= kSmallOrder and batch > 0.
template <class T>
void launch_spd_solve_small(const SpdSolveArgs<T>& args, void* stream) {
  const int64_t n = args.n;
  if (n <= kThreadOrder) {
    const bool wide = args.a_col == 1 && args.a_row == n && args.a_batch == n * n &&
                      starts_aligned(args.A);
    return with_thread_order(n == 0 ? 1 : n, [&](auto order) {
      constexpr int N = decltype(order)::value;
      launch<spd_solve_thread_kernel<T, N>>(thread_shape<T>(args.batch), stream, args, wide);
    });
  }
  if (n <= 16) return launch_spd_solve_group<T, 2, 2, 16>(args, stream);
  if constexpr (sizeof(T) == 4) {
    if (n <= 24) return launch_spd_solve_group<T, 2, 2, 24>(args, stream);
    if (n <= 32) return launch_spd_solve_group<T, 2, 2, 32>(args, stream);
    if (n <= 48) return launch_spd_solve_group<T, 4, 2, 48>(args, stream);
    return launch_spd_solve_group<T, 4, 4, 64>(args, stream);
  } else {
    if (n <= 32) return launch_spd_solve_group<T, 4, 2, 32>(args, stream);
    if (n <= 48) return launch_spd_solve_group<T, 4, 4, 48>(args, stream);
    return launch_spd_solve_group<T, 8, 4, 64>(args, stream);
  }
}

}  // namespace backmatch::cuda
