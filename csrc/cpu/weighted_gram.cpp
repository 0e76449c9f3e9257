// G_j = Z^T diag(w_j) Z + damping_j I for many weightings of one Z.
//
// Two ways, chosen for each system by its own weights: gram_pairs.h multiplies products of columns
// by the weights of all systems, gram_rows.h takes one system at a time and skips rows with w == 0.
// With dense weights the former takes a quarter (n = 17) to two thirds (n = 65) of the time of the
// latter; with half the weights zero they meet near n = 48 (AVX-512, float32).
#include "gram_pairs.h"
#include "gram_rows.h"
#include "kernels_simd.h"
#include "workspace.h"

namespace backmatch {
namespace BACKMATCH_SIMD_LEVEL {

namespace {

// Largest order at which products of columns are formed: above, forming them costs small batches
// more than they save large ones.
constexpr int64_t kPairOrder = 80;

// Z in rows of `pitch` entries, zeros past column n.
template <class T>
void copy_rows(const WeightedGramArgs<T>& a, int64_t pitch, T* rows) {
  for (int64_t i = 0; i < a.m; ++i, rows += pitch) {
    const T* from = a.Z + i * a.z_row;
    if (a.z_col == 1) {
      for (int64_t c = 0; c < a.n; ++c) rows[c] = from[c];
    } else {
      for (int64_t c = 0; c < a.n; ++c) rows[c] = from[c * a.z_col];
    }
    for (int64_t c = a.n; c < pitch; ++c) rows[c] = T(0);
  }
}

template <class T>
void copy_panels(const T* rows, int64_t m, int64_t pitch, T* panels) {
  for (int64_t p = 0; p < pitch; p += kGramColumns<T>)
    for (int64_t q = 0; q < m; ++q, panels += kGramColumns<T>)
      for (int c = 0; c < kGramColumns<T>; ++c) panels[c] = rows[q * pitch + p + c];
}

template <class T>
void copy_weights(const WeightedGramArgs<T>& a, T* to) {
  for (int64_t j = 0; j < a.batch; ++j)
    for (int64_t i = 0; i < a.m; ++i) to[j * a.m + i] = a.w[j * a.w_batch + i * a.w_col];
}

// Lists the rows some of whose products of two entries are not finite; `rows` is read in vectors.
template <class T>
int64_t list_wild(const T* rows, int64_t m, int64_t pitch, int64_t* wild) {
  int64_t count = 0;
  for (int64_t i = 0; i < m; ++i, rows += pitch) {
    IntVec<T> tame = ~IntVec<T>{};
    for (int64_t c = 0; c < pitch; c += kLanes<T>) {
      const Vec<T> entry = load(rows + c);
      tame &= entry * entry <= Simd<T>::kLargest;
    }
    wild[count] = i;
    for (int l = 0; l < kLanes<T>; ++l)
      if (tame[l] == 0) {
        ++count;
        break;
      }
  }
  return count;
}

// The costs of the two ways, in vectors of multiply-adds; a row with w == 0 costs a look at it.
template <class T>
struct Costs {
  double pairs, rows, row;

  Costs(int64_t m, int64_t n) : row(0) {
    const double order = static_cast<double>(n);
    const double all = static_cast<double>(m);
    pairs = 1.05 * all * static_cast<double>((pair_count(n) + kLanes<T> - 1) / kLanes<T>);
    rows = 4 * all + order * order;
    for (int64_t p = 0; p < gram_order(n); p += kGramColumns<T>)
      for (int64_t i = p; i < gram_order(n); i += kGramStrip)
        row += static_cast<double>(gram_vectors<T>(i, p) * kGramStrip);
  }
};

// Which way a system goes: by its own weights, never by its neighbours. Products that are not
// finite serve nobody, since 0 times them is NaN.
template <class T>
bool takes_rows(const WeightedGramArgs<T>& a, int64_t system, const int64_t* wild, int64_t wilds,
                const Costs<T>& costs) {
  if (a.n > kPairOrder) return true;
  const T* w = a.w + system * a.w_batch;
  for (int64_t q = 0; q < wilds; ++q)
    if (w[wild[q]] != T(0)) return true;
  int64_t count = 0;
  for (int64_t i = 0; i < a.m; ++i) count += w[i] != T(0);
  return costs.rows + static_cast<double>(count) * costs.row < costs.pairs;
}

template <class T>
double gram_flops(const WeightedGramArgs<T>& a, int64_t systems) {
  const double order = static_cast<double>(a.n);
  return order * order * static_cast<double>(a.m) * static_cast<double>(systems);
}

template <class T>
void all_by_rows(const WeightedGramArgs<T>& a, const T* rows, const int64_t* listed,
                 int64_t count) {
  constexpr int64_t kSize = sizeof(T);
  const int64_t pitch = gram_pitch<T>(a.n);
  const Workspace shared(pitch * a.m * kSize);
  T* panels = shared.at<T>(0);
  copy_panels(rows, a.m, pitch, panels);
  const int64_t strips_at = cache_lines(gram_order(a.n) * pitch * kSize);
  const int64_t listed_at = strips_at + cache_lines(gram_order(a.n) * kGramRows * kSize);
  const int64_t weights_at = listed_at + cache_lines((kGramRows + 1) * int64_t{8});
  const int64_t bytes = weights_at + cache_lines((kGramRows + 1) * kSize);
  const int threads = threads_for(count, gram_flops(a, count));
  [[maybe_unused]] const int64_t chunk = tasks_at_a_time(count, threads);
  const Workspace workspace(bytes * threads);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1)
  for (int64_t j = 0; j < count; ++j) {
    const int64_t at = thread_number() * bytes;
    gram_by_rows(a, listed[j], panels,
                 GramScratch<T>{workspace.at<T>(at), workspace.at<T>(at + strips_at),
                                workspace.at<int64_t>(at + listed_at),
                                workspace.at<T>(at + weights_at)});
  }
}

// Tasks are a block of pairs for a group of systems: large groups, since each forms the products
// anew.
template <class T>
void all_by_pairs(const WeightedGramArgs<T>& a, const T* rows, const int64_t* listed,
                  int64_t count) {
  constexpr int64_t kLeastGroup = 64;
  const int64_t bytes = cache_lines(kPairScratch<T> * static_cast<int64_t>(sizeof(T)));
  const int64_t blocks = pair_blocks<T>(a.n);
  const int threads = threads_for(count * blocks, gram_flops(a, count));
  const int64_t wanted = threads == 1 ? 1 : (4 * threads + blocks - 1) / blocks;
  const int64_t most = (count + kLeastGroup - 1) / kLeastGroup;
  const int64_t share = wanted < most ? wanted : most;
  const int64_t group = (count + share - 1) / share;
  const int64_t groups = (count + group - 1) / group;
  const PairRows<T> z{rows, gram_pitch<T>(a.n)};
  const Workspace workspace(bytes * threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < blocks * groups; ++task) {
      const int64_t first = task / blocks * group;
      const int64_t size = count - first < group ? count - first : group;
      T* products = workspace.at<T>(thread_number() * bytes);
      sum_pairs(a, z, task % blocks, listed + first, size, products);
    }
#pragma omp for schedule(static)
    for (int64_t j = 0; j < count; ++j) spread_pairs(a, listed[j]);
  }
}

}  // namespace

template <class T>
void weighted_gram(const WeightedGramArgs<T>& given) {
  constexpr int64_t kSize = sizeof(T);
  if (given.batch == 0 || given.n == 0) return;
  WeightedGramArgs<T> a = given;
  const Workspace weights(a.w_col == 1 ? 0 : a.batch * a.m * kSize);
  if (a.w_col != 1) {
    copy_weights(given, weights.at<T>(0));
    a.w = weights.at<T>(0);
    a.w_batch = a.m;
    a.w_col = 1;
  }
  const int64_t pitch = gram_pitch<T>(a.n);
  const Workspace shared((pitch * a.m + kLanes<T>) * kSize);
  T* rows = shared.at<T>(0);
  copy_rows(a, pitch, rows);
  const Workspace lists((a.m + 1 + 2 * a.batch) * int64_t{8});
  int64_t* wild = lists.at<int64_t>(0);
  int64_t* systems[2] = {wild + a.m + 1, wild + a.m + 1 + a.batch};
  int64_t counts[2] = {};
  const int64_t wilds = list_wild(rows, a.m, pitch, wild);
  const Costs<T> costs(a.m, a.n);
  for (int64_t j = 0; j < a.batch; ++j) {
    const int way = takes_rows(a, j, wild, wilds, costs) ? 0 : 1;
    systems[way][counts[way]++] = j;
  }
  if (counts[0] > 0) all_by_rows(a, rows, systems[0], counts[0]);
  // Nobody left has a weight for the wild rows.
  for (int64_t q = 0; q < wilds; ++q)
    for (int64_t c = 0; c < a.n; ++c) rows[wild[q] * pitch + c] = T(0);
  if (counts[1] > 0) all_by_pairs(a, rows, systems[1], counts[1]);
}

template void weighted_gram<float>(const WeightedGramArgs<float>&);
template void weighted_gram<double>(const WeightedGramArgs<double>&);

}  // namespace BACKMATCH_SIMD_LEVEL
}  // namespace backmatch
