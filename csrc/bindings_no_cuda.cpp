// Stands in for bindings_cuda.cpp in a build without CUDA.
#include "bindings.h"

namespace backmatch {

void bind_cuda(pybind11::module_&) {}

}  // namespace backmatch
