#include "weighted_gram.cuh"

#include "launch.h"

namespace backmatch::cuda {

template void launch_weighted_gram<float>(const WeightedGramArgs<float>&, void*);
template void launch_weighted_gram<double>(const WeightedGramArgs<double>&, void*);

}  // namespace backmatch::cuda
