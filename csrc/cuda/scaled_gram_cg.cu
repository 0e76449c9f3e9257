#include "scaled_gram_cg.cuh"

#include "launch.h"

namespace backmatch::cuda {

template int64_t scaled_gram_cg_largest_order<float>();
template int64_t scaled_gram_cg_largest_order<double>();
template void launch_scaled_gram_cg<float>(const ScaledGramCgArgs<float>&, void*);
template void launch_scaled_gram_cg<double>(const ScaledGramCgArgs<double>&, void*);

}  // namespace backmatch::cuda
