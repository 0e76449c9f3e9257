// The C face of the emulated conjugate gradient kernels; conventions as in driver.cpp.
#include "guarded.h"
#include "launch.h"

namespace cuda = backmatch::cuda;

#define BACKMATCH_PRECISION(T)                                                                   \
  const char* cg_##T(const backmatch::CgArgs<T>* args) {                                         \
    return guarded([&] { cuda::launch_cg(*args, nullptr); });                                    \
  }                                                                                              \
  const char* scaled_gram_cg_##T(const backmatch::ScaledGramCgArgs<T>* args) {                   \
    return guarded([&] { cuda::launch_scaled_gram_cg(*args, nullptr); });                        \
  }                                                                                              \
  int64_t cg_step_workspace_##T(int64_t systems, int64_t n) {                                    \
    return cuda::cg_step_workspace<T>(systems, n);                                               \
  }                                                                                              \
  const char* cg_step_##T(const backmatch::CgStepArgs<T>* args, void* workspace) {               \
    return guarded([&] { cuda::launch_cg_step(*args, workspace, nullptr); });                    \
  }                                                                                              \
  const char* cg_direction_##T(const backmatch::CgDirectionArgs<T>* args, void* workspace) {     \
    return guarded([&] { cuda::launch_cg_direction(*args, workspace, nullptr); });               \
  }

extern "C" {

BACKMATCH_PRECISION(float)
BACKMATCH_PRECISION(double)

}  // extern "C"
