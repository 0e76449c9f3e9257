#include "scaled_gram_solve.cuh"

#include "launch.h"

namespace backmatch::cuda {

template int64_t scaled_gram_solve_workspace<float>(int64_t, int64_t);
template int64_t scaled_gram_solve_workspace<double>(int64_t, int64_t);
template void launch_scaled_gram_solve<float>(const ScaledGramArgs<float>&, void*, void*);
template void launch_scaled_gram_solve<double>(const ScaledGramArgs<double>&, void*, void*);

}  // namespace backmatch::cuda
