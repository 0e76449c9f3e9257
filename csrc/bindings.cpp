// The table of contents of backmatch._C: plain functions on addresses, sizes and strides.
//
// Every address is a Python int, sizes and strides count elements, dtype is "float32" or
// "float64"; kernels.h says what the arguments mean. The GIL is released while a kernel runs.
// Shapes, devices and lifetimes are checked by the Python side; here only sizes and dtypes.
// BACKMATCH_SIMD=<level> in the environment chooses the SIMD level when the module is imported.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace backmatch {
namespace {

void spd_solve(const std::string& dtype, int64_t batch, int64_t n, int64_t k, Address A,
               int64_t a_batch, int64_t a_row, int64_t a_col, Address damping,
               int64_t damping_stride, Address B, int64_t b_batch, int64_t b_row, int64_t b_col,
               Address X, Address info) {
  check_sizes("spd_solve", {batch, n, k});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().spd_solve({batch, n, k, at<const T>(A), a_batch, a_row, a_col,
                            at<const T>(damping), damping_stride, at<const T>(B), b_batch, b_row,
                            b_col, at<T>(X), at<int32_t>(info)});
  });
}

void scaled_gram_solve(const std::string& dtype, int64_t batch, int64_t n, Address K,
                       int64_t k_row, int64_t k_col, Address D, int64_t d_batch, int64_t d_col,
                       Address R, int64_t r_batch, int64_t r_col, Address damping,
                       int64_t damping_stride, Address X, Address info) {
  check_sizes("scaled_gram_solve", {batch, n});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().scaled_gram_solve({batch, n, at<const T>(K), k_row, k_col, at<const T>(D),
                                    d_batch, d_col, at<const T>(R), r_batch, r_col,
                                    at<const T>(damping), damping_stride, at<T>(X),
                                    at<int32_t>(info)});
  });
}

void weighted_gram(const std::string& dtype, int64_t batch, int64_t m, int64_t n, Address Z,
                   int64_t z_row, int64_t z_col, Address w, int64_t w_batch, int64_t w_col,
                   Address damping, int64_t damping_stride, Address G) {
  check_sizes("weighted_gram", {batch, m, n});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().weighted_gram({batch, m, n, at<const T>(Z), z_row, z_col, at<const T>(w),
                                w_batch, w_col, at<const T>(damping), damping_stride, at<T>(G)});
  });
}

void cg(const std::string& dtype, int64_t batch, int64_t n, int64_t k, Address A, int64_t a_batch,
        int64_t a_row, int64_t a_col, Address damping, int64_t damping_stride, Address B,
        int64_t b_batch, int64_t b_row, int64_t b_col, double rtol, int64_t max_steps, Address X,
        Address iterations, Address residual, Address converged) {
  check_sizes("cg", {batch, n, k, max_steps});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().cg({batch, n, k, at<const T>(A), a_batch, a_row, a_col, at<const T>(damping),
                     damping_stride, at<const T>(B), b_batch, b_row, b_col, static_cast<T>(rtol),
                     max_steps, at<T>(X), at<int64_t>(iterations), at<T>(residual),
                     at<uint8_t>(converged)});
  });
}

double fma_rate(const std::string& dtype, int64_t repeats) {
  check_sizes("fma_rate", {repeats});
  double flops = 0;
  with_dtype(dtype, [&](auto zero) { flops = kernels<decltype(zero)>().fma_rate(repeats); });
  return flops;
}

py::dict build_info() {
  const char* names[kMostLevels];
  const int count = compiled_levels(names);
  py::list levels;
  for (int i = 0; i < count; ++i) levels.append(names[i]);
  py::dict out;
  out["version"] = BACKMATCH_VERSION;
  out["compiler"] = BACKMATCH_COMPILER;
#ifdef _OPENMP
  out["openmp"] = true;
#else
  out["openmp"] = false;
#endif
  out["simd"] = levels;
  out["simd_active"] = active_level_name();
  const std::string cuda_version = BACKMATCH_CUDA_VERSION;  // empty in a build without CUDA
  out["cuda"] = !cuda_version.empty();
  out["cuda_version"] = cuda_version.empty() ? py::object(py::none()) : py::str(cuda_version);
  out["cuda_architectures"] =
      cuda_version.empty() ? py::object(py::none()) : py::str(BACKMATCH_CUDA_ARCHITECTURES);
  return out;
}

void set_simd_level(const std::string& name) { set_active_level(name.c_str()); }

}  // namespace
}  // namespace backmatch

PYBIND11_MODULE(_C, m) {
  using namespace pybind11::literals;
  using released = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Native kernels of backmatch; use backmatch.linalg, which checks and allocates.";
  m.def("spd_solve", backmatch::spd_solve, released(), "dtype"_a, "batch"_a, "n"_a, "k"_a, "A"_a,
        "a_batch"_a, "a_row"_a, "a_col"_a, "damping"_a, "damping_stride"_a, "B"_a, "b_batch"_a,
        "b_row"_a, "b_col"_a, "X"_a, "info"_a);
  m.def("scaled_gram_solve", backmatch::scaled_gram_solve, released(), "dtype"_a, "batch"_a,
        "n"_a, "K"_a, "k_row"_a, "k_col"_a, "D"_a, "d_batch"_a, "d_col"_a, "R"_a, "r_batch"_a,
        "r_col"_a, "damping"_a, "damping_stride"_a, "X"_a, "info"_a);
  m.def("weighted_gram", backmatch::weighted_gram, released(), "dtype"_a, "batch"_a, "m"_a, "n"_a,
        "Z"_a, "z_row"_a, "z_col"_a, "w"_a, "w_batch"_a, "w_col"_a, "damping"_a,
        "damping_stride"_a, "G"_a);
  m.def("cg", backmatch::cg, released(), "dtype"_a, "batch"_a, "n"_a, "k"_a, "A"_a, "a_batch"_a,
        "a_row"_a, "a_col"_a, "damping"_a, "damping_stride"_a, "B"_a, "b_batch"_a, "b_row"_a,
        "b_col"_a, "rtol"_a, "max_steps"_a, "X"_a, "iterations"_a, "residual"_a, "converged"_a);
  m.def("fma_rate", backmatch::fma_rate, released(), "dtype"_a, "repeats"_a,
        "Multiply-adds in registers on every thread; returns the operations done, to be timed.");
  m.def("build_info", backmatch::build_info, "What this build holds and which level is in use.");
  m.def("set_simd_level", backmatch::set_simd_level, "name"_a,
        "Uses one SIMD level from now on, process-wide; ValueError where it is missing.");
  backmatch::bind_family(m);
  backmatch::bind_cuda(m);
  const char* level = std::getenv("BACKMATCH_SIMD");
  if (level != nullptr && *level != '\0') {
    try {
      backmatch::set_simd_level(level);
    } catch (const std::invalid_argument& error) {
      throw py::import_error(std::string("BACKMATCH_SIMD: ") + error.what());
    }
  }
}
