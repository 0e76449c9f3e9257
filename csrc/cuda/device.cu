#include <platform.cuh>

#include "launch.h"

namespace backmatch::cuda {

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace backmatch::cuda
