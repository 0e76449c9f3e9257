// What the processor gives at most: independent chains of x = x * a + b in registers.
//
// No memory is touched, so the rate is that of the multiply-add units at this level's vector width,
// with as many threads as the kernels use. A fused multiply-add has a latency of four to five
// cycles on two units, so ten chains fill them; kChains leaves two registers for a and b. Without
// a fused instruction (baseline) the compiler emits a multiplication and an addition.
#include "kernels_simd.h"
#include "simd.h"
#include "workspace.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

namespace {

constexpr int kChains = kManyRegisters ? 24 : 12;

// Without a store that must happen the compiler would drop chains that nobody reads.
volatile double sink;

// The sum of all chains after `repeats` steps. |a| < 1 keeps every value in range.
template <class T>
T run_chains(int64_t repeats, T start) {
  const Vec<T> a = Vec<T>{} + T(0.5);
  const Vec<T> b = Vec<T>{} + T(0.25);
  Vec<T> x[kChains];
#pragma GCC unroll 24
  for (int c = 0; c < kChains; ++c) x[c] = Vec<T>{} + (start + T(c));
  for (int64_t i = 0; i < repeats; ++i)
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) x[c] = x[c] * a + b;
  Vec<T> sum{};
#pragma GCC unroll 24
  for (int c = 0; c < kChains; ++c) sum += x[c];
  return sum_lanes<T>(sum);
}

}  // namespace

template <class T>
double fma_rate(int64_t repeats) {
  // More tasks and operations than any machine has threads for: all of them.
  const int threads = threads_for(int64_t{1} << 20, 1e18);
  double total = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1) \
    reduction(+ : total)
  for (int thread = 0; thread < threads; ++thread)
    total += static_cast<double>(run_chains<T>(repeats, T(thread)));
  sink = total;
  return 2.0 * kLanes<T> * kChains * static_cast<double>(repeats) * threads;
}

template double fma_rate<float>(int64_t);
template double fma_rate<double>(int64_t);

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
