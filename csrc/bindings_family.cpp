// Bindings of the kernels on one shared matrix: least squares in dual form, its check, and what
// conjugate gradient multiplies by and updates. Conventions as in bindings.cpp.
#include <cmath>

#include "bindings.h"

namespace backmatch {
namespace {

void ridge_dual(const std::string& dtype, int64_t batch, int64_t m, int64_t n, Address Z,
                int64_t z_row, int64_t z_col, Address D, int64_t d_batch, int64_t d_col, Address R,
                int64_t r_batch, int64_t r_col, Address damping, int64_t damping_stride, Address d,
                Address info) {
  check_sizes("ridge_dual", {batch, m, n});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().ridge_dual({batch, m, n, at<const T>(Z), z_row, z_col, at<const T>(D), d_batch,
                             d_col, at<const T>(R), r_batch, r_col, at<const T>(damping),
                             damping_stride, at<T>(d), at<int32_t>(info)});
  });
}

void ridge_complement(const std::string& dtype, int64_t batch, int64_t m, int64_t n, Address Z,
                      int64_t z_row, int64_t z_col, Address D, int64_t d_batch, int64_t d_col,
                      Address R, int64_t r_batch, int64_t r_col, Address damping,
                      int64_t damping_stride, Address d, Address info) {
  check_sizes("ridge_complement", {batch, m, n});
  if (dtype != "float32")
    throw std::invalid_argument("ridge_complement: expected dtype 'float32', got '" + dtype + "'");
  active_level().ridge_complement({batch, m, n, at<const float>(Z), z_row, z_col,
                                   at<const float>(D), d_batch, d_col, at<const float>(R), r_batch,
                                   r_col, at<const float>(damping), damping_stride, at<float>(d),
                                   at<int32_t>(info)});
}

// D is not read: the arguments are those of the whole family.
void ridge_shared(const std::string& dtype, int64_t batch, int64_t m, int64_t n, Address Z,
                  int64_t z_row, int64_t z_col, Address, int64_t, int64_t, Address R,
                  int64_t r_batch, int64_t r_col, Address damping, int64_t, Address d,
                  Address info) {
  check_sizes("ridge_shared", {batch, m, n});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().ridge_shared({batch, m, n, at<const T>(Z), z_row, z_col, at<const T>(R), r_batch,
                               r_col, at<const T>(damping), at<T>(d), at<int32_t>(info)});
  });
}

pybind11::tuple ridge_counts(const std::string& dtype, int64_t batch, int64_t m, Address D,
                             int64_t d_batch, int64_t d_col) {
  check_sizes("ridge_counts", {batch, m});
  RidgeCounts found{};
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    found = kernels<T>().ridge_counts({batch, m, at<const T>(D), d_batch, d_col});
  });
  return pybind11::make_tuple(found.active, found.dual, found.complement, found.most,
                              found.binary);
}

// The worst sqrt(error / size) over sums of `group` systems in a row; absolute where the size is 0.
double worst_ratio(const double* error, const double* size, int64_t batch, int64_t group) {
  double worst = 0;
  for (int64_t first = 0; first < batch; first += group) {
    double above = 0, below = 0;
    for (int64_t j = first; j < first + group && j < batch; ++j) {
      above += error[j];
      below += size[j];
    }
    const double ratio = std::sqrt(above) / (below == 0 ? 1 : std::sqrt(below));
    if (!(ratio <= worst)) worst = ratio;  // so that a NaN stays
    if (worst != worst) return worst;
  }
  return worst;
}

double ridge_error(const std::string& dtype, int64_t batch, int64_t m, int64_t n, Address Z,
                 int64_t z_row, int64_t z_col, Address D, int64_t d_batch, int64_t d_col, Address R,
                 int64_t r_batch, int64_t r_col, Address damping, int64_t damping_stride, Address d,
                 int64_t step_batch, int64_t step_col, Address error, Address size,
                   int64_t group) {
  check_sizes("ridge_error", {batch, m, n, group - 1});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().ridge_error({batch, m, n, at<const T>(Z), z_row, z_col, at<const T>(D), d_batch,
                              d_col, at<const T>(R), r_batch, r_col, at<const T>(damping),
                              damping_stride, at<const T>(d), step_batch, step_col,
                              at<double>(error), at<double>(size)});
  });
  return worst_ratio(at<const double>(error), at<const double>(size), batch, group);
}

void ridge_normal(const std::string& dtype, int64_t batch, int64_t m, int64_t n, Address Z,
                  int64_t z_row, int64_t z_col, Address w, int64_t w_batch, int64_t w_col,
                  Address P, Address Q) {
  check_sizes("ridge_normal", {batch, m, n});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().ridge_normal({batch, m, n, at<const T>(Z), z_row, z_col, at<const T>(w), w_batch,
                               w_col, at<const T>(P), at<T>(Q)});
  });
}

void scaled_gram_product(const std::string& dtype, int64_t batch, int64_t n, Address K,
                         int64_t k_row, int64_t k_col, Address D, int64_t d_batch, int64_t d_col,
                         Address damping, int64_t damping_stride, Address P, Address Q) {
  check_sizes("scaled_gram_product", {batch, n});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().scaled_gram_product({batch, n, at<const T>(K), k_row, k_col, at<const T>(D),
                                      d_batch, d_col, at<const T>(damping), damping_stride,
                                      at<const T>(P), at<T>(Q)});
  });
}

int64_t cg_step(const std::string& dtype, int64_t systems, int64_t n, int64_t max_steps,
                bool preconditioned, Address P, Address Q, Address X, Address R, Address rho,
                Address target, Address running, Address alive, Address steps) {
  check_sizes("cg_step", {systems, n, max_steps});
  int64_t left = 0;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    left = kernels<T>().cg_step({systems, n, max_steps, preconditioned, at<T>(P), at<const T>(Q),
                                 at<T>(X), at<T>(R), at<T>(rho), at<const T>(target),
                                 at<uint8_t>(running), at<uint8_t>(alive), at<int64_t>(steps)});
  });
  return left;
}

void cg_direction(const std::string& dtype, int64_t systems, int64_t n, Address R, Address Z,
                  Address P, Address rho, Address running) {
  check_sizes("cg_direction", {systems, n});
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().cg_direction({systems, n, at<const T>(R), at<const T>(Z), at<T>(P), at<T>(rho),
                               at<const uint8_t>(running)});
  });
}

}  // namespace

void bind_family(pybind11::module_& m) {
  using namespace pybind11::literals;
  using released = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("ridge_dual", ridge_dual, released(), "dtype"_a, "batch"_a, "m"_a, "n"_a,
        "Z"_a, "z_row"_a, "z_col"_a, "D"_a, "d_batch"_a, "d_col"_a, "R"_a, "r_batch"_a, "r_col"_a,
        "damping"_a, "damping_stride"_a, "d"_a, "info"_a);
  m.def("ridge_complement", ridge_complement, released(), "dtype"_a, "batch"_a, "m"_a, "n"_a,
        "Z"_a, "z_row"_a, "z_col"_a, "D"_a, "d_batch"_a, "d_col"_a, "R"_a, "r_batch"_a, "r_col"_a,
        "damping"_a, "damping_stride"_a, "d"_a, "info"_a);
  m.def("ridge_shared", ridge_shared, released(), "dtype"_a, "batch"_a, "m"_a, "n"_a, "Z"_a,
        "z_row"_a, "z_col"_a, "D"_a, "d_batch"_a, "d_col"_a, "R"_a, "r_batch"_a, "r_col"_a,
        "damping"_a, "damping_stride"_a, "d"_a, "info"_a);
  m.def("ridge_error", ridge_error, released(), "dtype"_a, "batch"_a, "m"_a, "n"_a,
        "Z"_a, "z_row"_a, "z_col"_a, "D"_a, "d_batch"_a, "d_col"_a, "R"_a, "r_batch"_a, "r_col"_a,
        "damping"_a, "damping_stride"_a, "d"_a, "step_batch"_a, "step_col"_a, "error"_a, "size"_a,
        "group"_a);
  m.def("ridge_counts", ridge_counts, "dtype"_a, "batch"_a, "m"_a, "D"_a, "d_batch"_a, "d_col"_a);
  m.def("ridge_normal", ridge_normal, released(), "dtype"_a, "batch"_a, "m"_a, "n"_a, "Z"_a,
        "z_row"_a, "z_col"_a, "w"_a, "w_batch"_a, "w_col"_a, "P"_a, "Q"_a);
  m.def("scaled_gram_product", scaled_gram_product, released(), "dtype"_a, "batch"_a, "n"_a, "K"_a,
        "k_row"_a, "k_col"_a, "D"_a, "d_batch"_a, "d_col"_a, "damping"_a, "damping_stride"_a,
        "P"_a, "Q"_a);
  m.def("cg_step", cg_step, released(), "dtype"_a, "systems"_a, "n"_a, "max_steps"_a,
        "preconditioned"_a, "P"_a, "Q"_a, "X"_a, "R"_a, "rho"_a, "target"_a, "running"_a,
        "alive"_a, "steps"_a);
  m.def("cg_direction", cg_direction, released(), "dtype"_a, "systems"_a, "n"_a, "R"_a, "Z"_a,
        "P"_a, "rho"_a, "running"_a);
}

}  // namespace backmatch
