// G_j = Z^T diag(w_j) Z + damping_j I: many weightings of one Z, G full and symmetric.
//
// Only the lower triangle is summed; every entry is written twice from one sum, so G is symmetric
// to the bit. A group of threads owns a square of kSide x kSide entries of one system's G: a warp
// where n <= 32 (kSide = 8, 16, 32; four systems a block), else the block, with squares of 64 for
// n <= 64 and of 128 beyond (64 if the device's shared memory is short). The square is divided into warp tiles (gram_tile.cuh); warps whose
// tile lies above the diagonal or beyond n only help to load.
// The group goes through Z in windows of kWindow rows: it lists the active ones (active_rows.cuh),
// then takes them in chunks of 8 or 16 into shared memory. The next chunk is read into registers
// while the products of this one are summed. At the end the square passes through shared memory, so
// that both of its copies are written row by row.
// Who owns what: a square is written by its group alone; Z, w and damping are only read.
// Where it synchronises (a warp barrier for groups of one warp): after the square was noted, in and
// after the listing, after a chunk was stored, after it was used, and between writing the square to
// shared memory and reading it. The last chunk's second barrier also frees the list and the memory
// for the square. No atomics, nothing between groups.
//
// Floors for a system with a active rows: a n^2 / 2 multiply-adds and n^2 numbers written.
// Estimated from the instruction count, for a whole square of 128 and 16 active rows on an H100:
// 1210 issue slots and 1170 clocks of the matrix units in float, 2048 clocks of its matrix units in
// double; L2 delivers 14 and 16 bytes a clock meanwhile.
// Considered and rejected: keeping a chunk of Z in shared memory for several systems (their active
// rows differ, so that every tile would gather rows and apply weights by itself: an eighth more
// instructions in the inner loop, where loading costs as much in all), two buffers for chunks (one
// barrier less a chunk; at one block a multiprocessor a few per cent, else other blocks hide it),
// squares of 32 for n > 32 (twice the reads). See gram_tile.cuh for the formats of numbers.
#pragma once

#include "../kernels.h"
#include "gram_tile.cuh"

namespace backmatch::cuda {

constexpr int64_t kMaxGramOrder = int64_t(1) << 24;  // keeps numbers of squares in 32 bits

// Squares of the lower triangle of a matrix of order n.
template <int kSide>
__host__ __device__ __forceinline__ constexpr int64_t squares_of(int64_t n) {
  const int64_t side = (n + kSide - 1) / kSide;
  return side * (side + 1) / 2;
}

// Which square a group owns: rows from `top`, columns from `side` on of G of one system. Kept in
// shared memory, since the sums need the registers.
struct Square {
  int64_t system;
  int top, side;
};

// The group that owns a square of kSide, and its shared memory.
template <class T, int kSide>
struct SquareGroup {
  using Tile = WarpTile<T, kSide>;
  static constexpr int kColumns = kSide;
  static constexpr bool kOneWarp = kSide <= 32;
  static constexpr int kTilesDown = kSide / Tile::kRows;
  static constexpr int kTilesAcross = kSide / Tile::kColumns;
  static constexpr int kThreads = kWarp * kTilesDown * kTilesAcross;
  static constexpr int kPerBlock = kOneWarp ? 4 : 1;
  static constexpr int kBlockThreads = kThreads * kPerBlock;
  // Blocks on a multiprocessor: 128 registers a thread, too few where a thread loads most.
  static constexpr int kBlocks = kSide == 64 ? 3 : 512 / kBlockThreads;
  using Rows = typename Tile::Rows;
  static constexpr int kStride = Rows::stride(kSide);
  static constexpr int kSideSize = Rows::size(kSide);  // left or right
  static constexpr int kChunkSize = 2 * kSideSize;
  static constexpr int kSquareStride = kSide + 1;
  static constexpr int kSquareSize = kSide * kSquareStride;
  static constexpr int64_t kSharedBytes =
      (int64_t(kChunkSize > kSquareSize ? kChunkSize : kSquareSize) * sizeof(T) + 15) / 16 * 16 +
      ActiveRows<T>::kBytes + int64_t(sizeof(Square));
  // Entries of a chunk that a thread loads: of one column that kRowStep threads share.
  static constexpr int kRowStep = kThreads / kSide;
  static constexpr int kLoads = Rows::kChunk / kRowStep;
  static_assert(kRowStep * kSide == kThreads && kLoads * kRowStep == Rows::kChunk);
};

// This thread's entries of column `column` (in bytes) of a chunk, as far as its rows are active.
template <class S, class T>
__device__ __forceinline__ void load_column(const T* Z, const int64_t* row, int64_t column,
                                            int first, int active, T (&value)[S::kLoads]) {
#pragma unroll
  for (int q = 0; q < S::kLoads; ++q) {
    const int k = S::Rows::row(first, S::kRowStep, q);
    value[q] = k < active ? at_byte(Z, row[k] + column) : T(0);
  }
}

// Writes the square and its mirror image from shared memory, each thread a column of both.
template <class S, class T>
__device__ __forceinline__ void store_square(const WeightedGramArgs<T>& args, const Square& own,
                                             const T* square, int rank) {
  const int64_t n = args.n;
  const int column = rank % S::kColumns;
  const int first = rank / S::kColumns;
  const bool diagonal = own.top == own.side;
  const int rows = static_cast<int>(n - own.top < S::kColumns ? n - own.top : S::kColumns);
  const int columns = static_cast<int>(n - own.side < S::kColumns ? n - own.side : S::kColumns);
  T* G = args.G + own.system * n * n;
  T* place = G + (own.top + first) * n + own.side + column;
  for (int i = first; i < rows && column < columns; i += S::kRowStep, place += S::kRowStep * n) {
    const bool mirrored = diagonal && column > i;
    *place = square[mirrored ? column * S::kSquareStride + i : i * S::kSquareStride + column];
  }
  if (diagonal) return;
  place = G + (own.side + first) * n + own.top + column;
  for (int i = first; i < columns && column < rows; i += S::kRowStep, place += S::kRowStep * n) {
    *place = square[column * S::kSquareStride + i];
  }
}

// Sums the tile of this thread's warp over all active rows.
template <class S, class T>
__device__ __forceinline__ void sum_tile(const WeightedGramArgs<T>& args, const Square& square,
                                         const Group& group, int tile_row, int tile_column,
                                         bool busy, T* chunk, const ActiveRows<T>& rows,
                                         typename S::Tile& tile) {
  const int lane = group.rank % kWarp;
  const int own = group.rank % S::kColumns;
  const int first = group.rank / S::kColumns;
  T* left = chunk;
  T* right = left + S::kSideSize;
  const bool two_columns = S::kColumns >= 64 && square.top != square.side;
  const int windows = static_cast<int>((args.m + kWindow - 1) / kWindow);
  for (int window = 0; window < windows; ++window) {
    const int64_t base = int64_t(window) * kWindow;
    const int count = rows.template find<S::kOneWarp>(
        group, base, args.m, args.z_row,
        [&](int64_t row) { return args.w[square.system * args.w_batch + row * args.w_col]; },
        [](int, int64_t, T) {});
    sync_group<S::kOneWarp>();
    const int64_t column_bytes = args.z_col * int64_t(sizeof(T));
    const int64_t left_column = (square.top + own) * column_bytes;
    const int64_t right_column = (square.side + own) * column_bytes;
    const bool left_live = square.top + own < args.n;
    const bool right_live = square.side + own < args.n;
    T value[S::kLoads], other[S::kLoads];
    const auto load = [&](int start) {
      const int64_t* row = rows.offset + start;
      const int active = count - start;
      load_column<S>(args.Z, row, left_column, first, left_live ? active : 0, value);
      if (two_columns) {
        load_column<S>(args.Z, row, right_column, first, right_live ? active : 0, other);
      }
    };
    load(0);
    for (int start = 0; start < count; start += S::Rows::kChunk) {
#pragma unroll
      for (int q = 0; q < S::kLoads; ++q) {
        if (!two_columns) other[q] = value[q];
        value[q] *= rows.weight[start + S::Rows::row(first, S::kRowStep, q)];
      }
      S::Rows::put(left, S::kStride, own, first, S::kRowStep, value);
      S::Rows::put(right, S::kStride, own, first, S::kRowStep, other);
      sync_group<S::kOneWarp>();
      load(start + S::Rows::kChunk);
      if (busy) tile.add(left + tile_row, right + tile_column, S::kStride, lane);
      sync_group<S::kOneWarp>();
    }
  }
  tile.finish(lane);
}

template <class T, int kSide>
__global__ void __launch_bounds__((SquareGroup<T, kSide>::kBlockThreads),
                                  (SquareGroup<T, kSide>::kBlocks))
    weighted_gram_kernel(WeightedGramArgs<T> args) {
  using S = SquareGroup<T, kSide>;
  using Tile = typename S::Tile;
  const int member = thread_index() / S::kThreads;
  const Group group{thread_index() % S::kThreads, S::kThreads};
  const int64_t per_system = squares_of<kSide>(args.n);
  const int64_t unit = block_index() * S::kPerBlock + member;
  const int64_t system = unit / per_system;
  if (system >= args.batch) return;  // whole groups; without a barrier of the block below
  unsigned char* memory = shared_memory() + member * S::kSharedBytes;
  Square& square = *reinterpret_cast<Square*>(memory);
  if (group.rank == 0) {
    int down = 0, across = static_cast<int>(unit % per_system);
    while (across > down) across -= ++down;
    square = {system, down * kSide, across * kSide};
  }
  sync_group<S::kOneWarp>();

  const int lane = group.rank % kWarp;
  const int warp = group.rank / kWarp;
  // Rows of tiles are turned against each other, so that each quarter of a multiprocessor, which
  // takes every fourth warp, gets 2 or 3 of the 10 tiles of a diagonal square of 128.
  constexpr int kAcross = S::kTilesAcross;
  const int down = warp / kAcross;
  const int across = (warp + (kAcross - 1 - down) * (kAcross - 2 - down) / 2) % kAcross;
  const int tile_row = down * Tile::kRows;
  const int tile_column = across * Tile::kColumns;
  const bool below = square.top != square.side || tile_column < tile_row + Tile::kRows;
  const bool busy =
      below && square.top + tile_row < args.n && square.side + tile_column < args.n;
  const ActiveRows<T> rows(memory + sizeof(Square));
  T* store = reinterpret_cast<T*>(memory + sizeof(Square) + ActiveRows<T>::kBytes);
  Tile tile;
  sum_tile<S>(args, square, group, tile_row, tile_column, busy, store, rows, tile);

  const Square place = square;
  const T damping = args.damping[place.system * args.damping_stride];
  if (busy) {
    tile.visit(lane, [&](int i, int c, T sum) {
      const int row = tile_row + i, column = tile_column + c;
      const bool on_diagonal = place.top == place.side && row == column;
      store[row * S::kSquareStride + column] = on_diagonal ? sum + damping : sum;
    });
  }
  sync_group<S::kOneWarp>();
  store_square<S>(args, place, store, group.rank);
}

template <class T, int kSide>
void launch_weighted_gram_squares(const WeightedGramArgs<T>& args, void* stream) {
  using S = SquareGroup<T, kSide>;
  const int64_t units = args.batch * squares_of<kSide>(args.n);
  const LaunchShape shape{(units + S::kPerBlock - 1) / S::kPerBlock, S::kBlockThreads,
                          S::kSharedBytes * S::kPerBlock};
  launch<weighted_gram_kernel<T, kSide>>(shape, stream, args);
}

template <class T>
void launch_weighted_gram(const WeightedGramArgs<T>& args, void* stream) {
  if (args.n > kMaxGramOrder) {
    throw std::invalid_argument("backmatch CUDA: n must be at most " +
                                std::to_string(kMaxGramOrder) + ", got " + std::to_string(args.n));
  }
  if (args.batch == 0 || args.n == 0) return;
  if (args.n <= 8) return launch_weighted_gram_squares<T, 8>(args, stream);
  if (args.n <= 16) return launch_weighted_gram_squares<T, 16>(args, stream);
  if (args.n <= 32) return launch_weighted_gram_squares<T, 32>(args, stream);
  if (args.n <= 64) return launch_weighted_gram_squares<T, 64>(args, stream);
  // In double a square of 128 takes 133 KiB, which not every device has.
  if (SquareGroup<T, 128>::kSharedBytes > device_limits().shared_bytes) {
    return launch_weighted_gram_squares<T, 64>(args, stream);
  }
  launch_weighted_gram_squares<T, 128>(args, stream);
}

}  // namespace backmatch::cuda
