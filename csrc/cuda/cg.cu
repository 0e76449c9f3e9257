#include "cg.cuh"

#include "launch.h"

namespace backmatch::cuda {

template int64_t cg_largest_order<float>();
template int64_t cg_largest_order<double>();
template void launch_cg<float>(const CgArgs<float>&, void*);
template void launch_cg<double>(const CgArgs<double>&, void*);

}  // namespace backmatch::cuda
