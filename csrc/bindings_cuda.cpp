// backmatch._C.cuda: the CUDA launchers on device addresses, enqueued on a stream.
//
// Arguments are those of the CPU functions, then `workspace`, the address of as many bytes of
// device memory as the function `<stem>_workspace` names (0 where that is 0; no argument where there
// is no such function), then `stream`, a cudaStream_t as an int. The device of the addresses must be
// current.
#include "bindings.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace backmatch {

void bind_cuda_cg(py::module_& sub);  // in bindings_cuda_cg.cpp

namespace {

int64_t spd_solve_workspace(const std::string& dtype, int64_t batch, int64_t n, int64_t k) {
  check_sizes("spd_solve", {batch, n, k});
  int64_t bytes = 0;
  with_dtype(dtype, [&](auto zero) {
    bytes = cuda::spd_solve_workspace<decltype(zero)>(batch, n, k);
  });
  return bytes;
}

void spd_solve(const std::string& dtype, int64_t batch, int64_t n, int64_t k, Address A,
               int64_t a_batch, int64_t a_row, int64_t a_col, Address damping,
               int64_t damping_stride, Address B, int64_t b_batch, int64_t b_row, int64_t b_col,
               Address X, Address info, Address workspace, Address stream) {
  check_sizes("spd_solve", {batch, n, k});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const SpdSolveArgs<T> args{
        batch, n, k, at<const T>(A), a_batch, a_row, a_col, at<const T>(damping), damping_stride,
        at<const T>(B), b_batch, b_row, b_col, at<T>(X), at<int32_t>(info)};
    cuda::launch_spd_solve(args, at<void>(workspace), at<void>(stream));
  });
}

int64_t scaled_gram_solve_workspace(const std::string& dtype, int64_t batch, int64_t n) {
  check_sizes("scaled_gram_solve", {batch, n});
  int64_t bytes = 0;
  with_dtype(dtype, [&](auto zero) {
    bytes = cuda::scaled_gram_solve_workspace<decltype(zero)>(batch, n);
  });
  return bytes;
}

void scaled_gram_solve(const std::string& dtype, int64_t batch, int64_t n, Address K,
                       int64_t k_row, int64_t k_col, Address D, int64_t d_batch, int64_t d_col,
                       Address R, int64_t r_batch, int64_t r_col, Address damping,
                       int64_t damping_stride, Address X, Address info, Address workspace,
                       Address stream) {
  check_sizes("scaled_gram_solve", {batch, n});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const ScaledGramArgs<T> args{
        batch, n, at<const T>(K), k_row, k_col, at<const T>(D), d_batch, d_col, at<const T>(R),
        r_batch, r_col, at<const T>(damping), damping_stride, at<T>(X), at<int32_t>(info)};
    cuda::launch_scaled_gram_solve(args, at<void>(workspace), at<void>(stream));
  });
}

void weighted_gram(const std::string& dtype, int64_t batch, int64_t m, int64_t n, Address Z,
                   int64_t z_row, int64_t z_col, Address w, int64_t w_batch, int64_t w_col,
                   Address damping, int64_t damping_stride, Address G, Address stream) {
  check_sizes("weighted_gram", {batch, m, n});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const WeightedGramArgs<T> args{batch, m, n, at<const T>(Z), z_row, z_col, at<const T>(w),
                                   w_batch, w_col, at<const T>(damping), damping_stride, at<T>(G)};
    cuda::launch_weighted_gram(args, at<void>(stream));
  });
}

bool ridge_primal_fits(const std::string& dtype, int64_t n) {
  check_sizes("ridge_primal", {n});
  bool fits = false;
  with_dtype(dtype, [&](auto zero) { fits = cuda::ridge_primal_fits<decltype(zero)>(n); });
  return fits;
}

void ridge_primal(const std::string& dtype, int64_t batch, int64_t m, int64_t n, Address Z,
                  int64_t z_row, int64_t z_col, Address D, int64_t d_batch, int64_t d_col,
                  Address R, int64_t r_batch, int64_t r_col, Address damping,
                  int64_t damping_stride, Address d, Address info, Address stream) {
  check_sizes("ridge_primal", {batch, m, n});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const RidgePrimalArgs<T> args{
        batch, m, n, at<const T>(Z), z_row, z_col, at<const T>(D), d_batch, d_col, at<const T>(R),
        r_batch, r_col, at<const T>(damping), damping_stride, at<T>(d), at<int32_t>(info)};
    cuda::launch_ridge_primal(args, at<void>(stream));
  });
}

}  // namespace

void bind_cuda(py::module_& m) {
  using namespace pybind11::literals;
  using released = py::call_guard<py::gil_scoped_release>;
  py::module_ sub = m.def_submodule("cuda", "CUDA kernels on device addresses.");
  sub.def("device_count", cuda::device_count, "CUDA devices that can be used.");
  sub.def("spd_solve_workspace", spd_solve_workspace, "dtype"_a, "batch"_a, "n"_a, "k"_a,
          "Bytes of workspace that spd_solve needs on the current device.");
  sub.def("spd_solve", spd_solve, released(), "dtype"_a, "batch"_a, "n"_a, "k"_a, "A"_a,
          "a_batch"_a, "a_row"_a, "a_col"_a, "damping"_a, "damping_stride"_a, "B"_a, "b_batch"_a,
          "b_row"_a, "b_col"_a, "X"_a, "info"_a, "workspace"_a, "stream"_a);
  sub.def("scaled_gram_solve_workspace", scaled_gram_solve_workspace, "dtype"_a, "batch"_a, "n"_a,
          "Bytes of workspace that scaled_gram_solve needs on the current device.");
  sub.def("scaled_gram_solve", scaled_gram_solve, released(), "dtype"_a, "batch"_a, "n"_a, "K"_a,
          "k_row"_a, "k_col"_a, "D"_a, "d_batch"_a, "d_col"_a, "R"_a, "r_batch"_a, "r_col"_a,
          "damping"_a, "damping_stride"_a, "X"_a, "info"_a, "workspace"_a, "stream"_a);
  sub.def("weighted_gram", weighted_gram, released(), "dtype"_a, "batch"_a, "m"_a, "n"_a, "Z"_a,
          "z_row"_a, "z_col"_a, "w"_a, "w_batch"_a, "w_col"_a, "damping"_a, "damping_stride"_a,
          "G"_a, "stream"_a);
  sub.def("ridge_primal_fits", ridge_primal_fits, "dtype"_a, "n"_a,
          "Whether ridge_primal takes systems of order n on the current device.");
  sub.def("ridge_primal", ridge_primal, released(), "dtype"_a, "batch"_a, "m"_a, "n"_a, "Z"_a,
          "z_row"_a, "z_col"_a, "D"_a, "d_batch"_a, "d_col"_a, "R"_a, "r_batch"_a, "r_col"_a,
          "damping"_a, "damping_stride"_a, "d"_a, "info"_a, "stream"_a);
  bind_cuda_device(sub);
  bind_cuda_cg(sub);
}

}  // namespace backmatch
