// How one system of any order lies in memory: packed 16-row panels of 16 x 16 tiles.
//
// The lower triangle, padded by rows of the identity to `tiles` tiles of 16, is kept as row panels.
// Panel I holds rows 16 I .. 16 I + 15 up to its diagonal tile, column after column, so tile (I, J)
// is the 256 numbers at panel_offset(I) + 256 J; inside it entry (r, c) lies at Tile<T>::at(r, c),
// in column c, its place among the 16 rows permuted. Right-hand sides are kept row-major, entry
// (i, c) at i * columns + c. The store may be shared memory or global workspace.
//
// Why permuted, and differently: the inner loops read and write tiles without bank conflicts.
//  - float: the rows of the lower half are swapped in pairs. A thread that updates an 8 x 8 piece
//    then reads four rows as one vector, and the threads of left and right pieces write columns of
//    different parity, that is, different halves of the 32 banks (panel_update.cuh).
//  - double: row quads are exchanged by column (r ^ 4 (c % 4)): the four columns that one
//    instruction of the matrix units takes lie in different banks, as do the accumulators.
// Four rows 4 q .. 4 q + 3 of a column stay one aligned vector, Tile<T>::quad(q, c), whose element v
// is row Tile<T>::row_in_quad(q, v).
// Considered and rejected: a padded column stride (6 % more memory; 16-byte alignment lost at 17),
// row-major tiles (a row's four entries are wanted by four different threads, never by one).
#pragma once

#include <platform.cuh>

namespace backmatch::cuda {

constexpr int kTile = 16;
constexpr int kTileSize = kTile * kTile;
constexpr int kQuad = 4;
constexpr int kQuadsPerTile = kTile / kQuad;

template <class T>
struct alignas(16) Quad {
  T v[kQuad];
};

template <class T>
struct Tile;

template <>
struct Tile<float> {
  __host__ __device__ static constexpr int at(int r, int c) { return c * kTile + (r ^ (r >> 3)); }
  __host__ __device__ static constexpr int row_at(int place, int) { return place ^ (place >> 3); }
  __host__ __device__ static constexpr int quad(int q, int c) { return c * kTile + q * kQuad; }
  __host__ __device__ static constexpr int row_in_quad(int q, int v) {
    return q * kQuad + (v ^ (q >> 1));
  }
};

template <>
struct Tile<double> {
  __host__ __device__ static constexpr int at(int r, int c) {
    return c * kTile + (r ^ (c % kQuad * kQuad));
  }
  __host__ __device__ static constexpr int row_at(int place, int c) {
    return place ^ (c % kQuad * kQuad);
  }
  __host__ __device__ static constexpr int quad(int q, int c) {
    return c * kTile + (q ^ (c % kQuad)) * kQuad;
  }
  __host__ __device__ static constexpr int row_in_quad(int q, int v) { return q * kQuad + v; }
};

template <class T>
struct PanelSystem {
  T* factor;        // panel_offset(tiles)
  T* rhs;           // tiles * kTile * columns, in the same store
  int tiles;        // order of the padded system / kTile
  int columns;      // right-hand sides, a multiple of kQuad
  int32_t* status;  // in shared memory: 0, or the LAPACK info of the factorisation
};

__host__ __device__ __forceinline__ constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Where panel I starts; with I = tiles, how many elements the factor takes.
__host__ __device__ __forceinline__ constexpr int64_t panel_offset(int64_t panel) {
  return panel * (panel + 1) / 2 * kTileSize;
}

// The tiles of a packed factor. What the algorithms take: tile(I, J) for J <= I.
template <class T>
struct PackedTiles {
  T* factor;
  __device__ __forceinline__ T* tile(int I, int J) const {
    return factor + panel_offset(I) + J * kTileSize;
  }
};

// Which way a matrix lies in memory: the direction in which neighbouring threads read it.
enum class Reading { kAlongRows, kDownColumns };

// The store is filled in units of four columns of a panel, in the order in which they lie there.
__device__ __forceinline__ int units_of(int tiles) { return 2 * tiles * (tiles + 1); }

struct UnitPlace {
  int unit = 0;
  int panel = 0;

  // Moves on to `next` >= unit.
  __device__ __forceinline__ void advance(int next) {
    unit = next;
    while (unit >= units_of(panel + 1)) ++panel;
  }
  __device__ __forceinline__ int column() const {
    return (unit - units_of(panel)) * kQuad;
  }
};

// Fills the factor's store: entry(i, c) for c <= i < n, the identity in the padding. The upper
// halves of the diagonal tiles are set to 0. A warp takes half a unit, 8 rows of four columns or 16
// of two; a thread fetches kBatch entries before it stores the first, to have so many under way.
template <class T, class Entry>
__device__ __forceinline__ void load_matrix(const PanelSystem<T>& s, int n, const Entry& entry,
                                            Reading reading = Reading::kAlongRows) {
  constexpr int kBatch = 4;
  const bool down = reading == Reading::kDownColumns;
  const int lane = thread_index_here() % kWarp;
  const int r = down ? lane % kTile : lane / kQuad;
  const int c = down ? lane / kTile : lane % kQuad;
  const int next_r = down ? 0 : kTile / 2;
  const int next_c = down ? kQuad / 2 : 0;
  const int step = block_threads() / kWarp;
  const int halves = 2 * units_of(s.tiles);
  UnitPlace place;
#pragma unroll 1
  for (int first = thread_index_here() / kWarp; first < halves; first += kBatch * step) {
    T value[kBatch] = {};  // set in any case, or the last round's would be kept for this one
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int half = first + b * step;
      if (half >= halves) break;
      place.advance(half / 2);
      const int i = place.panel * kTile + r + half % 2 * next_r;
      const int column = place.column() + c + half % 2 * next_c;
      value[b] = column <= i && i < n ? entry(i, column) : T(column == i);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int half = first + b * step;
      if (half >= halves) break;
      const int place_in_unit = Tile<T>::at(r + half % 2 * next_r, c + half % 2 * next_c);
      s.factor[int64_t(half / 2) * kQuad * kTile + place_in_unit] = value[b];
    }
  }
}

// The same for rows that are contiguous and aligned: row_quad(i, c) are the entries (i, c .. c + 3),
// all of them in the lower triangle; entry(i, c) serves the quads that the diagonal cuts.
template <class T, class Entry, class RowQuad>
__device__ __forceinline__ void load_matrix_by_quads(const PanelSystem<T>& s, int n,
                                                     const Entry& entry, const RowQuad& row_quad) {
  constexpr int kUnit = kTile * kQuad;
  constexpr int kBatch = 16 / sizeof(T);
  const int r = thread_index_here() % kTile;
  const int step = block_threads() / kTile;
  const int units = units_of(s.tiles);
  UnitPlace place;
#pragma unroll 1
  for (int first = thread_index_here() / kTile; first < units; first += kBatch * step) {
    Quad<T> value[kBatch] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * step >= units) break;
      place.advance(first + b * step);
      const int i = place.panel * kTile + r;
      const int column = place.column();
      if (i < n && column + kQuad - 1 < i) {
        value[b] = row_quad(i, column);
      } else {
#pragma unroll
        for (int c = 0; c < kQuad; ++c) {
          const bool live = i < n && column + c <= i;
          value[b].v[c] = live ? entry(i, column + c) : T(column + c == i);
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * step >= units) break;
#pragma unroll
      for (int c = 0; c < kQuad; ++c) {
        s.factor[int64_t(first + b * step) * kUnit + Tile<T>::at(r, c)] = value[b].v[c];
      }
    }
  }
}

}  // namespace backmatch::cuda
