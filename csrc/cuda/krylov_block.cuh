// Conjugate gradient by one block on a queue of systems that share one matrix, start to end.
//
// The rules are those of csrc/cpu/cg.cpp and backmatch/linalg/krylov.py: every system pauses by its
// own |r|, continues from the recomputed residual where that is not there yet, and stops for good
// at p^T A p <= 0 or anything that is not finite.
//
// Who owns what: the block has C slots, each with one system in it; thread t holds row t of x, r
// and p of every slot in registers. What a slot is about to do is its phase, in shared memory with
// its few scalars; lane s of warp 0 alone decides for slot s and writes them. A round of the loop
// multiplies the matrix once by all slots: p of those that take a step, x of those whose residual
// is recomputed. A system that is done leaves its slot to the next of the queue; once the queue is
// empty and at most half the slots are in use, the product shrinks with them.
// Where it synchronises: `publish` and the product, the product and its sums, and each of the two
// sums over rows twice: before lane s reads what the warps left, and before all read what lane s
// decided. Six barriers a round, six more with a preconditioner; none beyond the block.
// Why it is race-free: registers belong to one thread; vectors[t] and the row t of the results have
// one writer; phases and scalars are written by warp 0 between two barriers, and read by the others
// before the first or after the second of them.
// The bits: every sum over rows is the same tree, every product the same order of columns, whatever
// the slot, its neighbours, the number of slots, and which block has the system.
// Considered and rejected: all threads deciding from the warps' sums (half the barriers, but W C
// words read by each of the W warps, 512 wavefronts at n = 512, and 40 registers of scalars),
// variants of CG with one sum a step (another recursion, other iterates), a fixed set of systems
// a block (idle slots when they differ in difficulty), moving live slots together (registers cannot
// be indexed; only their places in `vectors` move).
#pragma once

#include "krylov_slots.cuh"

namespace backmatch::cuda {

// The power of two next below the largest entry; 1 where there is no such number. Dividing by it is
// exact and keeps the squared norms of tiny and huge right-hand sides in range.
template <class T>
__device__ __forceinline__ T power_of_two(T largest) {
  const bool usual = largest > T(0) && largest <= kLargestFinite<T>;
  return usual ? std::ldexp(T(1), std::ilogb(largest)) : T(1);
}

// D v in a family, else v. The slopes are read again each time: two words to the n of the product.
template <class Problem, class T>
__device__ __forceinline__ T scaled(const Problem& problem, int64_t system, int row, T v) {
  return Problem::kScaled ? problem.slope(system, row) * v : v;
}

// Ends the system of a slot; all threads then store its x.
template <class Problem, class T>
__device__ __forceinline__ Phase finish(const Problem& problem, int64_t system,
                                       const Slot<T>& slot) {
  const T residual = slot.norm == T(0) ? T(0) : slot.distance / slot.norm;
  const bool reached = slot.distance <= slot.target && slot.distance <= kLargestFinite<T>;
  problem.report(system, slot.steps, residual, reached);
  return kDone;
}

// Stores what is done and gives vacant slots the next of the queue.
template <class Problem, class T, int C>
__device__ __forceinline__ void refill(const Problem& problem, const SlotRows<T, C>& rows,
                                       SlotTable<T, C>& table) {
  const unsigned done = slots_in(table, kDone), free = done | slots_in(table, kVacant);
  const int row = thread_index();
#pragma unroll
  for (int s = 0; s < C; ++s) {
    if (has(done, s) && row < problem.n()) {
      const T x = rows.x[s * block_threads()] * table.scale[s];
      problem.store(table.system[s], row, scaled(problem, table.system[s], row, x));
    }
  }
  sync_block();
  if (row < C) {
    const Queue queue = problem.queue();
    int64_t& taken = table.slot[row].taken;
    if (has(free, row)) {
      const int64_t rank = taken + count_bits(free & ((1u << row) - 1));
      table.system[row] = queue.first + rank * queue.stride;
      table.phase[row] = table.system[row] < queue.end ? kLoad : kEmpty;
    }
    taken += count_bits(free);
  }
  sync_block();
}

// The decision of lane s on a system that was just loaded, whose |b|^2 is `square`.
template <bool kPreconditioned, class Problem, class T>
__device__ __forceinline__ Phase start_system(const Problem& problem, int64_t system, T square,
                                              Slot<T>& slot) {
  slot.norm = slot.distance = std::sqrt(square);
  slot.target = problem.rtol() * slot.norm;
  slot.steps = 0;
  slot.fresh = true;
  slot.stalled = false;
  slot.rho = square;
  if (slot.norm == T(0)) return finish(problem, system, slot);
  if (Problem::kHasStart) return kResidual;
  if (!(slot.distance > slot.target)) return finish(problem, system, slot);
  return kPreconditioned ? kResidual : kStep;  // x = 0: the first residual is b
}

// Loads b, scaled, and the start of the systems in phase kLoad.
template <bool kPreconditioned, class Problem, class T, int C>
__device__ __forceinline__ void load_slots(const Problem& problem, SlotRows<T, C>& rows,
                                           const KrylovStore<T, C>& store) {
  SlotTable<T, C>& table = *store.table;
  const unsigned waiting = slots_in(table, kLoad);
  const int row = thread_index();
  const bool decides = row < C && has(waiting, row), own = row < problem.n();
  T size[C];
#pragma unroll
  for (int s = 0; s < C; ++s) {
    size[s] = T(0);
    if (!has(waiting, s)) continue;
    rows.r[s] = own ? problem.right_hand_side(table.system[s], row) : T(0);
    size[s] = std::fabs(rows.r[s]);
  }
  combine_lanes(size, Larger(), store.scratch);
  sync_block();
  if (decides) {
    table.scale[row] = power_of_two(combine_warps<C>(store.scratch, row, Larger()));
    table.damping[row] = problem.damping(table.system[row]);
  }
  sync_block();
#pragma unroll
  for (int s = 0; s < C; ++s) {
    size[s] = T(0);
    if (!has(waiting, s)) continue;
    rows.r[s] /= table.scale[s];
    size[s] = rows.r[s] * rows.r[s];
  }
  combine_lanes(size, Add(), store.scratch);
  sync_block();
  if (decides) {
    const T square = combine_warps<C>(store.scratch, row, Add());
    table.phase[row] =
        start_system<kPreconditioned>(problem, table.system[row], square, table.slot[row]);
  }
  sync_block();
#pragma unroll
  for (int s = 0; s < C; ++s) {
    if (!has(waiting, s)) continue;
    const bool starts = Problem::kHasStart && own && table.phase[s] == kResidual;
    rows.x[s * block_threads()] =
        starts ? problem.start(table.system[s], row) / table.scale[s] : T(0);
    rows.p[s] = rows.r[s];
  }
}

// Lane s, after p^T A p: alpha, or why there is none.
template <class Problem, class T, int C>
__device__ __forceinline__ void decide_step(const Problem& problem, T curvature, int s,
                                            SlotTable<T, C>& table) {
  Slot<T>& slot = table.slot[s];
  slot.stepping = curvature > T(0) && curvature <= kLargestFinite<T> && slot.rho > T(0);
  if (slot.stepping) {
    table.factor[s] = slot.rho / curvature;
    return;
  }
  slot.stalled = true;
  table.phase[s] = slot.fresh ? finish(problem, table.system[s], slot) : kResidual;
}

// Lane s, after |r|^2: go on, recompute the residual, restart from it, or end.
template <bool kPreconditioned, class Problem, class T, int C>
__device__ __forceinline__ void decide_next(const Problem& problem, T square, int s,
                                            bool recomputed, SlotTable<T, C>& table) {
  Slot<T>& slot = table.slot[s];
  if (!recomputed && !slot.stepping) return;  // refused: its phase is known
  slot.distance = std::sqrt(square);
  slot.fresh = recomputed;
  if (!recomputed) ++slot.steps;
  const bool more = slot.distance > slot.target && slot.steps < problem.max_steps();
  if (!kPreconditioned) {
    table.factor[s] = square / slot.rho;
    slot.rho = square;
  }
  if (recomputed) {
    table.phase[s] = more && !slot.stalled ? kStep : finish(problem, table.system[s], slot);
  } else if (!more) {
    table.phase[s] = kResidual;
  }
}

// z = L^-T L^-1 r of the slots that step on, into `z`.
template <int C, int R, int kMost, class T>
__device__ __forceinline__ void precondition(const SlotRows<T, C>& rows, unsigned used, int n,
                                             const T* upper, const T* lower,
                                             const KrylovStore<T, C>& store, T (&z)[C]) {
  publish(rows.r, used, n, store.vectors);
  sync_block();
  const MatrixView<T> first{upper, n, 1}, second{lower, n, 1};
  multiply_slots<C, R, false, true, kMost>(first, Shape::kUpper, n, used, store);
  sync_block();
#pragma unroll
  for (int s = 0; s < C; ++s) z[s] = has(used, s) ? product_of<R>(store, used, s) : T(0);
  publish(z, used, n, store.vectors);
  sync_block();
  multiply_slots<C, R, false, true, kMost>(second, Shape::kLower, n, used, store);
  sync_block();
  const bool own = thread_index() < n;
#pragma unroll
  for (int s = 0; s < C; ++s) z[s] = has(used, s) && own ? product_of<R>(store, used, s) : T(0);
}

// Solves the queue of a problem, in a block of at most kMost threads. `upper` and `lower`: L^-T and
// L^-1, (n, n) contiguous, of the preconditioner.
template <int C, int R, bool kShared, bool kPreconditioned, int kMost, class T, class Problem>
__device__ __forceinline__ void krylov_block(const Problem& problem,
                                             const MatrixView<T>& matrix, const T* upper,
                                             const T* lower, const KrylovStore<T, C>& store) {
  SlotTable<T, C>& table = *store.table;
  const int n = static_cast<int>(problem.n()), row = thread_index();
  const bool own = row < n;
  SlotRows<T, C> rows{};
  rows.x = store.x + row;
  if (row < C) {
    table.phase[row] = kVacant;
    table.slot[row].taken = 0;
  }
  sync_block();
  for (;;) {
    if ((slots_in(table, kDone) | slots_in(table, kVacant)) != 0) {
      refill(problem, rows, table);
      if (slots_in(table, kLoad) != 0) {
        load_slots<kPreconditioned>(problem, rows, store);
      }
      continue;
    }
    const unsigned residual = slots_in(table, kResidual);
    unsigned step = slots_in(table, kStep);
    const unsigned used = residual | step;
    if (used == 0) return;

    T value[C];
#pragma unroll
    for (int s = 0; s < C; ++s) {
      const T v = has(step, s) ? rows.p[s] : has(used, s) ? rows.x[s * block_threads()] : T(0);
      value[s] = has(used, s) && own ? scaled(problem, table.system[s], row, v) : T(0);
    }
    publish(value, used, n, store.vectors);
    sync_block();
    multiply_slots<C, R, kShared, kPreconditioned, kMost>(matrix, Shape::kFull, n, used, store);
    sync_block();
    T q[C];
#pragma unroll
    for (int s = 0; s < C; ++s) {
      q[s] = value[s] = T(0);
      if (!has(used, s) || !own) continue;
      const T v = has(step, s) ? rows.p[s] : has(used, s) ? rows.x[s * block_threads()] : T(0);
      const T sum = product_of<R>(store, used, s);
      // Two products and a sum: which one is contracted must not be each instance's own choice.
      q[s] = std::fma(table.damping[s], v, scaled(problem, table.system[s], row, sum));
      value[s] = v * q[s];
    }
    combine_lanes(value, Add(), store.scratch);
    sync_block();
    if (row < C && has(step, row)) {
      decide_step(problem, combine_warps<C>(store.scratch, row, Add()), row, table);
    }
    sync_block();
    step &= slots_in(table, kStep);
#pragma unroll
    for (int s = 0; s < C; ++s) {
      value[s] = T(0);
      if (has(step, s)) {
        rows.x[s * block_threads()] += table.factor[s] * rows.p[s];
        rows.r[s] -= table.factor[s] * q[s];
        value[s] = rows.r[s] * rows.r[s];
      } else if (has(residual, s) && own) {
        const T b = problem.right_hand_side(table.system[s], row) / table.scale[s];
        rows.r[s] = b - q[s];
        value[s] = rows.r[s] * rows.r[s];
      }
    }
    combine_lanes(value, Add(), store.scratch);
    sync_block();
    if (row < C && has(used, row)) {
      const T square = combine_warps<C>(store.scratch, row, Add());
      decide_next<kPreconditioned>(problem, square, row, has(residual, row), table);
    }
    sync_block();
    const unsigned on = slots_in(table, kStep) & used;
    if (kPreconditioned && on != 0) {
      precondition<C, R, kMost>(rows, on, n, upper, lower, store, q);
#pragma unroll
      for (int s = 0; s < C; ++s) value[s] = has(on, s) ? rows.r[s] * q[s] : T(0);
      combine_lanes(value, Add(), store.scratch);
      sync_block();
      if (row < C && has(on, row)) {
        const T rho = combine_warps<C>(store.scratch, row, Add());
        table.factor[row] = rho / table.slot[row].rho;
        table.slot[row].rho = rho;
      }
      sync_block();
    }
#pragma unroll
    for (int s = 0; s < C; ++s) {
      if (!has(on, s)) continue;
      const T z = kPreconditioned ? q[s] : rows.r[s];
      rows.p[s] = has(residual, s) ? z : z + table.factor[s] * rows.p[s];
    }
  }
}

}  // namespace backmatch::cuda
