// What the rest of the library sees of the CUDA side; includes no CUDA header.
//
// Launchers are asynchronous: they enqueue one kernel or a few on `stream` (a cudaStream_t; nullptr
// is the legacy default stream) of the current device and return. They throw std::runtime_error
// "backmatch CUDA: <kernel>: <reason>" when a launch fails and std::invalid_argument when a size is
// beyond a stated limit. `workspace` is device memory of at least the bytes that the function of
// the same stem names for the same sizes on the same device (0 bytes: nullptr is fine), aligned to
// 16 bytes, not read or written by anything else until the kernel has ended.
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace backmatch::cuda {

// Devices that can be used: 0 without a GPU or a driver.
int device_count();

template <class T>
int64_t spd_solve_workspace(int64_t batch, int64_t n, int64_t k);
template <class T>
void launch_spd_solve(const SpdSolveArgs<T>& args, void* workspace, void* stream);

template <class T>
int64_t scaled_gram_solve_workspace(int64_t batch, int64_t n);
template <class T>
void launch_scaled_gram_solve(const ScaledGramArgs<T>& args, void* workspace, void* stream);

// The device's rate of multiply-adds, by the vector units and by the matrix units (double): starts
// `repeats` steps and returns the operations that they are; fma_rate.cuh.
template <class T>
int64_t fma_rate_workspace();
template <class T>
double launch_fma_rate(int64_t repeats, void* workspace, void* stream);
int64_t matrix_rate_workspace();
double launch_matrix_rate(int64_t repeats, void* workspace, void* stream);

// Needs no workspace.
template <class T>
void launch_weighted_gram(const WeightedGramArgs<T>& args, void* stream);

// Needs no workspace; takes only orders n that the other function says fit on the current device.
template <class T>
bool ridge_primal_fits(int64_t n);
template <class T>
void launch_ridge_primal(const RidgePrimalArgs<T>& args, void* stream);


// Conjugate gradient, n <= the largest order; no workspace.
template <class T>
int64_t cg_largest_order();
template <class T>
void launch_cg(const CgArgs<T>& args, void* stream);
template <class T>
int64_t scaled_gram_cg_largest_order();
template <class T>
void launch_scaled_gram_cg(const ScaledGramCgArgs<T>& args, void* stream);

// One workspace for both; rows that need none have 0 bytes.
template <class T>
int64_t cg_step_workspace(int64_t systems, int64_t n);
template <class T>
void launch_cg_step(const CgStepArgs<T>& args, void* workspace, void* stream);
template <class T>
void launch_cg_direction(const CgDirectionArgs<T>& args, void* workspace, void* stream);

}  // namespace backmatch::cuda
