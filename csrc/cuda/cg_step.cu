#include "cg_step.cuh"

#include "launch.h"

namespace backmatch::cuda {

template int64_t cg_step_workspace<float>(int64_t, int64_t);
template int64_t cg_step_workspace<double>(int64_t, int64_t);
template void launch_cg_step<float>(const CgStepArgs<float>&, void*, void*);
template void launch_cg_step<double>(const CgStepArgs<double>&, void*, void*);
template void launch_cg_direction<float>(const CgDirectionArgs<float>&, void*, void*);
template void launch_cg_direction<double>(const CgDirectionArgs<double>&, void*, void*);

}  // namespace backmatch::cuda
