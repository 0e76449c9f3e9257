// What the binding files share: addresses as Python ints and the switch over dtypes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

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

// Defined in bindings_cuda.cpp or bindings_no_cuda.cpp, whichever the build compiles.
void bind_cuda(pybind11::module_& m);

}  // namespace backmatch
