// What the kernels share: sums over short vectors and over neighbouring threads, copies to shared memory, and how
// matrices lie there.

#pragma once
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

constexpr int MAX_COLUMNS = 512;  // of a matrix: a thread each, of at most 128 registers
constexpr int LANES = 4;          // threads that sum over the columns of one row together

// Sums run in four interleaved parts, which shortens the chain of dependent additions. Loops have compile-time bounds and
// are unrolled, so that a vector `a` held in registers stays there; vectors in shared memory are 16-byte aligned.
template <int N, typename Vector>
__device__ float dot(const Vector& a, const float* b) {
  float part[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < N; ++i) part[i % 4] += a[i] * b[i];
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// Four numbers from shared memory at once, 16-byte aligned.
__device__ inline void load4(float* to, const float* from) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

template <int N>
__device__ float sum(const float* v) {
  float part[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < N; ++i) part[i % 4] += v[i];
  return (part[0] + part[1]) + (part[2] + part[3]);
}

template <int N>
__device__ float maximum(const float* v) {
  float part[4] = {v[0], v[1], v[2], v[3]};
#pragma unroll
  for (int i = 4; i < N; ++i) part[i % 4] = fmaxf(part[i % 4], v[i]);
  return fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3]));
}

// Sum over LANES neighbouring threads (a power of two); all of them get it.
template <int LANES>
__device__ float sum_over_lanes(float value) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffff, value, mask);
  return value;
}

// Starts a copy of one number from global to shared memory, which __pipeline_wait_prior waits for.
template <typename Number>
__device__ void copy_async(Number* to, const Number* from) { __pipeline_memcpy_async(to, from, sizeof(Number)); }

__host__ __device__ inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Floats in a row of a matrix in shared memory whose LANES threads read `width` neighbouring floats at once: an odd multiple
// of it, so that the rows that are read together lie in different banks.
__host__ __device__ inline int row_stride(int columns, int width) { return round_up(columns - width, 2 * width) + width; }

// LAUNCH, which returns, for a head size that is known only now.
#define FOR_D(D_RUNTIME, LAUNCH)           \
  switch (D_RUNTIME) {                     \
    case 8: LAUNCH(8);                     \
    case 16: LAUNCH(16);                   \
    case 32: LAUNCH(32);                   \
    case 64: LAUNCH(64);                   \
    default: return cudaErrorInvalidValue; \
  }
