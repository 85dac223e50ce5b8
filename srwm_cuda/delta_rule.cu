// The delta rule (Schlag, Irie, Schmidhuber 2021) over a whole unroll in one launch.
//
// One block per environment b and head h. q, k, v are row vectors, beta is a number, and F has D rows and V columns:
//
//     e   = v - k F                what F should say of k, less what it says
//     F  += outer(k, beta e)
//     out = q F                    the updated F
//
// PyTorch owns all memory. Arrays are contiguous float32, in the shapes that stand beside them.

#include "common.cuh"

struct Shape {
  int T, B, H, V;
  int bptt_length;  // 0: gradients flow through the whole unroll
};

// Thread c keeps column c of F in registers for all T steps. Columns know nothing of each other: the one barrier in a step
// is for q and k, which all of them read. They come through two buffers by turns, since a thread that is ahead writes those
// of step t + 1 while others read those of step t.
template <int D>
__global__ void __launch_bounds__(MAX_COLUMNS) delta_rule_forward_kernel(Shape s,
                                    const float* __restrict__ q,      // (T, B, H, D)
                                    const float* __restrict__ k,      // (T, B, H, D)
                                    const float* __restrict__ v,      // (T, B, H, V)
                                    const float* __restrict__ beta,   // (T, B, H)
                                    const float* __restrict__ state,  // (B, H, D, V)
                                    const bool* __restrict__ done,    // (T, B)
                                    float* __restrict__ out,          // (T, B, H, V)
                                    float* __restrict__ new_state,    // (B, H, D, V)
                                    float* __restrict__ e,            // (T, B, H, V)  } for the backward pass, or null
                                    int* __restrict__ episode)        // (T, B)  step at which step t's episode began, or -1
{
  __shared__ __align__(16) float buffers[2][2 * D];

  const int thread = threadIdx.x, b = blockIdx.x / s.H, h = blockIdx.x % s.H;
  const bool is_column = thread < s.V;
  const int c = min(thread, s.V - 1);  // threads beyond the last column repeat it, and write nothing
  const size_t column = (size_t)blockIdx.x * D * s.V + c;  // of (B, H, D, V), row 0

  struct Step {  // what one thread reads of a step, loaded a step ahead of its use
    float qk, v, beta;
    bool done;
  };
  auto load = [&](int t) {
    Step step = {};
    if (t == s.T) return step;
    const size_t at = (size_t)t * gridDim.x + blockIdx.x;  // of (T, B, H, ...)
    if (thread < 2 * D) step.qk = thread < D ? q[at * D + thread] : k[at * D + thread - D];
    step.v = v[at * s.V + c];
    step.beta = beta[at];
    step.done = done[(size_t)t * s.B + b];
    return step;
  };

  float f[D];
#pragma unroll
  for (int i = 0; i < D; ++i) f[i] = state[column + i * s.V];

  int start = -1;
  Step next = load(0);
  for (int t = 0; t < s.T; ++t) {
    const size_t at = (size_t)t * gridDim.x + blockIdx.x;
    const float *q_now = buffers[t & 1], *k_now = q_now + D;
    const Step now = next;
    if (thread < 2 * D) buffers[t & 1][thread] = now.qk;
    next = load(t + 1);
    __syncthreads();

    if (now.done) {
      start = t;
#pragma unroll
      for (int i = 0; i < D; ++i) f[i] = 0.f;
    }
    const float e_c = now.v - dot<D>(f, k_now);
    const float change = now.beta * e_c;
    if (D > 32) __syncwarp();  // so that k is read anew: there are not registers enough for F's column and k
#pragma unroll
    for (int i = 0; i < D; ++i) f[i] += k_now[i] * change;

    if (is_column) {
      out[at * s.V + c] = dot<D>(f, q_now);
      if (e != nullptr) e[at * s.V + c] = e_c;
      if (e != nullptr && c == 0 && h == 0) episode[(size_t)t * s.B + b] = start;
    }
  }
#pragma unroll
  for (int i = 0; i < D; ++i)
    if (is_column) new_state[column + i * s.V] = f[i];
}

// Four neighbouring floats of shared memory, read or written at once.
struct __align__(16) Four {
  float at[4];
};

// A thread takes four columns at a time of its row.
__device__ inline int padded(int V) { return row_stride(V, 4 * LANES); }

// Walks the unroll backwards, with F as each step left it and G, the loss's gradient with respect to F, in shared memory.
// F is not stored at each step: its last value in an episode is replayed from the saved k, beta and e (rank-one updates,
// no reductions), and then each update is taken back. With the gradient of out in G, step t is
//
//     dq = F dout    G += outer(q, dout)    du = k G    dbeta = du e    dv = de = beta du
//     F -= outer(k, u)    dk = G u - F de    G -= outer(k, de)                               where u = beta e
//
// Threads work by turns as columns (thread c: du, the sum over rows) and as rows (LANES threads each: dq and dk, the sums
// over columns, and all changes of F and G); the warp after the rows sums up dbeta. So there are two barriers in a step.
// What both read of step t comes through two buffers by turns, as in the forward kernel.
template <int D>
__global__ void __launch_bounds__(MAX_COLUMNS) delta_rule_backward_kernel(Shape s,
                                     const float* __restrict__ q,        // (T, B, H, D)
                                     const float* __restrict__ k,        // (T, B, H, D)
                                     const float* __restrict__ beta,     // (T, B, H)
                                     const float* __restrict__ state,    // (B, H, D, V)
                                     const float* __restrict__ e,        // (T, B, H, V)
                                     const int* __restrict__ episode,    // (T, B)
                                     const float* __restrict__ dout,     // (T, B, H, V)
                                     const float* __restrict__ dnew,     // (B, H, D, V)     gradient of new_state
                                     float* __restrict__ dq,             // (T, B, H, D)
                                     float* __restrict__ dk,             // (T, B, H, D)
                                     float* __restrict__ dv,             // (T, B, H, V)
                                     float* __restrict__ dbeta,          // (T, B, H)
                                     float* __restrict__ dstate)         // (B, H, D, V)
{
  const int stride = padded(s.V);
  extern __shared__ __align__(16) float shared[];
  float* row_buffers = shared;                     // (2, 2, D)       q, k
  float* column_buffers = row_buffers + 4 * D;     // (2, 2, stride)  u, dout
  float* de = column_buffers + 4 * stride;         // V
  float* due = de + stride;                        // V               du e
  float* F = due + stride;                         // (D, stride)
  float* G = F + D * stride;                       // (D, stride)
  float* end = G + D * stride;

  const int c = threadIdx.x, b = blockIdx.x / s.H;
  const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const bool is_column = c < s.V;
  const size_t column = (size_t)blockIdx.x * D * s.V + c;

  struct Step {
    float q, k, beta, e, dout;
    int start;
  };
  auto load = [&](int t) {
    Step step = {};
    if (t < 0) return step;
    const size_t at = (size_t)t * gridDim.x + blockIdx.x;
    if (c < D) step.q = q[at * D + c], step.k = k[at * D + c];
    if (is_column) step.e = e[at * s.V + c], step.dout = dout[at * s.V + c];
    step.beta = beta[at];
    step.start = episode[(size_t)t * s.B + b];
    return step;
  };

  // Column c of F as it stood after step `last`, of the episode that began at step `start`.
  auto replay = [&](int start, int last) {
    float f[D];
#pragma unroll
    for (int i = 0; i < D; ++i) f[i] = start < 0 ? state[column + i * s.V] : 0.f;
#pragma unroll (D < 32 ? 4 : D < 64 ? 2 : 1)
    for (int t = max(start, 0); t <= last; ++t) {
      const size_t at = (size_t)t * gridDim.x + blockIdx.x;
      const float change = beta[at] * e[at * s.V + c];
#pragma unroll
      for (int i = 0; i < D; ++i) f[i] += k[at * D + i] * change;
    }
    int apart = stride;
    asm volatile("" : "+r"(apart));  // or the compiler keeps all rows' addresses, computed before the loop over steps
#pragma unroll
    for (int i = 0; i < D; ++i) F[i * apart + c] = f[i];
  };

  for (float* p = shared + c; p < end; p += blockDim.x) *p = 0.f;  // what lies beyond column V stays 0
  __syncthreads();
  if (is_column) {
#pragma unroll
    for (int i = 0; i < D; ++i) G[i * stride + c] = dnew[column + i * s.V];
  }

  int later_start = s.T;  // of the episode that step t + 1 belongs to
  Step next = load(s.T - 1);
  for (int t = s.T - 1; t >= 0; --t) {
    const size_t at = (size_t)t * gridDim.x + blockIdx.x;
    float *q_now = row_buffers + (t & 1) * 2 * D, *k_now = q_now + D;
    float *u = column_buffers + (t & 1) * 2 * stride, *dout_now = u + stride;
    const Step now = next;
    if (c < D) q_now[c] = now.q, k_now[c] = now.k;
    if (is_column) u[c] = now.beta * now.e, dout_now[c] = now.dout;
    next = load(t - 1);
    __syncthreads();

    if (is_column) {
      if (later_start == t + 1) replay(now.start, t);
      float g[D];
#pragma unroll
      for (int i = 0; i < D; ++i) g[i] = G[i * stride + c] + q_now[i] * now.dout;
      const float du = dot<D>(g, k_now);
      const float de_c = now.beta * du;
      de[c] = de_c;
      due[c] = du * now.e;
      dv[at * s.V + c] = de_c;
    }
    __syncthreads();

    if (row < D) {  // D * LANES threads are whole warps
      const bool cut = now.start == t || (s.bptt_length > 0 && t > 0 && t % s.bptt_length == 0);
      const float q_row = q_now[row], k_row = k_now[row];
      float dq_row = 0.f, dk_row = 0.f;
      for (int j = 4 * lane; j < s.V; j += 4 * LANES) {
        Four &F_j = *(Four*)(F + row * stride + j), &G_j = *(Four*)(G + row * stride + j);
        const Four u_j = *(Four*)(u + j), dout_j = *(Four*)(dout_now + j), de_j = *(Four*)(de + j);
        Four f = F_j, g = G_j;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dq_row += f.at[i] * dout_j.at[i];
          g.at[i] += q_row * dout_j.at[i];
          f.at[i] -= k_row * u_j.at[i];
          dk_row += g.at[i] * u_j.at[i] - f.at[i] * de_j.at[i];
          g.at[i] = cut ? 0.f : g.at[i] - k_row * de_j.at[i];
        }
        F_j = f, G_j = g;
      }
      dq_row = sum_over_lanes<LANES>(dq_row);
      dk_row = sum_over_lanes<LANES>(dk_row);
      if (lane == 0) dq[at * D + row] = dq_row, dk[at * D + row] = dk_row;
    } else if (row < D + 32 / LANES) {
      float total = 0.f;
      for (int j = threadIdx.x % 32; j < s.V; j += 32) total += due[j];
      total = sum_over_lanes<32>(total);
      if (threadIdx.x % 32 == 0) dbeta[at] = total;
    }
    later_start = now.start;
  }
  __syncthreads();
  if (is_column) {
#pragma unroll 4
    for (int i = 0; i < D; ++i) dstate[column + i * s.V] = G[i * stride + c];
  }
}
