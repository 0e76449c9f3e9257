// Kernels with one planted fault each: the tests prove on them that the emulator sees it.
//
// Each block reverses its 64 numbers through shared memory and adds a neighbour's value.
#pragma once

#include <platform.cuh>

namespace backmatch::cuda {

enum class Fault {
  kNone,
  kMissingBarrier,
  kDivergentBarrier,
  kMissingWarpBarrier,
  kUninitialised,
  kOutOfBounds,
  kWrittenInput,
  kSharedOutput,
  kMisaligned,
  kCount
};

constexpr int kPlantedThreads = 64;

struct PlantedArgs {
  const int32_t* in;  // one row of 64 a block
  int32_t* out;       // likewise
};

struct alignas(8) Pair {
  int32_t v[2];
};

template <Fault fault>
__global__ void planted_kernel(PlantedArgs args) {
  const int t = thread_index();
  const int warp_start = t / kWarp * kWarp;
  int32_t* row = reinterpret_cast<int32_t*>(shared_memory());
  const int64_t first = block_index() * kPlantedThreads;
  if (fault != Fault::kUninitialised || t != 0) row[t] = args.in[first + t];
  if (fault == Fault::kWrittenInput) const_cast<int32_t*>(args.in)[first + t] = 0;
  if (fault != Fault::kMissingBarrier) sync_block();
  if (fault == Fault::kMisaligned && t == 1) args.out[first] = vector_at<Pair>(row + t).v[0];
  int32_t value = row[kPlantedThreads - 1 - t + (fault == Fault::kOutOfBounds ? 1 : 0)];
  if (fault == Fault::kDivergentBarrier && t == 0) return;
  sync_block();
  row[t] = value;
  if (fault != Fault::kMissingWarpBarrier) sync_warp();
  value += row[warp_start + (t + 1) % kWarp];
  args.out[fault == Fault::kSharedOutput ? t : first + t] = value;
}

template <int fault = 0>
void launch_planted(int which, const PlantedArgs& args, int64_t blocks) {
  if constexpr (fault < static_cast<int>(Fault::kCount)) {
    if (which != fault) return launch_planted<fault + 1>(which, args, blocks);
    const LaunchShape shape{blocks, kPlantedThreads, kPlantedThreads * int64_t(sizeof(int32_t))};
    launch<planted_kernel<static_cast<Fault>(fault)>>(shape, nullptr, args);
  }
}

// C (8, 8) += A (8, 4) B (4, 8) by one warp, matrices row-major.
struct ProductArgs {
  const double* A;
  const double* B;
  double* C;
};

inline __global__ void product_kernel(ProductArgs args) {
  const int lane = thread_index();
  double* own = args.C + lane / 4 * 8 + lane % 4 * 2;
  double c[2] = {own[0], own[1]};
  multiply_add_8x8x4(c, args.A[lane], args.B[lane % 4 * 8 + lane / 4]);
  own[0] = c[0];
  own[1] = c[1];
}

inline void launch_product(const ProductArgs& args) {
  launch<product_kernel>(LaunchShape{1, kWarp, 0}, nullptr, args);
}

// C (16, 8) += A (16, 16) B (16, 8) by one warp, A and B in bf16 (bits), matrices row-major.
struct SplitProductArgs {
  const uint16_t* A;
  const uint16_t* B;
  float* C;
};

inline __global__ void split_product_kernel(SplitProductArgs args) {
  const int g = thread_index() / 4, t = thread_index() % 4;
  const auto pair = [](uint32_t low, uint32_t high) { return low | high << 16; };
  uint32_t a[4], b[2];
  for (int q = 0; q < 4; ++q) {
    const uint16_t* place = args.A + (g + q % 2 * 8) * 16 + q / 2 * 8 + 2 * t;
    a[q] = pair(place[0], place[1]);
  }
  for (int q = 0; q < 2; ++q) {
    const uint16_t* place = args.B + (q * 8 + 2 * t) * 8 + g;
    b[q] = pair(place[0], place[8]);
  }
  float c[4];
  for (int e = 0; e < 4; ++e) c[e] = args.C[(g + e / 2 * 8) * 8 + 2 * t + e % 2];
  multiply_add_16x8x16(c, a, b);
  for (int e = 0; e < 4; ++e) args.C[(g + e / 2 * 8) * 8 + 2 * t + e % 2] = c[e];
}

inline void launch_split_product(const SplitProductArgs& args) {
  launch<split_product_kernel>(LaunchShape{1, kWarp, 0}, nullptr, args);
}

}  // namespace backmatch::cuda
