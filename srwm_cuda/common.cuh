// What the kernels share: sums over short vectors and over neighbouring threads, copies to shared memory, and how
// matrices lie there. No header is included, neither CUDA's nor C++'s: NVRTC alone compiles all of it.

#pragma once

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

// Starts a copy of one float from global to shared memory, in the thread's open group of copies; before compute capability 8.0
// it is an ordinary one.
__device__ inline void copy_async(float* to, const float* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from) : "memory");
#else
  *to = *from;
#endif
}

// Closes the thread's group of copies, and opens the next.
__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all closed groups of the thread's copies but the last N.
template <int N>
__device__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

__device__ inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Floats in a row of a matrix in shared memory whose LANES threads read `width` neighbouring floats at once: an odd multiple
// of it, so that the rows that are read together lie in different banks.
__device__ inline int row_stride(int columns, int width) { return round_up(columns - width, 2 * width) + width; }
