// The C face of the emulated kernels, called from Python through ctypes. Functions that launch
// return an empty string, or what went wrong.
#include "emulator.h"
#include "guarded.h"
#include "launch.h"
#include "memory_check.h"
#include "planted.cuh"

namespace cuda = backmatch::cuda;

#define BACKMATCH_PRECISION(T)                                                                   \
  const char* spd_solve_##T(const backmatch::SpdSolveArgs<T>* args, void* workspace) {           \
    return guarded([&] { cuda::launch_spd_solve(*args, workspace, nullptr); });                  \
  }                                                                                              \
  const char* spd_solve_workspace_##T(int64_t batch, int64_t n, int64_t k, int64_t* bytes) {     \
    return guarded([&] { *bytes = cuda::spd_solve_workspace<T>(batch, n, k); });                 \
  }                                                                                              \
  const char* scaled_gram_solve_##T(const backmatch::ScaledGramArgs<T>* args, void* workspace) { \
    return guarded([&] { cuda::launch_scaled_gram_solve(*args, workspace, nullptr); });          \
  }                                                                                              \
  const char* scaled_gram_solve_workspace_##T(int64_t batch, int64_t n, int64_t* bytes) {        \
    return guarded([&] { *bytes = cuda::scaled_gram_solve_workspace<T>(batch, n); });            \
  }                                                                                              \
  const char* fma_rate_##T(int64_t repeats, void* workspace, double* flops) {                    \
    return guarded([&] { *flops = cuda::launch_fma_rate<T>(repeats, workspace, nullptr); });     \
  }                                                                                              \
  const char* fma_rate_workspace_##T(int64_t* bytes) {                                           \
    return guarded([&] { *bytes = cuda::fma_rate_workspace<T>(); });                             \
  }

#define BACKMATCH_GRAM(T)                                                         \
  const char* weighted_gram_##T(const backmatch::WeightedGramArgs<T>* args) {      \
    return guarded([&] { cuda::launch_weighted_gram(*args, nullptr); });           \
  }                                                                               \
  const char* ridge_primal_##T(const backmatch::RidgePrimalArgs<T>* args) {        \
    return guarded([&] { cuda::launch_ridge_primal(*args, nullptr); });            \
  }                                                                               \
  const char* ridge_primal_fits_##T(int64_t n, int64_t* fits) {                    \
    return guarded([&] { *fits = cuda::ridge_primal_fits<T>(n); });                \
  }

extern "C" {

BACKMATCH_PRECISION(float)
BACKMATCH_PRECISION(double)
BACKMATCH_GRAM(float)
BACKMATCH_GRAM(double)

const char* matrix_rate_double(int64_t repeats, void* workspace, double* flops) {
  return guarded([&] { *flops = cuda::launch_matrix_rate(repeats, workspace, nullptr); });
}

const char* matrix_rate_workspace_double(int64_t* bytes) {
  return guarded([&] { *bytes = cuda::matrix_rate_workspace(); });
}

const char* planted(int fault, const cuda::PlantedArgs* args, int64_t blocks) {
  return guarded([&] { cuda::launch_planted(fault, *args, blocks); });
}

const char* product(const cuda::ProductArgs* args) {
  return guarded([&] { cuda::launch_product(*args); });
}

const char* split_product(const cuda::SplitProductArgs* args) {
  return guarded([&] { cuda::launch_split_product(*args); });
}

void configure(uint64_t seed, int64_t shared_bytes, int64_t multiprocessors) {
  backmatch::emulator::configure(seed, {shared_bytes, multiprocessors});
}

void leave_out(const char* file, int line) { backmatch::emulator::leave_out(file, line); }

void watch(const char* name, const void* start, int64_t bytes, int64_t guard, bool output) {
  using backmatch::emulator::Contents;
  backmatch::emulator::watch(name, start, bytes, guard,
                             output ? Contents::kOutput : Contents::kInput);
}

void forget_all() { backmatch::emulator::forget_all(); }

}  // extern "C"
