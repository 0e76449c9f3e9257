// spd_solve for 9 <= n <= 64: a group of 4 to 32 lanes a system (group_cholesky.cuh), one warp a
// block, systems side by side in it; no loop over the batch, no barrier but those of the warp.
//
// Who owns what: a warp loads the matrices of its own systems, neighbouring lanes neighbouring
// elements of a row, into its shared memory, and each lane takes from there what it holds. Where
// rows begin at multiples of 16 bytes, 16 bytes are loaded at once; that is decided once a launch
// and shows in no result. The right-hand sides of a pass go the same way, Q of them or one; X comes
// back through the shared memory of the matrix, which is then free.
// Where it synchronises: before and after each filling of shared memory with rows, after that with
// right-hand sides, after the forward substitution, and before X is read from shared memory.
// Systems beyond the batch repeat the last one and store nothing.
// Considered and rejected: entries straight from global to the registers that hold them (a load
// touches P rows of 8 or 16 bytes of every system: eight times the requests), asynchronous copies
// (the triangles of 8 systems do not fit beside their neighbours', and up to 8 accesses of 16 bytes
// a lane are in flight as it is), several systems in turn by one warp (its registers are full), one
// kernel for one right-hand side and for several (what the loop over passes keeps in registers
// spills), columns of a block unrolled (from 204 to 255 registers at n = 32, over twice the time of
// compilation).
#pragma once

#include "../kernels.h"
#include "group_cholesky.cuh"

namespace backmatch::cuda {

// The shared memory of one warp: the slabs of its systems, then a chunk of rows of each.
template <class G>
struct Stage {
  using T = typename G::T;
  static constexpr int kRows = 4 * G::Q;  // that pass at once
  static constexpr int kChunks = G::N / kRows;
  static constexpr int kLine = G::N + kPackSize<T>;                         // one row
  static constexpr int kSystem = kRows * kLine + G::P * kPackSize<T>;       // different banks
  static constexpr int64_t kBytes = G::kSystems * (G::kSlab + kSystem) * int64_t(sizeof(T));
};

// The systems of one warp; `front` is the frame's number of their row 0.
template <class G>
struct SpdWarp {
  const SpdSolveArgs<typename G::T>& args;
  const typename G::T* A;  // of its first system
  int64_t system;
  int live;
  int front;
  typename G::T* stage;

  __device__ __forceinline__ int clamped(int s) const { return s < live ? s : live - 1; }
};

// Rows of one chunk to shared memory, W elements an access: the lower triangle, anything right of
// it, rows of the identity behind row n, and zeros before column 0. So many lanes as a row of the
// chunk has accesses (rounded up to a power of two) go side by side, the rest down the rows.
template <int W, int chunk, class G>
__device__ __forceinline__ void stage_rows(const SpdWarp<G>& warp) {
  using T = typename G::T;
  using S = Stage<G>;
  constexpr int kColumns = (chunk + 1) * S::kRows;
  constexpr int kAcross = lanes_across(kColumns / W, kWarp / S::kRows);
  constexpr int kParts = (kColumns + kAcross * W - 1) / (kAcross * W);  // accesses of a lane a row
  constexpr int kDown = kWarp / kAcross;
  constexpr int kAccesses = G::kSystems * S::kRows / kDown * kParts;
  constexpr int kBatch = kAccesses < kInFlight ? kAccesses : kInFlight;
  constexpr int kLines = kBatch / kParts * kDown;  // rows of a batch: some systems, or part of one
  static_assert(S::kRows % kDown == 0 && kAccesses % kBatch == 0 && kBatch % kParts == 0);
  static_assert(S::kRows % kLines == 0 || kLines % S::kRows == 0);
  const auto& args = warp.args;
  const int n = static_cast<int>(args.n);
  const int lane_row = chunk * S::kRows - warp.front + thread_index() / kAcross;
  const int lane_column = thread_index() % kAcross * W;
  const int64_t lane_offset = lane_row * args.a_row + (lane_column - warp.front) * args.a_col;
  T* const lane_stage = warp.stage + thread_index() / kAcross * S::kLine + lane_column;
#pragma unroll 1
  for (int line = 0; line < G::kSystems * S::kRows; line += kLines) {
    Pack<T, W> packs[kBatch];
    const T* row = nullptr;
#pragma unroll
    for (int v = 0; v < kBatch; ++v) {
      const int down = v / kParts * kDown;
      const int part = v % kParts * kAcross * W;
      const int r = line % S::kRows + down % S::kRows;
      if (v == 0 || (part == 0 && down % S::kRows == 0)) {
        row = warp.A + warp.clamped((line + down) / S::kRows) * args.a_batch + lane_offset +
              r * args.a_row;
      } else if (part == 0) {
        row += kDown * args.a_row;
      }
      const int i = lane_row + r;
      const int c = lane_column + part - warp.front;
      const bool inside = kColumns + 3 <= G::N || i < n;  // rows of the identity end the frame
#pragma unroll
      for (int w = 0; w < W; ++w) packs[v].v[w] = T(!inside && c + w == i);
      if (inside && c >= 0 && c <= i) {
        packs[v] = vector_at<const Pack<T, W>>(row + (W == 1 ? part * args.a_col : part));
      }
    }
#pragma unroll
    for (int v = 0; v < kBatch; ++v) {
      const int down = v / kParts * kDown;
      const int part = v % kParts * kAcross * W;
      T* target = lane_stage + (line + down) / S::kRows * S::kSystem +
                  (line % S::kRows + down % S::kRows) * S::kLine + part;
      if (lane_column + part < kColumns) vector_at<Pack<T, W>>(target) = packs[v];
    }
  }
}

template <class G, int chunk = 0, class T>
__device__ __forceinline__ void load_group(T (&t)[G::kEntries], const GroupLane<G>& at,
                                            const SpdWarp<G>& warp, T damping, bool wide) {
  using S = Stage<G>;
  if constexpr (chunk < S::kChunks) {
    if ((chunk + 1) * S::kRows > warp.front) {
      sync_warp();
      if (wide) {
        stage_rows<kPackSize<T>, chunk>(warp);
      } else {
        stage_rows<1, chunk>(warp);
      }
      sync_warp();
      const T* lines = warp.stage + at.system * S::kSystem + at.p * S::kLine + at.q;
#pragma unroll
      for (int r = 0; r < S::kRows / G::P; ++r) {
        const int a = chunk * S::kRows / G::P + r;
#pragma unroll
        for (int b = 0; b < (a + 1) * G::M; ++b) {
          T& entry = t[G::slot(a, b)];
          entry = lines[r * G::P * S::kLine + b * G::Q];
          if (b < a * G::M) continue;
          const int row = a * G::P + at.p;
          const int column = b * G::Q + at.q;
          if (row == column && row - warp.front < warp.args.n) entry += damping;
          if (row < column) entry = 0;
        }
      }
    }
    load_group<G, chunk + 1>(t, at, warp, damping, wide);
  }
}

// This lane's share of the entries of C right-hand sides of every system of the warp: C side by
// side in memory, then frame row f, then system s.
template <int C, class G>
struct ColumnAccess {
  static constexpr int kAcross = lanes_across(G::N * C, 1);
  static constexpr int kParts = (G::N * C + kAcross - 1) / kAcross;
  static constexpr int kDown = kWarp / kAcross;
  static constexpr int kCount = G::kSystems / kDown * kParts;
  // All at once for one right-hand side; for several, a rolled loop, or the registers would not do.
  static constexpr int kFew = sizeof(typename G::T) == 8 ? kParts % 2 == 0 ? 2 : kParts
                              : kParts < 4               ? kParts * (4 / kParts)
                                                         : kParts / 2;
  static constexpr int kBatch = C == 1 ? kCount : kFew;
  static constexpr int kRun = kParts < kBatch ? kParts : kBatch;  // accesses to one system
  static_assert(kCount % kBatch == 0 && kBatch % kRun == 0 && kParts % kRun == 0);

  // Calls use(access, pointer, s, f, c, inside) for accesses `base` to base + kBatch. `first`
  // points to entry (0, 0) of the warp's first system. Pointers go from access to access: the
  // offsets of all would be kept in registers.
  template <class Pointer, class Use>
  static __device__ __forceinline__ void each(const SpdWarp<G>& warp, int base, int64_t columns,
                                              Pointer first, int64_t batch_stride,
                                              int64_t row_stride, int64_t column_stride,
                                              const Use& use) {
    const int c = thread_index() % kAcross % C;
    const int start = base / kParts * kDown + thread_index() / kAcross;
    const int start_row = base % kParts * (kAcross / C) + thread_index() % kAcross / C;
    Pointer system = first + start * batch_stride + (start_row - warp.front) * row_stride +
                     c * column_stride;
#pragma unroll
    for (int v = 0; v < kBatch; v += kRun) {
      Pointer pointer = system;
#pragma unroll
      for (int part = 0; part < kRun; ++part) {
        const int s = start + v / kParts * kDown;
        const int f = start_row + part * (kAcross / C);
        const bool inside = s < warp.live && f >= warp.front && f - warp.front < warp.args.n;
        if (f < G::N) use(v + part, pointer, s, f, c, inside && c < columns);
        pointer += kAcross / C * row_stride;
      }
      system += kDown * batch_stride;
    }
  }
};

// Right-hand sides `first`.. to the slabs, zeros where there is none.
template <int C, class G>
__device__ __forceinline__ void load_right_hand_sides(const SpdWarp<G>& warp, typename G::T* slabs,
                                             int64_t first) {
  using T = typename G::T;
  using Access = ColumnAccess<C, G>;
  const auto& args = warp.args;
  const T* B = args.B + warp.system * args.b_batch + first * args.b_col;
#pragma unroll 1
  for (int base = 0; base < Access::kCount; base += Access::kBatch) {
    T values[Access::kBatch];
    Access::each(warp, base, args.k - first, B, args.b_batch, args.b_row, args.b_col,
                 [&](int v, const T* entry, int, int, int, bool inside) {
                   values[v] = inside ? *entry : T(0);
                 });
    Access::each(warp, base, args.k - first, slabs, 0, 0, 0,
                 [&](int v, T*, int s, int f, int c, bool) {
                   slabs[s * G::kSlab + G::kKnown + c * G::N + f] = values[v];
                 });
  }
}

template <int C, class G>
__device__ __forceinline__ void store_solutions(const SpdWarp<G>& warp,
                                                const typename G::T* slabs, int64_t first) {
  using T = typename G::T;
  using Access = ColumnAccess<C, G>;
  const auto& args = warp.args;
  T* X = args.X + warp.system * args.n * args.k + first;
#pragma unroll 1
  for (int base = 0; base < Access::kCount; base += Access::kBatch) {
    Access::each(warp, base, args.k - first, X, args.n * args.k, args.k, 1,
                 [&](int, T* entry, int s, int f, int c, bool inside) {
                   const T* x = warp.stage + s * Stage<G>::kSystem + c * G::N + f;
                   if (inside) *entry = *x * slabs[s * G::kSlab + G::kLifted];
                 });
  }
}

// One pass of at most C right-hand sides, from `first` on; the first pass also factors.
template <int C, class G, class T>
__device__ __forceinline__ void group_pass(T (&t)[G::kEntries], const GroupLane<G>& at,
                                           const SpdWarp<G>& warp, T* slabs, int64_t first,
                                           int& bad) {
  load_right_hand_sides<C>(warp, slabs, first);
  sync_warp();
  // One right-hand side alone is solved by the lanes of every column q alike.
  T* const known = at.slab + G::kKnown;
  T* const own = known + (C == 1 ? 0 : at.q) * G::N;
  T b[G::kRows];
#pragma unroll
  for (int a = 0; a < G::kRows; ++a) b[a] = own[a * G::P + at.p];
  const bool keeps = at.p == 0 && (C > 1 || at.q == 0);
  const bool factoring = C == 1 || first == 0;
  group_forward(t, b, at, warp.front / G::Q, own, keeps, factoring);
  sync_warp();
  if (factoring) bad = first_bad_column(at, warp.front);
  T* const result = warp.stage + at.system * Stage<G>::kSystem;
#pragma unroll 1
  for (int c = 0; c < C && first + c < warp.args.k; ++c) {
    group_backward(t, at, warp.front / G::Q, known + c * G::N, result + c * G::N);
  }
  if (bad < G::N && at.lane == 0) {
#pragma unroll 1
    for (int i = 0; i < C * G::N; ++i) result[i] = kNaN<T>;
  }
  sync_warp();
  store_solutions<C>(warp, slabs, first);
}

// C is 1 for at most one right-hand side, else Q.
template <class T, int P, int Q, int N, int C>
__global__ void __launch_bounds__(kWarp, 8)
    spd_solve_group_kernel(SpdSolveArgs<T> args, bool wide) {
  using G = Group<T, P, Q, N>;
  T* slabs = reinterpret_cast<T*>(shared_memory());
  const GroupLane<G> at(thread_index(), slabs);
  const int64_t system = block_index() * G::kSystems;
  const int live =
      static_cast<int>(args.batch - system < G::kSystems ? args.batch - system : G::kSystems);
  const int front = N - (static_cast<int>(args.n) + 3) / 4 * 4;  // keeps 16 bytes aligned
  const SpdWarp<G> warp{args, args.A + system * args.a_batch, system, live, front,
                        slabs + G::kSystems * G::kSlab};
  const int64_t own = system + warp.clamped(at.system);
  clear_columns(at);
  T t[G::kEntries] = {};
  load_group(t, at, warp, args.damping[own * args.damping_stride], wide);
  const T lift = lift_tiny(t, at);
  if (at.lane == 0) at.slab[G::kLifted] = lift;  // for X at the end; in a register it would spill

  int bad = N;  // the first column with a bad pivot
  int64_t first = 0;
#pragma unroll 1
  do {
    group_pass<C>(t, at, warp, slabs, first, bad);
    first += C;
  } while (C > 1 && first < args.k);
  if (at.lane == 0 && at.system < live) args.info[own] = bad < N ? bad - front + 1 : 0;
}

template <class T>
bool starts_aligned(const T* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % kAccessBytes == 0;
}

template <class T, int P, int Q, int N>
void launch_spd_solve_group(const SpdSolveArgs<T>& args, void* stream) {
  using G = Group<T, P, Q, N>;
  constexpr int W = kPackSize<T>;
  const bool wide = args.a_col == 1 && args.a_row % W == 0 && args.a_batch % W == 0 &&
                    args.n % W == 0 && starts_aligned(args.A);
  const int64_t blocks = (args.batch + G::kSystems - 1) / G::kSystems;
  const LaunchShape shape{blocks, kWarp, Stage<G>::kBytes};
  if (args.k <= 1) return launch<spd_solve_group_kernel<T, P, Q, N, 1>>(shape, stream, args, wide);
  launch<spd_solve_group_kernel<T, P, Q, N, Q>>(shape, stream, args, wide);
}

}  // namespace backmatch::cuda
