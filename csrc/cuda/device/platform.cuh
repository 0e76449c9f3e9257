// The device side of the seam between the kernels and the machine that runs them.
//
// Kernels name no CUDA variable or intrinsic; they call the functions below, and so their
// unmodified source also compiles for the host. Which side a build gets is decided by its include
// path alone: this folder for nvcc, tests/cuda_host (same file name, same functions, each CUDA
// thread a fiber) for the tests that execute the kernels on machines without a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "dry_run.h"
#include "kernel_name.h"

namespace backmatch::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
// The same number, of which the compiler forgets that it never changes: what follows from it (lanes,
// addresses) is then computed where it is used, not kept in registers through the whole kernel.
__device__ __forceinline__ int recomputed(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ __forceinline__ int thread_index_here() {
  const int index = recomputed(thread_index());
  __builtin_assume(index >= 0);
  return index;
}
__device__ __forceinline__ int block_threads() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int64_t block_index() { return blockIdx.x; }
__device__ __forceinline__ int64_t grid_blocks() { return gridDim.x; }

// Reached by all threads of the block; orders their shared and global accesses.
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// The same among the 32 lanes of the own warp.
__device__ __forceinline__ void sync_warp() { __syncwarp(kAllLanes); }

// Either, for code that a warp or a block executes.
template <bool kOneWarp>
__device__ __forceinline__ void sync_group() {
  if constexpr (kOneWarp) {
    sync_warp();
  } else {
    sync_block();
  }
}

// The value of lane `source` of the own group of `width` lanes; all 32 lanes of the warp take part.
template <class T>
__device__ __forceinline__ T shuffle(T value, int source, int width) {
  return __shfl_sync(kAllLanes, value, source, width);
}

// Bit l is set when lane l passes true; all 32 lanes of the warp take part.
__device__ __forceinline__ unsigned ballot(bool predicate) {
  return __ballot_sync(kAllLanes, predicate);
}

// The elements at `pointer` as one vector V, read or written by one instruction: every access
// wider than an element goes through here. `pointer` is a multiple of alignof(V).
template <class V, class T>
__device__ __forceinline__ V& vector_at(T* pointer) {
  return *reinterpret_cast<V*>(pointer);
}

// C += A B in double on the matrix units, by all 32 lanes of the warp. A is 8 x 4, B 4 x 8, C 8 x 8:
// a = A[lane / 4, lane % 4], b = B[lane % 4, lane / 4], c[i] = C[lane / 4, 2 (lane % 4) + i].
// Products and sums are those of fused multiply-adds; their order within one call is the device's.
__device__ __forceinline__ void multiply_add_8x8x4(double (&c)[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c[0]), "+d"(c[1])
      : "d"(a), "d"(b));
}

// C += A B on the matrix units, by all 32 lanes of the warp: A and B in bf16, C and sums in float.
// A is 16 x 16, B 16 x 8, C 16 x 8. With g = lane / 4 and t = lane % 4, each 32-bit number holds two
// neighbours in the inner dimension, the first in the lower half: a = A[g, 2t], A[g + 8, 2t],
// A[g, 2t + 8], A[g + 8, 2t + 8]; b = B[2t, g], B[2t + 8, g]; and c = C[g, 2t], C[g, 2t + 1],
// C[g + 8, 2t], C[g + 8, 2t + 1]. Products are exact; the sum of one call is cut off, not rounded.
__device__ __forceinline__ void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 1 / sqrt(value) to two units in the last place: one instruction in float, where a correctly rounded
// root and division are two subroutines. NaN for value < 0, infinity for 0.
__device__ __forceinline__ float reciprocal_sqrt(float value) { return rsqrtf(value); }
__device__ __forceinline__ double reciprocal_sqrt(double value) { return rsqrt(value); }

// Copies 16 bytes from global to shared memory, both multiples of 16, while the thread goes on. It
// may count on them, its own copies only, after wait_for_copies.
__device__ __forceinline__ void copy_to_shared(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ __forceinline__ int count_bits(unsigned bits) { return __popc(bits); }

// The block's dynamic shared memory: the only way the kernels reach any.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char backmatch_shared[];
  return backmatch_shared;
}

inline void check(const std::string& what, cudaError_t status) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // or the next launch would find this error and report it as its own
    throw std::runtime_error("backmatch CUDA: " + what + ": " + cudaGetErrorString(status));
  }
}

// Limits of the current device, or of the dry run's.
inline DeviceLimits device_limits() {
  if (const DryRun* dry = DryRun::active()) return dry->limits;
  int device = 0, shared = 0, multiprocessors = 0;
  check("current device", cudaGetDevice(&device));
  check("shared memory limit",
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check("multiprocessor count",
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return {shared, multiprocessors};
}

// Every kernel starts here: opts in to large shared memory, launches, and checks both; in a dry run
// it is only noted. The opt-in belongs to the kernel, not to the launch, and launches of several
// host threads (the bindings release the GIL) and captured graphs share it. So it is always the
// device's limit: with what each launch needs, one thread could lower it between the other's opt-in
// and launch, which would then fail.
template <auto kernel, class... Args>
void launch(const LaunchShape& shape, void* stream, Args... args) {
  constexpr int64_t kSharedWithoutOptIn = 48 * 1024;
  constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;
  static const std::string name = kernel_name(__PRETTY_FUNCTION__);
  if (shape.blocks > kMaxBlocks) {
    throw std::invalid_argument("backmatch CUDA: " + name + ": needs " +
                                std::to_string(shape.blocks) + " blocks, at most " +
                                std::to_string(kMaxBlocks) + " fit a launch; split the batch");
  }
  if (DryRun* dry = DryRun::active()) return dry->launches.push_back({name, shape});
  if (shape.shared_bytes > kSharedWithoutOptIn) {
    check(name, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(device_limits().shared_bytes)));
  }
  kernel<<<dim3(static_cast<unsigned>(shape.blocks)), dim3(static_cast<unsigned>(shape.threads)),
           static_cast<std::size_t>(shape.shared_bytes), static_cast<cudaStream_t>(stream)>>>(
      args...);
  check(name, cudaGetLastError());
}

}  // namespace backmatch::cuda
