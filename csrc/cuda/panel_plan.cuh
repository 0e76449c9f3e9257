// How a launcher divides a batch over blocks, shared memory and workspace (host code).
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "panel_stage.cuh"

namespace backmatch::cuda {

constexpr int kPanelThreads = 256;
constexpr int kMaxColumns = 32;
constexpr int64_t kMaxOrder = int64_t(1) << 18;  // keeps counts of quads and rows in 32 bits
constexpr int64_t kSharedHeader = 64;            // status and counts, before the panels

// Enough blocks to fill any device several times over; the kernels stride over the rest.
constexpr int64_t kBlocksPerMultiprocessor = 64;
// Blocks that work in global memory: the resident ones, one a multiprocessor since the stage takes
// its shared memory, and no more than the budget holds.
constexpr int64_t kWorkspaceBudget = int64_t(256) << 20;

// What a kernel needs to know of its launch.
struct PanelLayout {
  int columns;         // right-hand sides per pass
  int on_chip_tiles;   // systems of at most so many tiles are solved in shared memory
  int64_t slot_bytes;  // workspace of one block for the larger ones; 0 where there are none
  StageShape stage;    // their stage in shared memory
};

struct PanelPlan {
  PanelLayout layout;
  LaunchShape shape;
  int64_t workspace_bytes;
};

inline void check_order(int64_t n) {
  if (n > kMaxOrder) {
    throw std::invalid_argument("backmatch CUDA: n must be at most " + std::to_string(kMaxOrder) +
                                ", got " + std::to_string(n));
  }
}

inline void check_columns(int64_t k) {
  constexpr int64_t kMostColumns = int64_t(1) << 30;  // a pass may begin beyond the last one
  if (k > kMostColumns) {
    throw std::invalid_argument("backmatch CUDA: k must be at most " +
                                std::to_string(kMostColumns) + ", got " + std::to_string(k));
  }
}

__host__ __device__ __forceinline__ constexpr int tiles_of(int64_t n) {
  return static_cast<int>((n + kTile - 1) / kTile);
}

// Bytes of a system of `tiles` tiles: factor, right-hand sides, `row_bytes` more for each row.
template <class T>
constexpr int64_t system_bytes(int64_t tiles, int64_t columns, int64_t row_bytes) {
  return panel_offset(tiles) * int64_t(sizeof(T)) +
         tiles * kTile * (columns * int64_t(sizeof(T)) + row_bytes);
}

// Threads of a block that solves a system of so many tiles on chip. One warp factors diagonal
// tiles, the others share the updates: few threads, so that as many blocks as shared memory allows
// find registers on the multiprocessor and hide each other's chains.
template <class T>
constexpr int panel_threads(int tiles) {
  if (tiles > (sizeof(T) == 4 ? 14 : 10)) return 256;
  if (tiles > (sizeof(T) == 4 ? 10 : 6)) return 192;
  if (sizeof(T) == 8) return 128;
  return tiles > 6 ? 96 : 64;
}

// Blocks of so many threads for which a multiprocessor's 65,536 registers are budgeted: 128 a
// thread, what the float kernels' 8 x 8 pieces need, where several blocks are to share it.
constexpr int panel_blocks(int threads) {
  return threads == 64 ? 8 : threads == 96 ? 5 : threads == 128 ? 4 : threads == 192 ? 2 : 1;
}

// Calls call(std::integral_constant<int, threads>) with the number of threads as a constant.
template <class T, class Call>
void with_panel_threads(int threads, const Call& call) {
  if (threads == 256) return call(std::integral_constant<int, 256>());
  if (threads == 192) return call(std::integral_constant<int, 192>());
  if constexpr (sizeof(T) == 8) {
    call(std::integral_constant<int, 128>());
  } else if (threads == 96) {
    call(std::integral_constant<int, 96>());
  } else {
    call(std::integral_constant<int, 64>());
  }
}

template <class T>
constexpr int64_t stage_bytes(const StageShape& shape) {
  return stage_tiles(shape) * kTileSize * int64_t(sizeof(T));
}

// The widest stage whose blocks have at least as many rows below their diagonal tiles.
template <class T>
StageShape stage_shape(const DeviceLimits& limits, int tiles) {
  for (int width = kMaxStageWidth; width > 0; --width) {
    int rows = 0;
    while (rows < tiles &&
           kSharedHeader + stage_bytes<T>({width, rows + 1}) <= limits.shared_bytes) {
      ++rows;
    }
    if (rows >= width) return {width, rows};
  }
  throw std::invalid_argument("backmatch CUDA: a block's shared memory of " +
                              std::to_string(limits.shared_bytes) + " bytes holds no stage");
}

template <class T>
PanelPlan panel_plan(const DeviceLimits& limits, int64_t batch, int64_t n, int64_t k,
                     int64_t row_bytes) {
  const int tiles = tiles_of(n);
  const auto fits = [&](int64_t t, int64_t columns) {
    return kSharedHeader + system_bytes<T>(t, columns, row_bytes) <= limits.shared_bytes;
  };
  // Fewer columns per pass where that keeps the factor on chip; columns are independent, so the
  // choice never shows in the result.
  int64_t columns = std::clamp<int64_t>((k + kQuad - 1) / kQuad * kQuad, kQuad, kMaxColumns);
  if (fits(tiles, kQuad)) {
    while (!fits(tiles, columns)) columns -= kQuad;
  }
  int on_chip = 0;
  while (on_chip < tiles && fits(on_chip + 1, columns)) ++on_chip;

  PanelPlan plan{};
  plan.layout = {static_cast<int>(columns), on_chip, 0, {}};
  plan.shape.threads = panel_threads<T>(on_chip);
  plan.shape.shared_bytes = kSharedHeader + system_bytes<T>(on_chip, columns, row_bytes);
  plan.shape.blocks = std::min(batch, kBlocksPerMultiprocessor * limits.multiprocessors);
  if (on_chip < tiles) {
    plan.layout.slot_bytes = system_bytes<T>(tiles, columns, row_bytes);
    plan.layout.stage = stage_shape<T>(limits, tiles);
    const int64_t affordable = std::max<int64_t>(1, kWorkspaceBudget / plan.layout.slot_bytes);
    plan.workspace_bytes =
        std::min({batch, limits.multiprocessors, affordable}) * plan.layout.slot_bytes;
  }
  return plan;
}

// The launch for the systems that do not fit on chip.
template <class T>
LaunchShape staged_shape(const PanelPlan& plan) {
  return {plan.workspace_bytes / plan.layout.slot_bytes, kPanelThreads,
          kSharedHeader + stage_bytes<T>(plan.layout.stage)};
}

}  // namespace backmatch::cuda
