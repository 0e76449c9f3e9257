// The table of this level's kernels, the only symbol that dispatch.cpp asks for.
#include "dispatch.h"
#include "kernels_simd.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

namespace {

template <class T>
constexpr Kernels<T> table() {
  return {spd_solve<T>,   scaled_gram_solve<T>, weighted_gram<T>,       cg<T>,      ridge_dual<T>,
          ridge_shared<T>, ridge_error<T>, ridge_normal<T>,      scaled_gram_product<T>, cg_step<T>, cg_direction<T>,
          ridge_counts<T>, fma_rate<T>};
}

}  // namespace

extern const Level level;
const Level level = {table<float>(), table<double>(), ridge_complement};

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
