// ridge_dual for 0/1 slopes and one damping, by way of the rows that are NOT active (derived here).
//
// A = Z Z^T + damping I is one matrix for all systems. With a = active rows, c = the others, r
// zero on c, the dual solution is the y with y_c = 0 and (A y)_a = r_a, so for some w
//     y = A^-1 (r - E_c w),    (A^-1)_cc w = (A^-1 r)_c.
// A^-1 is formed once, the Cholesky factor is of order |c|: a system costs min(|a|, |c|)^3 / 3, and
// the rest is products. (A^-1)_cc is as well conditioned as A, but errors of A^-1 count twice, so it
// is computed in float64 and rounded; for float64 itself there is nothing to round from, and the
// kernel exists for float32 only. Systems with slopes other than 0 and 1, with fewer active rows
// than others, or whose (A^-1)_cc fails, take the direct way.
#include "kernels_simd.h"
#include "ridge_products.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

namespace {

// Systems of one group, gathered: rows of slopes, right-hand sides and solutions.
struct Group {
  int64_t count = 0;
  int64_t* system;
  float *D, *R, *X;
  int32_t* info;
};

struct Gathered {
  Workspace memory;
  Group group;

  Gathered(int64_t batch, int64_t m)
      : memory(cache_lines(batch * 8) + 3 * cache_lines(batch * m * 4) + cache_lines(batch * 4)) {
    const int64_t rows = cache_lines(batch * m * 4), head = cache_lines(batch * 8);
    group.system = memory.at<int64_t>(0);
    group.D = memory.at<float>(head);
    group.R = memory.at<float>(head + rows);
    group.X = memory.at<float>(head + 2 * rows);
    group.info = memory.at<int32_t>(head + 3 * rows);
  }
};

// Whether the slopes are 0 and 1 with more ones than zeros.
bool mostly_on(const RidgeDualArgs<float>& a, int64_t system) {
  const float* D = a.D + system * a.d_batch;
  int64_t on = 0, off = 0;
  for (int64_t i = 0; i < a.m; ++i) {
    on += D[i * a.d_col] == 1.0f;
    off += D[i * a.d_col] == 0.0f;
  }
  return on + off == a.m && on > off;
}

void add_system(const RidgeDualArgs<float>& a, int64_t system, Group& to) {
  const int64_t at = to.count * a.m;
  for (int64_t i = 0; i < a.m; ++i) {
    to.D[at + i] = a.D[system * a.d_batch + i * a.d_col];
    to.R[at + i] = a.R[system * a.r_batch + i * a.r_col];
  }
  to.system[to.count++] = system;
}

// inverse (m x m) = (K + damping I)^-1, in float64 throughout; false where that fails. The columns
// are split among the threads, each of which factors the matrix for itself: the bits are the same.
bool invert(const float* K, int64_t m, float damping, float* inverse) {
  const double order = static_cast<double>(m);
  const int64_t parts = threads_for((m + 63) / 64, 2 * order * order * order);
  const int64_t columns = (m + parts - 1) / parts, wide = parts * columns;
  const int64_t square = m * m * 8, out = parts * m * columns * 8;
  const Workspace memory(cache_lines(square) + cache_lines(m * wide * 8) + cache_lines(out) +
                         cache_lines(parts * 4));
  double* A = memory.at<double>(0);
  double* B = memory.at<double>(cache_lines(square));
  double* X = memory.at<double>(cache_lines(square) + cache_lines(m * wide * 8));
  int32_t* info = memory.at<int32_t>(cache_lines(square) + cache_lines(m * wide * 8) +
                                     cache_lines(out));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p <= i; ++p) A[i * m + p] = static_cast<double>(K[i * m + p]);
  for (int64_t e = 0; e < m * wide; ++e) B[e] = 0;
  for (int64_t i = 0; i < m; ++i) B[i * wide + i] = 1;
  const double shift = static_cast<double>(damping);
  spd_solve<double>({parts, m, columns, A, 0, m, 1, &shift, 0, B, columns, wide, 1, X, info});
  for (int64_t part = 0; part < parts; ++part) {
    if (info[part] != 0) return false;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t c = 0; c < columns && part * columns + c < m; ++c)
        inverse[i * m + part * columns + c] =
            static_cast<float>(X[(part * m + i) * columns + c]);
  }
  return true;
}

// X = y of the systems of the group, by way of their inactive rows.
void solve_complement(const float* inverse, const float* packed, int64_t m, Group& g,
                      float* scratch) {
  constexpr float kNone = 0;
  float* off = scratch;               // slopes of the complement
  float* applied = scratch + g.count * m;  // A^-1 r
  for (int64_t e = 0; e < g.count * m; ++e) {
    off[e] = 1 - g.D[e];
    if (g.D[e] == 0) g.R[e] = 0;  // whatever it holds
  }
  multiply_rows(g.R, m, g.count, m, packed, m, applied);
  scaled_gram_solve<float>({g.count, m, inverse, m, 1, off, m, 1, applied, m, 1, &kNone, 0, g.X,
                            g.info});
  for (int64_t e = 0; e < g.count * m; ++e) applied[e] = g.R[e] - g.X[e];
  multiply_rows(applied, m, g.count, m, packed, m, g.X);
  for (int64_t e = 0; e < g.count * m; ++e) g.X[e] *= g.D[e];
}

void scatter(const Group& g, int64_t m, float* X, int32_t* info) {
  for (int64_t j = 0; j < g.count; ++j) {
    info[g.system[j]] = g.info[j];
    for (int64_t i = 0; i < m; ++i) X[g.system[j] * m + i] = g.X[j * m + i];
  }
}

}  // namespace

void ridge_complement(const RidgeDualArgs<float>& a) {
  if (a.batch == 0) return;
  const int64_t m = a.m, n = a.n;
  int64_t most = product_elements<float>(n, m);
  if (product_elements<float>(m, n) > most) most = product_elements<float>(m, n);
  if (product_elements<float>(m, m) > most) most = product_elements<float>(m, m);
  const int64_t square = cache_lines(m * m * 4);
  const Workspace memory(2 * square + 4 * most + 4 * a.batch * m);
  float* K = memory.at<float>(0);
  float* inverse = memory.at<float>(square);
  float* packed = memory.at<float>(2 * square);
  float* X = memory.at<float>(2 * square + 4 * most);
  pack_all(a.Z, a.z_col, a.z_row, n, m, packed);
  gram_rows(a.Z, a.z_row, a.z_col, m, n, packed, K);

  Gathered on(a.batch, m), rest(a.batch, m);
  const bool inverted = invert(K, m, a.damping[0], inverse);
  for (int64_t j = 0; j < a.batch; ++j)
    add_system(a, j, inverted && mostly_on(a, j) ? on.group : rest.group);
  if (on.group.count > 0) {
    const Workspace scratch(2 * on.group.count * m * 4);
    pack_all(inverse, m, 1, m, m, packed);
    solve_complement(inverse, packed, m, on.group, scratch.at<float>(0));
    scatter(on.group, m, X, a.info);
    for (int64_t j = 0; j < on.group.count; ++j)
      if (on.group.info[j] != 0) add_system(a, on.group.system[j], rest.group);
  }
  if (rest.group.count > 0) {
    scaled_gram_solve<float>({rest.group.count, m, K, m, 1, rest.group.D, m, 1, rest.group.R, m, 1,
                              a.damping, 0, rest.group.X, rest.group.info});
    scatter(rest.group, m, X, a.info);
  }
  pack_all(a.Z, a.z_row, a.z_col, m, n, packed);
  multiply_rows(X, m, a.batch, m, packed, n, a.d);
}

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
