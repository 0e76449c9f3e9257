// The CPU kernels of the SIMD level in use.
#pragma once

#include "../kernels.h"

namespace backmatch {

template <class T>
struct Kernels {
  void (*spd_solve)(const SpdSolveArgs<T>&);
  void (*scaled_gram_solve)(const ScaledGramArgs<T>&);
  void (*weighted_gram)(const WeightedGramArgs<T>&);
  void (*cg)(const CgArgs<T>&);
  void (*ridge_dual)(const RidgeDualArgs<T>&);
  void (*ridge_shared)(const RidgeSharedArgs<T>&);
  void (*ridge_error)(const RidgeErrorArgs<T>&);
  void (*ridge_normal)(const RidgeNormalArgs<T>&);
  void (*scaled_gram_product)(const ScaledGramProductArgs<T>&);
  int64_t (*cg_step)(const CgStepArgs<T>&);
  void (*cg_direction)(const CgDirectionArgs<T>&);
  RidgeCounts (*ridge_counts)(const RidgeCountsArgs<T>&);
  double (*fma_rate)(int64_t repeats);
};

struct Level {
  Kernels<float> f32;
  Kernels<double> f64;
  void (*ridge_complement)(const RidgeDualArgs<float>&);
};

// Names of the levels in this build, slowest first: "baseline", "avx2", "avx512".
constexpr int kMostLevels = 3;
int compiled_levels(const char* (&names)[kMostLevels]);

// The best level that build and processor share, until another is set.
const Level& active_level();
const char* active_level_name();

// Throws std::invalid_argument when the build or the processor lacks the level.
void set_active_level(const char* name);

}  // namespace backmatch
