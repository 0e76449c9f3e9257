// The vector work of one conjugate gradient step for many systems, between two operator products:
// the device twin of csrc/cpu/cg_step.cpp, for operators that only the caller knows.
//
// Every system is a row. Rows up to kRowElements long take one kernel, a block a row: p^T q, then x
// and r with the new |r|^2, then the next direction, each vector element always by the same thread.
// Longer rows are cut into parts of equal length, a block a part, and one kernel each does the sums
// of p^T q, the update with the sums of |r|^2, and the direction; a last one, a block a row, sets
// the flags. What a kernel needs of the sums of the one before it adds up itself, in fixed order.
// A system that is not running is neither read nor written, so that steps enqueued too many do no
// harm and the host need not know who still runs.
// Where it synchronises: twice in each sum of a block, before the warps' sums are overwritten and
// before they are read. Flags and rho of a row are read before its first barrier and written by
// thread 0 after its last; across blocks, in a kernel that only reads them before one that writes.
// The bits depend on the row and n alone: neither on the number of rows nor on the grid.
// Considered and rejected: rows in registers between the sums (16 values a thread at most; the
// second reading comes from L1 or L2), one block a row for any length (one multiprocessor has 1/132
// of the bandwidth), a count of the running systems by atomics (the caller needs it once in several
// steps and sums the flags then), packs of 16 bytes (rows of odd length are not aligned; four
// scalar loads in flight fill a line a warp as well).
#pragma once

#include <algorithm>

#include "../kernels.h"
#include "krylov_product.cuh"

namespace backmatch::cuda {

constexpr int64_t kRowElements = 8192;
constexpr int64_t kMostParts = 1024;
constexpr int kStepThreads = 256;   // of a part
constexpr int kMostStepThreads = 512;
constexpr int kAtOnce = 4;          // elements of a thread whose loads are in flight together

// The sum of `value` over the block, in every thread.
template <class T>
__device__ __forceinline__ T block_total(T value, T* scratch) {
  T one[1] = {value};
  sync_block();
  combine_lanes(one, Add(), scratch);
  sync_block();
  return combine_warps<1>(scratch, 0, Add());
}

// body(i, last) for the elements of this thread in [first, last), kAtOnce at a time.
template <class Body>
__device__ __forceinline__ void for_elements(int64_t first, int64_t last, const Body& body) {
  const int64_t stride = block_threads();
  for (int64_t i = first + thread_index(); i < last; i += kAtOnce * stride) body(i, stride);
}

template <class T>
__device__ __forceinline__ T dot(const T* a, const T* b, int64_t first, int64_t last) {
  T sum = T(0);
  for_elements(first, last, [&](int64_t i, int64_t stride) {
    T left[kAtOnce], right[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const bool in = i + u * stride < last;
      left[u] = in ? a[i + u * stride] : T(0);
      right[u] = in ? b[i + u * stride] : T(0);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) sum += left[u] * right[u];
  });
  return sum;
}

// x += alpha p, r -= alpha q; returns this thread's share of |r|^2.
template <class T>
__device__ __forceinline__ T advance(T alpha, const T* p, const T* q, T* x, T* r, int64_t first,
                                     int64_t last) {
  T sum = T(0);
  for_elements(first, last, [&](int64_t i, int64_t stride) {
    T along[kAtOnce], product[kAtOnce], place[kAtOnce], rest[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t at = i + u * stride;
      const bool in = at < last;
      along[u] = in ? p[at] : T(0);
      product[u] = in ? q[at] : T(0);
      place[u] = in ? x[at] : T(0);
      rest[u] = in ? r[at] : T(0);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t at = i + u * stride;
      if (at >= last) continue;
      place[u] += alpha * along[u];
      rest[u] -= alpha * product[u];
      x[at] = place[u];
      r[at] = rest[u];
      sum += rest[u] * rest[u];
    }
  });
  return sum;
}

// p = z + beta p
template <class T>
__device__ __forceinline__ void turn(T beta, const T* z, T* p, int64_t first, int64_t last) {
  for_elements(first, last, [&](int64_t i, int64_t stride) {
    T towards[kAtOnce], along[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const bool in = i + u * stride < last;
      towards[u] = in ? z[i + u * stride] : T(0);
      along[u] = in ? p[i + u * stride] : T(0);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (i + u * stride < last) p[i + u * stride] = towards[u] + beta * along[u];
    }
  });
}

template <class T>
__device__ __forceinline__ bool is_sound(T curvature, T rho) {
  return curvature > T(0) && curvature <= kLargestFinite<T> && rho > T(0);
}

template <class T>
__device__ __forceinline__ bool goes_on(const CgStepArgs<T>& a, int64_t s, T square,
                                        int64_t steps) {
  return std::sqrt(square) > a.target[s] && steps < a.max_steps;
}

// Thread 0 writes what the step makes of system s.
template <class T>
__device__ __forceinline__ void settle(const CgStepArgs<T>& a, int64_t s, bool sound, bool more,
                                       int64_t steps, T square) {
  if (thread_index() != 0) return;
  if (!sound) a.alive[s] = 0;
  if (sound) a.steps[s] = steps;
  if (!more) a.running[s] = 0;
  if (more && !a.preconditioned) a.rho[s] = square;
}

// ---- a block a row ------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kMostStepThreads, 1) cg_step_rows_kernel(CgStepArgs<T> args) {
  T* scratch = reinterpret_cast<T*>(shared_memory());
  for (int64_t s = block_index(); s < args.systems; s += grid_blocks()) {
    if (!args.running[s]) continue;
    const int64_t at = s * args.n;
    const T rho = args.rho[s];
    const int64_t steps = args.steps[s] + 1;
    const T curvature = block_total(dot(args.P + at, args.Q + at, 0, args.n), scratch);
    const bool sound = is_sound(curvature, rho);
    if (!sound) {
      settle(args, s, false, false, steps, rho);
      continue;
    }
    const T share =
        advance(rho / curvature, args.P + at, args.Q + at, args.X + at, args.R + at, 0, args.n);
    const T square = block_total(share, scratch);
    const bool more = goes_on(args, s, square, steps);
    if (more && !args.preconditioned) turn(square / rho, args.R + at, args.P + at, 0, args.n);
    settle(args, s, true, more, steps, square);
  }
}

template <class T>
__global__ void __launch_bounds__(kMostStepThreads, 1)
    cg_direction_rows_kernel(CgDirectionArgs<T> args) {
  T* scratch = reinterpret_cast<T*>(shared_memory());
  for (int64_t s = block_index(); s < args.systems; s += grid_blocks()) {
    if (!args.running[s]) continue;
    const int64_t at = s * args.n;
    const T before = args.rho[s];
    const T rho = block_total(dot(args.R + at, args.Z + at, 0, args.n), scratch);
    turn(rho / before, args.Z + at, args.P + at, 0, args.n);
    if (thread_index() == 0) args.rho[s] = rho;
  }
}

// ---- a block a part of a row --------------------------------------------------------------------

// Sums over the parts of each row: curvature or r^T z, and |r|^2, (systems, parts) each.
template <class T>
struct PartSums {
  int64_t parts, length;  // of a part, but for the last
  T *first, *second;
};

template <class T>
__device__ __forceinline__ T row_total(const T* sums, int64_t s, int64_t parts, T* scratch) {
  T value = T(0);
  for (int64_t part = thread_index(); part < parts; part += block_threads()) {
    value += sums[s * parts + part];
  }
  return block_total(value, scratch);
}

// work(s, first, last, task) for the parts of running systems that fall to this block.
template <class T, class Args, class Work>
__device__ __forceinline__ void for_parts(const Args& args, const PartSums<T>& sums,
                                          const Work& work) {
  for (int64_t task = block_index(); task < args.systems * sums.parts; task += grid_blocks()) {
    const int64_t s = task / sums.parts, first = task % sums.parts * sums.length;
    if (!args.running[s]) continue;
    const int64_t last = first + sums.length < args.n ? first + sums.length : args.n;
    work(s, first, last, task);
  }
}

template <class T, class Args>
__global__ void __launch_bounds__(kStepThreads, 1)
    cg_part_dots_kernel(Args args, PartSums<T> sums, const T* left, const T* right) {
  T* scratch = reinterpret_cast<T*>(shared_memory());
  for_parts(args, sums, [&](int64_t s, int64_t first, int64_t last, int64_t task) {
    const int64_t at = s * args.n;
    const T sum = block_total(dot(left + at, right + at, first, last), scratch);
    if (thread_index() == 0) sums.first[task] = sum;
  });
}

template <class T>
__global__ void __launch_bounds__(kStepThreads, 1)
    cg_part_advance_kernel(CgStepArgs<T> args, PartSums<T> sums) {
  T* scratch = reinterpret_cast<T*>(shared_memory());
  for_parts(args, sums, [&](int64_t s, int64_t first, int64_t last, int64_t task) {
    const int64_t at = s * args.n;
    const T curvature = row_total(sums.first, s, sums.parts, scratch), rho = args.rho[s];
    if (!is_sound(curvature, rho)) return;
    const T share = advance(rho / curvature, args.P + at, args.Q + at, args.X + at, args.R + at,
                            first, last);
    const T sum = block_total(share, scratch);
    if (thread_index() == 0) sums.second[task] = sum;
  });
}

template <class T>
__global__ void __launch_bounds__(kStepThreads, 1)
    cg_part_turn_kernel(CgStepArgs<T> args, PartSums<T> sums) {
  T* scratch = reinterpret_cast<T*>(shared_memory());
  for_parts(args, sums, [&](int64_t s, int64_t first, int64_t last, int64_t) {
    const int64_t at = s * args.n;
    const T rho = args.rho[s];
    if (!is_sound(row_total(sums.first, s, sums.parts, scratch), rho)) return;
    const T square = row_total(sums.second, s, sums.parts, scratch);
    if (!goes_on(args, s, square, args.steps[s] + 1)) return;
    turn(square / rho, args.R + at, args.P + at, first, last);
  });
}

template <class T>
__global__ void __launch_bounds__(kStepThreads, 1)
    cg_part_settle_kernel(CgStepArgs<T> args, PartSums<T> sums) {
  T* scratch = reinterpret_cast<T*>(shared_memory());
  for (int64_t s = block_index(); s < args.systems; s += grid_blocks()) {
    if (!args.running[s]) continue;
    const T rho = args.rho[s];
    const int64_t steps = args.steps[s] + 1;
    const bool sound = is_sound(row_total(sums.first, s, sums.parts, scratch), rho);
    const T square = sound ? row_total(sums.second, s, sums.parts, scratch) : rho;
    settle(args, s, sound, sound && goes_on(args, s, square, steps), steps, square);
  }
}

template <class T>
__global__ void __launch_bounds__(kStepThreads, 1)
    cg_part_direction_kernel(CgDirectionArgs<T> args, PartSums<T> sums) {
  T* scratch = reinterpret_cast<T*>(shared_memory());
  for_parts(args, sums, [&](int64_t s, int64_t first, int64_t last, int64_t task) {
    const int64_t at = s * args.n;
    const T rho = row_total(sums.first, s, sums.parts, scratch);
    turn(rho / args.rho[s], args.Z + at, args.P + at, first, last);
    if (task % sums.parts == 0 && thread_index() == 0) sums.second[s] = rho;
  });
}

template <class T>
__global__ void __launch_bounds__(kStepThreads, 1)
    cg_part_rho_kernel(CgDirectionArgs<T> args, PartSums<T> sums) {
  const int64_t s = block_index() * block_threads() + thread_index();
  if (s < args.systems && args.running[s]) args.rho[s] = sums.second[s];
}

// ---- launchers ----------------------------------------------------------------------------------

// Parts of a row; 1: the kernels of whole rows.
inline int64_t step_parts(int64_t n) {
  if (n <= kRowElements) return 1;
  return std::min((n + kRowElements - 1) / kRowElements, kMostParts);
}

template <class T>
LaunchShape step_shape(const DeviceLimits& limits, int64_t tasks, int64_t threads) {
  constexpr int64_t kBlocksPerMultiprocessor = 64;
  return {std::min(tasks, kBlocksPerMultiprocessor * limits.multiprocessors),
          static_cast<int>(threads), threads / kWarp * int64_t(sizeof(T))};
}

// A block a row, about 8 elements a thread.
template <class T>
LaunchShape row_shape(const DeviceLimits& limits, int64_t systems, int64_t n) {
  const int64_t warps = std::clamp<int64_t>(n / (8 * kWarp), 1, kMostStepThreads / kWarp);
  return step_shape<T>(limits, systems, warps * kWarp);
}

template <class T>
PartSums<T> part_sums(int64_t systems, int64_t n, void* workspace) {
  const int64_t parts = step_parts(n);
  T* first = static_cast<T*>(workspace);
  return {parts, (n + parts - 1) / parts, first, first + systems * parts};
}

template <class T>
int64_t cg_step_workspace(int64_t systems, int64_t n) {
  return step_parts(n) == 1 ? 0 : 2 * systems * step_parts(n) * int64_t(sizeof(T));
}

template <class T>
void launch_cg_step(const CgStepArgs<T>& args, void* workspace, void* stream) {
  if (args.systems == 0 || args.n == 0) return;
  const DeviceLimits limits = device_limits();
  const int64_t parts = step_parts(args.n);
  if (parts == 1) {
    return launch<cg_step_rows_kernel<T>>(row_shape<T>(limits, args.systems, args.n), stream, args);
  }
  const auto sums = part_sums<T>(args.systems, args.n, workspace);
  const LaunchShape shape = step_shape<T>(limits, args.systems * parts, kStepThreads);
  launch<cg_part_dots_kernel<T, CgStepArgs<T>>>(shape, stream, args, sums,
                                                static_cast<const T*>(args.P), args.Q);
  launch<cg_part_advance_kernel<T>>(shape, stream, args, sums);
  if (!args.preconditioned) launch<cg_part_turn_kernel<T>>(shape, stream, args, sums);
  launch<cg_part_settle_kernel<T>>(step_shape<T>(limits, args.systems, kStepThreads), stream, args,
                                   sums);
}

template <class T>
void launch_cg_direction(const CgDirectionArgs<T>& args, void* workspace, void* stream) {
  if (args.systems == 0 || args.n == 0) return;
  const DeviceLimits limits = device_limits();
  const int64_t parts = step_parts(args.n);
  if (parts == 1) {
    const LaunchShape shape = row_shape<T>(limits, args.systems, args.n);
    return launch<cg_direction_rows_kernel<T>>(shape, stream, args);
  }
  const auto sums = part_sums<T>(args.systems, args.n, workspace);
  const LaunchShape shape = step_shape<T>(limits, args.systems * parts, kStepThreads);
  launch<cg_part_dots_kernel<T, CgDirectionArgs<T>>>(shape, stream, args, sums, args.R, args.Z);
  launch<cg_part_direction_kernel<T>>(shape, stream, args, sums);
  const int64_t blocks = (args.systems + kStepThreads - 1) / kStepThreads;
  launch<cg_part_rho_kernel<T>>(LaunchShape{blocks, kStepThreads, 0}, stream, args, sums);
}

}  // namespace backmatch::cuda
