// L D L^T factorisation and solve of one system of order n <= N by P x Q lanes of a warp.
//
// Who owns what: lane (p, q) holds the entries of rows a P + p and columns b Q + q in registers,
// only those slots (a, b) that reach the lower triangle; 32 / (P Q) systems share a warp. P is Q or
// 2 Q. A column is exchanged through the system's slab of shared memory: its owners write it, every
// lane reads the part that meets its rows and the part that meets its columns, 16 bytes at a time,
// and each number read serves as many multiply-adds as the lane has slots the other way.
// Right-hand side q belongs to the lanes of column q (Q of them pass at once), entry a P + p each.
//
// L D L^T: column j is left as it is at its turn, C = L D, and 1 / D is kept beside it. The pivots,
// and so the info, are the squares of Cholesky's; a column costs one division and no root, and the
// exchange of a column does not wait for the division. With z = D^-1 L^-1 b, which falls out of the
// forward substitution, x_j = z_j - (sum over i > j of C_ij x_i) / D_j.
//
// A system of order n occupies the last rows of the frame of N, and the loops start at its first
// block of columns: work is that of order n, whatever N. Between the start and a system's own first
// row, and behind its last, rows of the identity stay exact (0 * 0 is subtracted). Entries right of
// the diagonal start as zeros, and stay zeros unless a pivot is bad.
//
// Where it synchronises: one sync_warp a column. The two buffers alternate: who writes column j has
// passed the barrier of column j - 1, so all reads of column j - 2, the buffer's last, are over.
// The diagonal tiles, 1 / D and z are written in the forward pass and read after the barrier that
// the caller puts behind it. All lanes of a warp take every branch that holds a barrier or a
// shuffle together.
//
// Considered and rejected: a row a lane (at n = 64, 32 lanes x 2 rows: 2,500 multiply-adds and
// 2,016 shuffles a lane; an SM shuffles one warp a clock, while it multiplies four), Cholesky (a
// root more a column, some 12 instructions), panels of Q columns at once (half the barriers, but
// every lane repeats the panel's own elimination: half as many multiply-adds again at Q = 4), the
// columns of a block unrolled (saves address arithmetic, for twice the code and up to 50 more
// registers).
#pragma once

#include "pivot.cuh"

namespace backmatch::cuda {

// W elements that one instruction moves.
template <class T, int W>
struct alignas(W * sizeof(T)) Pack {
  T v[W];
};

constexpr int kSmallOrder = 64;   // largest order that threads and groups take
constexpr int kAccessBytes = 16;  // the widest access there is
constexpr int kInFlight = 8;      // loads a lane issues before it waits for the first

template <class T>
constexpr int kPackSize = kAccessBytes / static_cast<int>(sizeof(T));

template <int Count, class T>
__device__ __forceinline__ void read_run(T* values, const T* source) {
  constexpr int W = Count < kPackSize<T> ? Count : kPackSize<T>;
  static_assert(Count % W == 0);
#pragma unroll
  for (int i = 0; i < Count; i += W) {
    const auto pack = vector_at<const Pack<T, W>>(source + i);
#pragma unroll
    for (int w = 0; w < W; ++w) values[i + w] = pack.v[w];
  }
}

template <int Count, class T>
__device__ __forceinline__ void write_run(T* target, const T* values) {
  constexpr int W = Count < kPackSize<T> ? Count : kPackSize<T>;
  static_assert(Count % W == 0);
#pragma unroll
  for (int i = 0; i < Count; i += W) {
    Pack<T, W> pack;
#pragma unroll
    for (int w = 0; w < W; ++w) pack.v[w] = values[i + w];
    vector_at<Pack<T, W>>(target + i) = pack;
  }
}

// The least power of two >= count, between `least` and a warp.
constexpr __host__ __device__ int lanes_across(int count, int least) {
  return least >= count || least >= kWarp ? least : lanes_across(count, 2 * least);
}

// How a system of order at most N lies on its lanes and in its slab.
template <class Real, int kRowLanes, int kColumnLanes, int kFrame>
struct Group {
  using T = Real;
  static constexpr int P = kRowLanes;
  static constexpr int Q = kColumnLanes;
  static constexpr int N = kFrame;
  static constexpr int M = P / Q;
  static constexpr int kLanes = P * Q;
  static constexpr int kSystems = kWarp / kLanes;  // that share a warp
  static constexpr int kRows = N / P;              // row slots of a lane
  static constexpr int kBlocks = N / Q;            // blocks of Q columns
  static constexpr int kEntries = M * kRows * (kRows + 1) / 2;
  static_assert(P == M * Q && N % (4 * Q) == 0 && kRows % kPackSize<T> == 0);

  // Where slot (a, b) with b < M (a + 1) lies in a lane's registers.
  static constexpr __host__ __device__ int slot(int a, int b) { return M * a * (a + 1) / 2 + b; }

  // The slab. Entry a P + p of a column lies at p * kLine + a; kLine is an odd number of 16-byte
  // accesses, so that lanes of different p read different banks, and so is the slab.
  static constexpr int kLine = (kRows / kPackSize<T> | 1) * kPackSize<T>;
  static constexpr int kColumn = P * kLine;
  static constexpr int kDiagonal = 2 * kColumn;        // C inside the blocks, Q columns of Q
  static constexpr int kInverse = kDiagonal + N * Q;   // 1 / D
  static constexpr int kKnown = kInverse + N;          // b, then z: Q right-hand sides
  static constexpr int kLifted = kKnown + N * Q;       // the factor of lift_tiny, where passes need it
  static constexpr int kSlab = (kLifted / kPackSize<T> + 1 | 1) * kPackSize<T>;
};

// Who this lane is, and the slab of its system.
template <class G>
struct GroupLane {
  int lane, system, p, q;
  typename G::T* slab;

  __device__ __forceinline__ GroupLane(int thread, typename G::T* slabs)
      : lane(thread % kWarp % G::kLanes), system(thread % kWarp / G::kLanes), p(lane % G::P),
        q(lane / G::P), slab(slabs + system * G::kSlab) {}
};

// The vectors of a column exchange reach back to slots that nobody writes; they read zeros there.
template <class G>
__device__ __forceinline__ void clear_columns(const GroupLane<G>& at) {
  for (int i = at.lane; i < 2 * G::kColumn; i += G::kLanes) at.slab[i] = 0;
}

// Multiplies a system of tiny diagonal by a power of two, which it returns for the right-hand sides
// or the solution. Entries of the frame outside the system are 0 or 1 on the diagonal: they decide
// nothing.
template <class G, class T>
__device__ __forceinline__ T lift_tiny(T (&t)[G::kEntries], const GroupLane<G>& at) {
  bool tiny = false;
  bool huge = false;
#pragma unroll
  for (int a = 0; a < G::kRows; ++a) {
#pragma unroll
    for (int m = 0; m < G::M; ++m) {
      const T entry = at.p == m * G::Q + at.q ? t[G::slot(a, a * G::M + m)] : T(0);
      tiny |= is_tiny_diagonal(entry);
      huge |= entry > kHugeDiagonal<T>;
    }
  }
  const unsigned tinies = ballot(tiny);
  const unsigned huges = ballot(huge);
  const unsigned own = ~0u >> (kWarp - G::kLanes) << (at.system * G::kLanes);
  const T lift = (tinies & own) != 0 && (huges & own) == 0 ? kLift<T> : T(1);
  if (lift != T(1)) {
#pragma unroll
    for (int e = 0; e < G::kEntries; ++e) t[e] *= lift;
  }
  return lift;
}

// One column j = block * Q + turn: exchanges it, eliminates it from the right-hand sides `b` and,
// when `factoring`, from the columns right of it. Returns its pivot.
template <int block, class G, class T>
__device__ __forceinline__ void eliminate_column(T (&t)[G::kEntries], T (&b)[G::kRows],
                                                 const GroupLane<G>& at, int turn, T* known,
                                                 bool keeps, bool factoring) {
  constexpr int W = kPackSize<T>;
  constexpr int top = block / G::M;      // the row slot of the diagonal
  constexpr int head = top / W * W;      // where the vectors start
  constexpr int count = G::kRows - head;
  const int turn_p = block % G::M * G::Q + turn;
  T* column = at.slab + turn % 2 * G::kColumn;
  if (at.q == turn) {
    T own[count];
#pragma unroll
    for (int a = head; a < G::kRows; ++a) own[a - head] = a < top ? T(0) : t[G::slot(a, block)];
    write_run<count>(column + at.p * G::kLine + head, own);
  }
  sync_warp();
  const T inverse = T(1) / column[turn_p * G::kLine + top];
  T rows[count];
  read_run<count>(rows, column + at.p * G::kLine + head);
#pragma unroll
  for (int a = top; a < G::kRows; ++a) rows[a - head] *= inverse;
  const T known_j = shuffle(b[top], at.q * G::P + turn_p, G::kLanes);
#pragma unroll
  for (int a = top; a < G::kRows; ++a) b[a] -= rows[a - head] * known_j;
  if (keeps) known[block * G::Q + turn] = known_j * inverse;
  if (!factoring) return;

  if (at.lane == 0) at.slab[G::kInverse + block * G::Q + turn] = inverse;
#pragma unroll
  for (int first = head; first < G::kRows; first += W) {
#pragma unroll
    for (int m = 0; m < G::M; ++m) {
      T columns[W];
      read_run<W>(columns, column + (m * G::Q + at.q) * G::kLine + first);
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const int target = (first + w) * G::M + m;  // the block of columns of columns[w]
        if (target < block) continue;
        // Columns of this block up to j are final.
        const T factor = target > block || at.q > turn ? columns[w] : T(0);
#pragma unroll
        for (int a = first + w; a < G::kRows; ++a) {
          t[G::slot(a, target)] -= rows[a - head] * factor;
        }
      }
    }
  }
}

// Columns from block `start` on (the same in all lanes of the warp).
template <class G, class T, int block = 0>
__device__ __forceinline__ void group_forward(T (&t)[G::kEntries], T (&b)[G::kRows],
                                              const GroupLane<G>& at, int start, T* known,
                                              bool keeps, bool factoring) {
  if constexpr (block < G::kBlocks) {
    if (block >= start) {
#pragma unroll 1
      for (int turn = 0; turn < G::Q; ++turn) {
        eliminate_column<block>(t, b, at, turn, known, keeps, factoring);
      }
      if (factoring && at.p / G::Q == block % G::M) {
        T* tile = at.slab + G::kDiagonal + block * G::Q * G::Q;
        tile[at.q * G::Q + at.p % G::Q] = t[G::slot(block / G::M, block)];
      }
    }
    group_forward<G, T, block + 1>(t, b, at, start, known, keeps, factoring);
  }
}

// The frame's number of the first column with a bad pivot, from column `first` on; N for none. A
// pivot is bad when its reciprocal is: also one so small beside other rows that 1 / D overflows.
template <class G>
__device__ __forceinline__ int first_bad_column(const GroupLane<G>& at, int first) {
  int bad = G::N;
  for (int j = G::N - G::kLanes + at.lane; j >= first; j -= G::kLanes) {
    if (!is_good_pivot(at.slab[G::kInverse + j])) bad = j;
  }
#pragma unroll
  for (int step = 1; step < G::kLanes; step *= 2) {
    const int other = shuffle(bad, at.lane ^ step, G::kLanes);
    bad = other < bad ? other : bad;
  }
  return bad;
}

// x[0..Q) of one block from its z and the sums of C_ij x_i over the rows below the block.
template <class G, class T>
__device__ __forceinline__ void solve_block(T (&x)[G::Q], const T (&sums)[G::Q], const T* known,
                                            const T* slab, int block) {
  T inverse[G::Q];
  read_run<G::Q>(x, known + block * G::Q);
  read_run<G::Q>(inverse, slab + G::kInverse + block * G::Q);
#pragma unroll
  for (int c = G::Q - 1; c >= 0; --c) {
    T column[G::Q];
    read_run<G::Q>(column, slab + G::kDiagonal + (block * G::Q + c) * G::Q);
    T sum = sums[c];
#pragma unroll
    for (int r = c + 1; r < G::Q; ++r) sum += column[r] * x[r];
    x[c] -= inverse[c] * sum;
  }
}

// Back substitution of the z at `known`, alike in all lanes of the system; x goes to `result`,
// which only lane 0 writes. Columns before block `start` stay as they are.
template <class G, class T>
__device__ __forceinline__ void group_backward(const T (&t)[G::kEntries], const GroupLane<G>& at,
                                               int start, const T* known, T* result) {
  T x[G::kRows];
#pragma unroll
  for (int a = 0; a < G::kRows; ++a) x[a] = 0;
#pragma unroll
  for (int block = G::kBlocks - 1; block >= 0; --block) {
    if (block < start) continue;
    const int top = block / G::M;
    T sum = 0;
    if (block % G::M + 1 < G::M) {  // rows of this slot, but of a later block
      sum = at.p / G::Q > block % G::M ? t[G::slot(top, block)] * x[top] : T(0);
    }
#pragma unroll
    for (int a = top + 1; a < G::kRows; ++a) sum += t[G::slot(a, block)] * x[a];
#pragma unroll
    for (int step = 1; step < G::P; step *= 2) sum += shuffle(sum, at.lane ^ step, G::kLanes);
    T sums[G::Q];
    T found[G::Q];
#pragma unroll
    for (int c = 0; c < G::Q; ++c) sums[c] = shuffle(sum, c * G::P, G::kLanes);
    solve_block<G>(found, sums, known, at.slab, block);
    if (at.lane == 0) write_run<G::Q>(result + block * G::Q, found);
#pragma unroll
    for (int c = 0; c < G::Q; ++c) {
      if (at.p == block % G::M * G::Q + c) x[top] = found[c];
    }
  }
}

}  // namespace backmatch::cuda
