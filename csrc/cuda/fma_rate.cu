#include "fma_rate.cuh"

#include "launch.h"

namespace backmatch::cuda {

template int64_t fma_rate_workspace<float>();
template int64_t fma_rate_workspace<double>();
template double launch_fma_rate<float>(int64_t, void*, void*);
template double launch_fma_rate<double>(int64_t, void*, void*);

int64_t matrix_rate_workspace() { return fma_rate_workspace<double>(); }

double launch_matrix_rate(int64_t repeats, void* workspace, void* stream) {
  return matrix_rate(repeats, workspace, stream);
}

}  // namespace backmatch::cuda
