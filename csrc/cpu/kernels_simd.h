// What every level defines.
#pragma once

#include "../kernels.h"
#include "simd.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

template <class T>
void spd_solve(const SpdSolveArgs<T>& args);
template <class T>
void scaled_gram_solve(const ScaledGramArgs<T>& args);
template <class T>
void weighted_gram(const WeightedGramArgs<T>& args);
template <class T>
void cg(const CgArgs<T>& args);
template <class T>
void ridge_dual(const RidgeDualArgs<T>& args);
template <class T>
void ridge_shared(const RidgeSharedArgs<T>& args);
void ridge_complement(const RidgeDualArgs<float>& args);
template <class T>
void ridge_error(const RidgeErrorArgs<T>& args);
template <class T>
void ridge_normal(const RidgeNormalArgs<T>& args);
template <class T>
void scaled_gram_product(const ScaledGramProductArgs<T>& args);
template <class T>
int64_t cg_step(const CgStepArgs<T>& args);
template <class T>
void cg_direction(const CgDirectionArgs<T>& args);
template <class T>
RidgeCounts ridge_counts(const RidgeCountsArgs<T>& args);
template <class T>
double fma_rate(int64_t repeats);

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
