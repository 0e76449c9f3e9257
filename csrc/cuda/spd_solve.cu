#include "spd_solve.cuh"

#include "launch.h"

namespace backmatch::cuda {

template int64_t spd_solve_workspace<float>(int64_t, int64_t, int64_t);
template int64_t spd_solve_workspace<double>(int64_t, int64_t, int64_t);
template void launch_spd_solve<float>(const SpdSolveArgs<float>&, void*, void*);
template void launch_spd_solve<double>(const SpdSolveArgs<double>&, void*, void*);

}  // namespace backmatch::cuda
