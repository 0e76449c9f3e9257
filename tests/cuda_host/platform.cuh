// The host side of the seam between the kernels and the machine that runs them: the same functions
// as csrc/cuda/device/platform.cuh, on the block emulator. Found instead of that file because the
// tests compile the kernels with this folder on the include path.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/kernel_name.h"
#include "emulator.h"
#include "memory_check.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace backmatch::cuda {

constexpr int kWarp = emulator::kWarp;

inline int thread_index() { return emulator::thread_index(); }
inline int recomputed(int value) { return value; }
inline int thread_index_here() { return thread_index(); }
inline int block_threads() { return emulator::shape().threads; }
inline int64_t block_index() { return emulator::block_index(); }
inline int64_t grid_blocks() { return emulator::shape().blocks; }

// A barrier knows where it is called, so that a test can leave it out.
struct Place {
  const char* file;
  int line;
};

inline void sync_block(Place at = {__builtin_FILE(), __builtin_LINE()}) {
  if (!emulator::is_left_out(at.file, at.line)) emulator::sync_block();
}
inline void sync_warp(Place at = {__builtin_FILE(), __builtin_LINE()}) {
  if (!emulator::is_left_out(at.file, at.line)) emulator::sync_warp();
}
template <bool kOneWarp>
void sync_group(Place at = {__builtin_FILE(), __builtin_LINE()}) {
  if constexpr (kOneWarp) {
    sync_warp(at);
  } else {
    sync_block(at);
  }
}

template <class T>
inline T shuffle(T value, int source, int width) {
  const int group = thread_index() % kWarp / width * width;
  emulator::exchange(&value, sizeof(T), group + source % width, &value);
  return value;
}

template <class V, class T>
V& vector_at(T* pointer) {
  emulator::require_aligned(pointer, alignof(V));
  return *reinterpret_cast<V*>(pointer);
}

inline void multiply_add_8x8x4(double (&c)[2], double a, double b) {
  const double own[2] = {a, b};
  const auto* all = emulator::share(own, sizeof(own));
  const auto value = [&](int lane, int which) {
    double result;
    std::memcpy(&result, all[lane] + which * sizeof(double), sizeof(double));
    return result;
  };
  const int lane = thread_index() % kWarp;
  for (int i = 0; i < 2; ++i) {
    const int column = lane % 4 * 2 + i;
    for (int k = 0; k < 4; ++k) {
      c[i] = std::fma(value(lane / 4 * 4 + k, 0), value(column * 4 + k, 1), c[i]);
    }
  }
}

// Sums are exact to double and cut off at the end, as far from rounding as a device may be.
inline void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto* all = emulator::share(own, sizeof(own));
  const int lane = thread_index() % kWarp;
  const auto value = [&](int source, int word, int half) {
    uint32_t bits;
    std::memcpy(&bits, all[source] + word * sizeof(bits), sizeof(bits));
    bits = half == 0 ? bits << 16 : bits & 0xffff0000u;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return static_cast<double>(result);
  };
  double sum[4] = {c[0], c[1], c[2], c[3]};
  for (int k = 0; k < 16; ++k) {
    const double left[2] = {value(lane / 4 * 4 + k % 8 / 2, k / 8 * 2, k % 2),
                            value(lane / 4 * 4 + k % 8 / 2, k / 8 * 2 + 1, k % 2)};
    const double right[2] = {value(lane % 4 * 8 + k % 8 / 2, 4 + k / 8, k % 2),
                             value(lane % 4 * 8 + 4 + k % 8 / 2, 4 + k / 8, k % 2)};
    for (int e = 0; e < 4; ++e) sum[e] += left[e / 2] * right[e % 2];
  }
  for (int e = 0; e < 4; ++e) {
    c[e] = static_cast<float>(sum[e]);
    if (std::abs(static_cast<double>(c[e])) > std::abs(sum[e])) c[e] = std::nextafter(c[e], 0.0f);
  }
}

template <class T>
T reciprocal_sqrt(T value) {
  return T(1) / std::sqrt(value);
}

// A copy takes place when the thread waits for it, as late as on a device.
inline void copy_to_shared(void* shared, const void* global) {
  emulator::require_aligned(shared, 16);
  emulator::require_aligned(global, 16);
  emulator::pending_copies().push_back({shared, global});
}
inline void wait_for_copies(Place at = {__builtin_FILE(), __builtin_LINE()}) {
  if (emulator::is_left_out(at.file, at.line)) return;
  auto& own = emulator::pending_copies();
  for (const emulator::PendingCopy& copy : own) {
    const auto* from = static_cast<const uint64_t*>(copy.from);
    auto* to = static_cast<uint64_t*>(copy.to);
    to[0] = from[0];
    to[1] = from[1];
  }
  own.clear();
}

inline unsigned ballot(bool predicate) { return emulator::ballot(predicate); }
inline int count_bits(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned char* shared_memory() { return emulator::shared_memory(); }

using DeviceLimits = emulator::DeviceLimits;
using LaunchShape = emulator::LaunchShape;

inline DeviceLimits device_limits() { return emulator::device_limits(); }

template <auto kernel, class... Args>
void launch(const LaunchShape& shape, void*, Args... args) {
  const std::string name = kernel_name(__PRETTY_FUNCTION__);
  emulator::run(name.c_str(), shape, [&] { kernel(args...); });
}

}  // namespace backmatch::cuda
