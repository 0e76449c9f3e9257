// The conjugate gradient part of backmatch._C.cuda; conventions as in bindings_cuda.cpp.
#include "bindings.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace backmatch {
namespace {

template <class Value>
int64_t for_dtype(const std::string& dtype, Value value) {
  int64_t result = 0;
  with_dtype(dtype, [&](auto zero) { result = value(zero); });
  return result;
}

int64_t cg_largest_order(const std::string& dtype) {
  return for_dtype(dtype, [](auto zero) { return cuda::cg_largest_order<decltype(zero)>(); });
}

int64_t scaled_gram_cg_largest_order(const std::string& dtype) {
  return for_dtype(
      dtype, [](auto zero) { return cuda::scaled_gram_cg_largest_order<decltype(zero)>(); });
}

int64_t cg_step_workspace(const std::string& dtype, int64_t systems, int64_t n) {
  check_sizes("cg_step", {systems, n});
  return for_dtype(
      dtype, [&](auto zero) { return cuda::cg_step_workspace<decltype(zero)>(systems, n); });
}

void cg(const std::string& dtype, int64_t batch, int64_t n, int64_t k, Address A, int64_t a_batch,
        int64_t a_row, int64_t a_col, Address damping, int64_t damping_stride, Address B,
        int64_t b_batch, int64_t b_row, int64_t b_col, double rtol, int64_t max_steps, Address X,
        Address iterations, Address residual, Address converged, Address stream) {
  check_sizes("cg", {batch, n, k});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const CgArgs<T> args{
        batch, n, k, at<const T>(A), a_batch, a_row, a_col, at<const T>(damping), damping_stride,
        at<const T>(B), b_batch, b_row, b_col, static_cast<T>(rtol), max_steps, at<T>(X),
        at<int64_t>(iterations), at<T>(residual), at<uint8_t>(converged)};
    cuda::launch_cg(args, at<void>(stream));
  });
}

void scaled_gram_cg(const std::string& dtype, int64_t batch, int64_t n, Address K, int64_t k_row,
                    int64_t k_col, Address D, int64_t d_batch, int64_t d_col, Address R,
                    int64_t r_batch, int64_t r_col, Address damping, int64_t damping_stride,
                    Address upper, Address lower, double rtol, int64_t max_steps, Address X,
                    Address iterations, Address residual, Address converged, Address stream) {
  check_sizes("scaled_gram_cg", {batch, n});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const ScaledGramCgArgs<T> args{
        batch, n, at<const T>(K), k_row, k_col, at<const T>(D), d_batch, d_col, at<const T>(R),
        r_batch, r_col, at<const T>(damping), damping_stride, at<const T>(upper),
        at<const T>(lower), static_cast<T>(rtol), max_steps, at<T>(X), at<int64_t>(iterations),
        at<T>(residual), at<uint8_t>(converged)};
    cuda::launch_scaled_gram_cg(args, at<void>(stream));
  });
}

void cg_step(const std::string& dtype, int64_t systems, int64_t n, int64_t max_steps,
             bool preconditioned, Address P, Address Q, Address X, Address R, Address rho,
             Address target, Address running, Address alive, Address steps, Address workspace,
             Address stream) {
  check_sizes("cg_step", {systems, n});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const CgStepArgs<T> args{
        systems, n, max_steps, preconditioned, at<T>(P), at<const T>(Q), at<T>(X), at<T>(R),
        at<T>(rho), at<const T>(target), at<uint8_t>(running), at<uint8_t>(alive),
        at<int64_t>(steps)};
    cuda::launch_cg_step(args, at<void>(workspace), at<void>(stream));
  });
}

void cg_direction(const std::string& dtype, int64_t systems, int64_t n, Address R, Address Z,
                  Address P, Address rho, Address running, Address workspace, Address stream) {
  check_sizes("cg_direction", {systems, n});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const CgDirectionArgs<T> args{systems, n, at<const T>(R), at<const T>(Z), at<T>(P),
                                  at<T>(rho), at<const uint8_t>(running)};
    cuda::launch_cg_direction(args, at<void>(workspace), at<void>(stream));
  });
}

}  // namespace

void bind_cuda_cg(py::module_& sub) {
  using namespace pybind11::literals;
  using released = py::call_guard<py::gil_scoped_release>;
  sub.def("cg_largest_order", cg_largest_order, "dtype"_a, "The largest n that cg takes.");
  sub.def("cg", cg, released(), "dtype"_a, "batch"_a, "n"_a, "k"_a, "A"_a, "a_batch"_a, "a_row"_a,
          "a_col"_a, "damping"_a, "damping_stride"_a, "B"_a, "b_batch"_a, "b_row"_a, "b_col"_a,
          "rtol"_a, "max_steps"_a, "X"_a, "iterations"_a, "residual"_a, "converged"_a, "stream"_a);
  sub.def("scaled_gram_cg_largest_order", scaled_gram_cg_largest_order, "dtype"_a,
          "The largest n that scaled_gram_cg takes.");
  sub.def("scaled_gram_cg", scaled_gram_cg, released(), "dtype"_a, "batch"_a, "n"_a, "K"_a,
          "k_row"_a, "k_col"_a, "D"_a, "d_batch"_a, "d_col"_a, "R"_a, "r_batch"_a, "r_col"_a,
          "damping"_a, "damping_stride"_a, "upper"_a, "lower"_a, "rtol"_a, "max_steps"_a, "X"_a,
          "iterations"_a, "residual"_a, "converged"_a, "stream"_a);
  sub.def("cg_step_workspace", cg_step_workspace, "dtype"_a, "systems"_a, "n"_a,
          "Bytes of workspace that cg_step and cg_direction need.");
  sub.def("cg_step", cg_step, released(), "dtype"_a, "systems"_a, "n"_a, "max_steps"_a,
          "preconditioned"_a, "P"_a, "Q"_a, "X"_a, "R"_a, "rho"_a, "target"_a, "running"_a,
          "alive"_a, "steps"_a, "workspace"_a, "stream"_a);
  sub.def("cg_direction", cg_direction, released(), "dtype"_a, "systems"_a, "n"_a, "R"_a, "Z"_a,
          "P"_a, "rho"_a, "running"_a, "workspace"_a, "stream"_a);
}

}  // namespace backmatch
