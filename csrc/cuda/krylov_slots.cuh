// The slots of a block that iterates conjugate gradient: what each holds, and its products.
//
// Who owns what, where it synchronises and why it is race-free stands in krylov_block.cuh; nothing
// here synchronises.
#pragma once

#include "krylov_product.cuh"

namespace backmatch::cuda {

enum Phase : int32_t { kVacant, kEmpty, kLoad, kResidual, kStep, kDone };

// What lane s alone reads and writes of slot s.
template <class T>
struct Slot {
  int64_t taken;  // systems of the queue so far, the same in all slots
  int64_t steps;
  T norm, target, rho, distance;
  bool fresh;     // distance is that of the recomputed residual
  bool stalled;   // a step was refused: after the residual it is over
  bool stepping;  // this round takes a step
};

template <class T, int C>
struct alignas(16) SlotTable {
  int64_t system[C];
  T factor[C];  // alpha or beta
  T scale[C], damping[C];
  int32_t phase[C];
  Slot<T> slot[C];
};

// The rows of one thread; x[s * block_threads()] is its row of x, in shared memory.
template <class T, int C>
struct SlotRows {
  T r[C], p[C];
  T* x;
};

template <class T, int C>
struct KrylovStore {
  SlotTable<T, C>* table;
  T *vectors, *partial, *x, *matrix, *scratch;
};

// The queue: systems first, first + stride, ... before end.
struct Queue {
  int64_t first, stride, end;
};

template <class T, int C>
__host__ __device__ __forceinline__ constexpr int64_t krylov_bytes(int64_t threads, int64_t groups,
                                                                   int64_t matrix) {
  return int64_t(sizeof(SlotTable<T, C>)) +
         int64_t(sizeof(T)) * (threads * C * (2 + groups) + matrix + threads / kWarp * C);
}

// `matrix`: elements of the matrix in shared memory, a multiple of 16 bytes.
template <class T, int C>
__device__ __forceinline__ KrylovStore<T, C> krylov_store(int groups, int64_t matrix) {
  unsigned char* shared = shared_memory();
  T* vectors = reinterpret_cast<T*>(shared + sizeof(SlotTable<T, C>));
  T* partial = vectors + block_threads() * C;
  T* x = partial + block_threads() * C * groups;
  T* staged = x + block_threads() * C;
  return {reinterpret_cast<SlotTable<T, C>*>(shared), vectors, partial, x, staged, staged + matrix};
}

__device__ __forceinline__ bool has(unsigned slots, int s) { return (slots >> s & 1) != 0; }

template <class T, int C>
__device__ __forceinline__ unsigned slots_in(const SlotTable<T, C>& table, Phase phase) {
  unsigned slots = 0;
#pragma unroll
  for (int s = 0; s < C; ++s) slots |= unsigned(table.phase[s] == phase) << s;
  return slots;
}

// The place of a slot among the vectors: those in use first.
__device__ __forceinline__ int place_of(unsigned used, int s) {
  const unsigned before = (1u << s) - 1;
  return has(used, s) ? count_bits(used & before) : count_bits(used) + count_bits(~used & before);
}

template <int C>
__device__ __forceinline__ int width_of(unsigned used) {
  return C > 4 && count_bits(used) <= 4 ? 4 : C;
}

template <class T, int C>
__device__ __forceinline__ void publish(const T (&value)[C], unsigned used, int n, T* vectors) {
  const int row = thread_index(), width = width_of<C>(used);
  if (row >= n) return;
#pragma unroll
  for (int s = 0; s < C; ++s) {
    const int place = place_of(used, s);
    if (place < width) vectors[row * width + place] = has(used, s) ? value[s] : T(0);
  }
}

template <int C, int R, bool kShared, bool kPreconditioned, int kMost, class T>
__device__ __forceinline__ void multiply_slots(const MatrixView<T>& M, Shape shape, int n,
                                               unsigned used, const KrylovStore<T, C>& store) {
  if (C > 4 && width_of<C>(used) == 4) {
    constexpr int kAhead = kAheadOf<T, 4, kShared, kPreconditioned, kMost>;
    multiply<4, R, kShared, kAhead>(M, shape, n, store.vectors, store.partial);
  } else {
    constexpr int kAhead = kAheadOf<T, C, kShared, kPreconditioned, kMost>;
    multiply<C, R, kShared, kAhead>(M, shape, n, store.vectors, store.partial);
  }
}

// Row t of the product with slot s.
template <int R, class T, int C>
__device__ __forceinline__ T product_of(const KrylovStore<T, C>& store, unsigned used, int s) {
  const int width = width_of<C>(used);
  const T* at = store.partial + place_of(used, s) * block_threads() + thread_index();
  T sum = at[0];
#pragma unroll
  for (int g = 1; g < R; ++g) sum += at[g * width * block_threads()];
  return sum;
}

}  // namespace backmatch::cuda
