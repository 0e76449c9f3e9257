// G_j = Z^T diag(w_j) Z + damping_j I for many weightings of one Z.
//
// Z is repacked once into panels of kGramColumns columns that all threads share. For each system
// the rows with w != 0 are taken kGramRows at a time: their weighted copy, cut into strips of
// kGramStrip columns, is the left factor, the shared panels are the right one. A panel stays in
// the first-level cache while the strips stream past it. Only tiles that touch the lower triangle
// are computed; the upper one is mirrored from it.
#include "kernels_simd.h"
#include "simd.h"
#include "workspace.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

namespace {

constexpr int kGramVectors = kBlockVectors;
constexpr int kGramStrip = kBlockScalars;
constexpr int64_t kGramRows = 256;

template <class T>
constexpr int kGramColumns = kGramVectors* kLanes<T>;

// Z in panels: panel[i * kGramColumns + c], zeros past column n.
template <class T>
void pack_panels(const WeightedGramArgs<T>& a, int64_t panels, T* packed) {
  constexpr int64_t kWide = kGramColumns<T>;
  for (int64_t b = 0; b < panels; ++b)
    for (int64_t i = 0; i < a.m; ++i)
      for (int64_t c = 0; c < kWide; ++c) {
        const int64_t column = b * kWide + c;
        packed[(b * a.m + i) * kWide + c] =
            column < a.n ? a.Z[i * a.z_row + column * a.z_col] : T(0);
      }
}

// Up to kGramRows rows with w != 0 from row `i` on; moves `i` past them.
template <class T>
int64_t list_rows(const WeightedGramArgs<T>& a, int64_t system, int64_t& i, int64_t* rows,
                  T* weights) {
  const T* w = a.w + system * a.w_batch;
  int64_t count = 0;
  for (; i < a.m && count < kGramRows; ++i) {
    const T weight = w[i * a.w_col];
    if (weight == T(0)) continue;
    rows[count] = i;
    weights[count++] = weight;
  }
  return count;
}

// strip[q * kGramStrip + c] = w_q Z[rows[q], column + c]; a strip never leaves its panel.
template <class T>
void weigh_strip(const T* packed, int64_t m, int64_t column, const int64_t* rows, const T* weights,
                 int64_t count, T* strip) {
  constexpr int64_t kWide = kGramColumns<T>;
  const T* from = packed + column / kWide * m * kWide + column % kWide;
  for (int64_t q = 0; q < count; ++q)
    for (int c = 0; c < kGramStrip; ++c)
      strip[q * kGramStrip + c] = weights[q] * from[rows[q] * kWide + c];
}

// tile (kGramStrip x kGramColumns, rows `stride` apart) += strip^T panel[rows], or = if kFirst.
template <class T, bool kFirst>
void add_products(const T* strip, const T* panel, const int64_t* rows, int64_t count, T* tile,
                  int64_t stride) {
  constexpr int64_t kWide = kGramColumns<T>;
  Vec<T> sum[kGramStrip][kGramVectors];
#pragma GCC unroll 8
  for (int c = 0; c < kGramStrip; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < kGramVectors; ++v)
      sum[c][v] = kFirst ? Vec<T>{} : load(tile + c * stride + v * kLanes<T>);
  for (int64_t q = 0; q < count; ++q, strip += kGramStrip) {
    const T* row = panel + rows[q] * kWide;
    Vec<T> z[kGramVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kGramVectors; ++v) z[v] = load(row + v * kLanes<T>);
#pragma GCC unroll 8
    for (int c = 0; c < kGramStrip; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < kGramVectors; ++v) sum[c][v] += z[v] * strip[c];
  }
#pragma GCC unroll 8
  for (int c = 0; c < kGramStrip; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < kGramVectors; ++v) store(tile + c * stride + v * kLanes<T>, sum[c][v]);
}

// Scratch of one thread. `sums` is a row-major square of the padded order.
template <class T>
struct Scratch {
  T* sums;
  T* strips;
  int64_t* rows;
  T* weights;
};

// Adds the listed rows to every tile that touches the lower triangle.
template <class T, bool kFirst>
void add_rows(const T* packed, int64_t m, int64_t panels, int64_t count, Scratch<T> s) {
  constexpr int64_t kWide = kGramColumns<T>;
  const int64_t order = panels * kWide;
  for (int64_t i = 0; i < order; i += kGramStrip)
    weigh_strip(packed, m, i, s.rows, s.weights, count, s.strips + i * kGramRows);
  for (int64_t p = 0; p < order; p += kWide)
    for (int64_t i = p; i < order; i += kGramStrip)
      add_products<T, kFirst>(s.strips + i * kGramRows, packed + p * m, s.rows, count,
                              s.sums + i * order + p, order);
}

// Copies the kLanes x kLanes block of sums at (i, p), p < i, to its place and to its mirror image.
template <class T>
BACKMATCH_INLINE void write_block(const T* sums, int64_t order, int64_t i, int64_t p, T* G,
                                  int64_t n) {
  constexpr int kWidth = kLanes<T>;
  Vec<T> entry[kWidth];
#pragma GCC unroll 16
  for (int l = 0; l < kWidth; ++l) {
    entry[l] = load(sums + (i + l) * order + p);
    store(G + (i + l) * n + p, entry[l]);
  }
  transpose<T>(entry);
#pragma GCC unroll 16
  for (int l = 0; l < kWidth; ++l) store(G + (p + l) * n + i, entry[l]);
}

template <class T>
void write_result(const WeightedGramArgs<T>& a, int64_t system, int64_t order, const T* sums) {
  constexpr int kWidth = kLanes<T>;
  T* G = a.G + system * a.n * a.n;
  for (int64_t first = 0; first < a.n; first += kWidth) {
    const bool whole = first + kWidth <= a.n;
    for (int64_t p = 0; whole && p < first; p += kWidth) write_block(sums, order, first, p, G, a.n);
    for (int64_t i = first; i < first + kWidth && i < a.n; ++i) {
      for (int64_t p = whole ? first : 0; p < i; ++p)
        G[i * a.n + p] = G[p * a.n + i] = sums[i * order + p];
      G[i * a.n + i] = sums[i * order + i] + a.damping[system * a.damping_stride];
    }
  }
}

template <class T>
void gram_of(const WeightedGramArgs<T>& a, int64_t system, const T* packed, int64_t panels,
             Scratch<T> s) {
  int64_t i = 0;
  int64_t count = list_rows(a, system, i, s.rows, s.weights);
  add_rows<T, true>(packed, a.m, panels, count, s);
  while (i < a.m) {
    count = list_rows(a, system, i, s.rows, s.weights);
    add_rows<T, false>(packed, a.m, panels, count, s);
  }
  write_result(a, system, panels * kGramColumns<T>, s.sums);
}

}  // namespace

template <class T>
void weighted_gram(const WeightedGramArgs<T>& a) {
  constexpr int64_t kSize = sizeof(T);
  constexpr int64_t kWide = kGramColumns<T>;
  if (a.batch == 0 || a.n == 0) return;
  const int64_t panels = (a.n + kWide - 1) / kWide;
  const Workspace shared(panels * a.m * kWide * kSize);
  T* packed = shared.at<T>(0);
  pack_panels(a, panels, packed);
  const int64_t strips_at = cache_lines(panels * kWide * panels * kWide * kSize);
  const int64_t rows_at = strips_at + cache_lines(panels * kWide * kGramRows * kSize);
  const int64_t weights_at = rows_at + cache_lines(kGramRows * 8);
  const int64_t bytes = weights_at + cache_lines(kGramRows * kSize);
  const double order = static_cast<double>(a.n);
  const int threads = threads_for(
      a.batch, order * order * static_cast<double>(a.m) * static_cast<double>(a.batch));
  [[maybe_unused]] const int64_t chunk = tasks_at_a_time(a.batch, threads);
  const Workspace workspace(bytes * threads);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1)
  for (int64_t system = 0; system < a.batch; ++system) {
    const int64_t at = thread_number() * bytes;
    gram_of(a, system, packed, panels,
            Scratch<T>{workspace.at<T>(at), workspace.at<T>(at + strips_at),
                       workspace.at<int64_t>(at + rows_at), workspace.at<T>(at + weights_at)});
  }
}

template void weighted_gram<float>(const WeightedGramArgs<float>&);
template void weighted_gram<double>(const WeightedGramArgs<double>&);

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
