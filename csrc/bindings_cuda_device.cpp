// The part of backmatch._C.cuda about the device itself: what it can do, and what would be launched.
#include "bindings.h"
#include "cuda/device/dry_run.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace backmatch {
namespace {

int64_t fma_rate_workspace(const std::string& dtype) {
  int64_t bytes = 0;
  with_dtype(dtype, [&](auto zero) { bytes = cuda::fma_rate_workspace<decltype(zero)>(); });
  return bytes;
}

double fma_rate(const std::string& dtype, int64_t repeats, Address workspace, Address stream) {
  check_sizes("fma_rate", {repeats});
  double flops = 0;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    flops = cuda::launch_fma_rate<T>(repeats, at<void>(workspace), at<void>(stream));
  });
  return flops;
}

double matrix_rate(int64_t repeats, Address workspace, Address stream) {
  check_sizes("matrix_rate", {repeats});
  return cuda::launch_matrix_rate(repeats, at<void>(workspace), at<void>(stream));
}

py::list dry_run(int64_t shared_bytes, int64_t multiprocessors, const py::function& call) {
  cuda::DryRun dry({shared_bytes, multiprocessors});
  call();
  py::list launches;
  for (const auto& [name, shape] : dry.launches)
    launches.append(py::make_tuple(name, shape.blocks, shape.threads, shape.shared_bytes));
  return launches;
}

}  // namespace

void bind_cuda_device(py::module_& sub) {
  using namespace pybind11::literals;
  using released = py::call_guard<py::gil_scoped_release>;
  sub.def("fma_rate_workspace", fma_rate_workspace, "dtype"_a,
          "Bytes of workspace that fma_rate needs on the current device.");
  sub.def("fma_rate", fma_rate, released(), "dtype"_a, "repeats"_a, "workspace"_a, "stream"_a,
          "Multiply-adds in registers on every thread; returns the operations, to be timed.");
  sub.def("matrix_rate_workspace", cuda::matrix_rate_workspace,
          "Bytes of workspace that matrix_rate needs on the current device.");
  sub.def("matrix_rate", matrix_rate, released(), "repeats"_a, "workspace"_a, "stream"_a,
          "The same on the matrix units, in double.");
  sub.def("dry_run", dry_run, "shared_bytes"_a, "multiprocessors"_a, "call"_a,
          "Calls call() with a device of these limits pretended to, on which nothing is launched; "
          "returns the launches as (kernel, blocks, threads, shared bytes). This thread only.");
}

}  // namespace backmatch
