#include "ridge_primal.cuh"

#include "launch.h"

namespace backmatch::cuda {

template bool ridge_primal_fits<float>(int64_t);
template bool ridge_primal_fits<double>(int64_t);
template void launch_ridge_primal<float>(const RidgePrimalArgs<float>&, void*);
template void launch_ridge_primal<double>(const RidgePrimalArgs<double>&, void*);

}  // namespace backmatch::cuda
