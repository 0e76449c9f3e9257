// What the binding files share: addresses as Python ints, the switch over dtypes, the kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"

namespace backmatch {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls body(float{}) or body(double{}).
template <class Body>
void with_dtype(const std::string& dtype, Body body) {
  if (dtype == "float32") {
    body(float{});
  } else if (dtype == "float64") {
    body(double{});
  } else {
    throw std::invalid_argument("dtype: expected 'float32' or 'float64', got '" + dtype + "'");
  }
}

inline void check_sizes(const char* kernel, std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes)
    if (size < 0)
      throw std::invalid_argument(std::string(kernel) + ": expected sizes >= 0, got " +
                                  std::to_string(size));
}

// The CPU kernels of the SIMD level in use.
template <class T>
const Kernels<T>& kernels();
template <>
inline const Kernels<float>& kernels<float>() {
  return active_level().f32;
}
template <>
inline const Kernels<double>& kernels<double>() {
  return active_level().f64;
}

// What least squares and conjugate gradient on one shared matrix need; in bindings_family.cpp.
void bind_family(pybind11::module_& m);

// Defined in bindings_cuda.cpp or bindings_no_cuda.cpp, whichever the build compiles.
void bind_cuda(pybind11::module_& m);

// Rates and dry runs, into the submodule `cuda`; in bindings_cuda_device.cpp.
void bind_cuda_device(pybind11::module_& sub);

}  // namespace backmatch
