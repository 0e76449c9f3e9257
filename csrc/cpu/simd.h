// Vectors of the level a file is compiled for, through the compiler's vector extensions.
//
// Every kernel source is compiled once per level (see CMakeLists.txt) with BACKMATCH_SIMD_LEVEL
// naming the namespace, so that no symbol is shared between levels: an inline function compiled
// for AVX-512 must never be the copy that the linker keeps for everyone. For the same reason
// these sources use nothing inline from the standard library.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>  // for permute_words; its functions are always inlined
#endif

#define BACKMATCH_INLINE inline __attribute__((always_inline))

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;  // 32 vector registers, else 16
#else
constexpr bool kManyRegisters = false;
#endif

// Sums kept in registers by the kernels that multiply vectors by scalars: kBlockVectors vectors of
// kBlockScalars columns each.
constexpr int kBlockScalars = kVectorBytes == 64 ? 8 : 4;
constexpr int kBlockVectors = kManyRegisters && kVectorBytes == 16 ? 4 : 2;

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef float Loose __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  using Index = int32_t;
  static constexpr float kLargest = __FLT_MAX__;
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef double Loose __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  using Index = int64_t;
  static constexpr double kLargest = __DBL_MAX__;
};

template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using IntVec = typename Simd<T>::Int;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// Loads and stores at any address that is aligned for one element.
template <class T>
BACKMATCH_INLINE Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename Simd<T>::Loose*>(from);
}

template <class T>
BACKMATCH_INLINE void store(T* to, Vec<T> value) {
  *reinterpret_cast<typename Simd<T>::Loose*>(to) = value;
}

template <class T>
BACKMATCH_INLINE T square_root(T value);
template <>
BACKMATCH_INLINE float square_root(float value) {
  return __builtin_sqrtf(value);
}
template <>
BACKMATCH_INLINE double square_root(double value) {
  return __builtin_sqrt(value);
}

// The array keeps the loop in a form that the compiler turns into one vector instruction.
template <class T>
BACKMATCH_INLINE Vec<T> vector_square_root(Vec<T> value) {
  alignas(kVectorBytes) T lane[kLanes<T>];
  store(lane, value);
  for (int l = 0; l < kLanes<T>; ++l) lane[l] = square_root(lane[l]);
  return load(lane);
}

template <class T>
BACKMATCH_INLINE T sum_lanes(Vec<T> value) {
  T total = value[0];
  for (int l = 1; l < kLanes<T>; ++l) total += value[l];
  return total;
}

// Element l of the result is element pick(l) of (a, b). The transposes below use only patterns
// that are one cheap instruction at every level: within 16 bytes, or whole 16-byte units.
template <class T, class Pick>
BACKMATCH_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, Pick pick) {
  constexpr int kWidth = kLanes<T>;
#if defined(__clang__)
  Vec<T> out;
  for (int l = 0; l < kWidth; ++l) out[l] = pick(l) < kWidth ? a[pick(l)] : b[pick(l) - kWidth];
  return out;
#else
  IntVec<T> index;
#pragma GCC unroll 16
  for (int l = 0; l < kWidth; ++l) index[l] = pick(l);
  return __builtin_shuffle(a, b, index);
#endif
}

// Elements of one 16-byte unit, and units of one vector.
template <class T>
constexpr int kUnit = 16 / static_cast<int>(sizeof(T));
constexpr int kUnits = kVectorBytes / 16;

// In each unit: groups of `size` elements from the lower or upper halves of a and b in turn.
template <class T, int size, bool kUpper>
BACKMATCH_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b) {
  return shuffle<T>(a, b, [](int l) {
    const int group = l % kUnit<T> / size;
    return group % 2 * kLanes<T> + l / kUnit<T> * kUnit<T> + (kUpper ? kUnit<T> / 2 : 0) +
           group / 2 * size + l % size;
  });
}

// Whether one instruction brings any 4 bytes of a vector to any place of it.
#if defined(__AVX2__)
constexpr bool kPermutes = true;
#else
constexpr bool kPermutes = false;
#endif

// Vectors as words of 4 bytes: word w of the result is word pick[w] of `value`.
constexpr int kWords = kVectorBytes / 4;

template <class T>
BACKMATCH_INLINE Vec<T> permute_words(Vec<T> value, const int32_t* pick) {
#if defined(__AVX512F__)
  return (Vec<T>)_mm512_maskz_permutexvar_epi32(0xffff, _mm512_loadu_si512(pick),
                                                  (__m512i)value);
#elif defined(__AVX2__)
  const __m256i places = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pick));
  return (Vec<T>)_mm256_permutevar8x32_epi32((__m256i)value, places);
#else
  (void)pick;
  return value;
#endif
}

// The even or odd units of a, then those of b.
template <class T, bool kOdd>
BACKMATCH_INLINE Vec<T> every_other_unit(Vec<T> a, Vec<T> b) {
  return shuffle<T>(a, b, [](int l) {
    const int unit = l / kUnit<T>;
    const int source = unit < kUnits / 2 ? 2 * unit : 2 * unit - kUnits;
    return (unit < kUnits / 2 ? 0 : kLanes<T>) + (source + (kOdd ? 1 : 0)) * kUnit<T> +
           l % kUnit<T>;
  });
}

// Transposes the kUnit x kUnit squares that kUnit rows hold, one square per unit.
template <class T>
BACKMATCH_INLINE void transpose_units(Vec<T>* row) {
  const Vec<T> low = interleave<T, 1, false>(row[0], row[1]);
  const Vec<T> high = interleave<T, 1, true>(row[0], row[1]);
  if constexpr (kUnit<T> == 2) {
    row[0] = low;
    row[1] = high;
  } else {
    const Vec<T> low2 = interleave<T, 1, false>(row[2], row[3]);
    const Vec<T> high2 = interleave<T, 1, true>(row[2], row[3]);
    row[0] = interleave<T, 2, false>(low, low2);
    row[1] = interleave<T, 2, true>(low, low2);
    row[2] = interleave<T, 2, false>(high, high2);
    row[3] = interleave<T, 2, true>(high, high2);
  }
}

// Transposes a square of kLanes rows in registers: first inside the units, then the units.
template <class T>
BACKMATCH_INLINE void transpose(Vec<T> (&row)[kLanes<T>]) {
#pragma GCC unroll 4
  for (int g = 0; g < kUnits; ++g) transpose_units<T>(row + g * kUnit<T>);
  if constexpr (kUnits > 1) {
#pragma GCC unroll 2
    for (int span = 1; span < kUnits; span *= 2) {
      Vec<T> next[kLanes<T>];
#pragma GCC unroll 4
      for (int g = 0; g < kUnits / 2; ++g)
#pragma GCC unroll 4
        for (int j = 0; j < kUnit<T>; ++j) {
          const Vec<T> a = row[2 * g * kUnit<T> + j];
          const Vec<T> b = row[(2 * g + 1) * kUnit<T> + j];
          next[g * kUnit<T> + j] = every_other_unit<T, false>(a, b);
          next[(g + kUnits / 2) * kUnit<T> + j] = every_other_unit<T, true>(a, b);
        }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<T>; ++i) row[i] = next[i];
    }
  }
}

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
