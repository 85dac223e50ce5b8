// The self-referential weight matrix (Irie et al. 2022, equations 5 to 8) over a whole unroll in one launch.
//
// One block per environment b and head h. x is a row vector; W has D rows and C = Y + 2D + 4 columns [y | q | k | beta]:
//
//     [y, q, k, beta] = x W        q = softmax(q)    k = softmax(k)    beta = sigmoid(beta)
//     d  = (q - k) W               what W says of q, less what it says of k
//     W += outer(k, beta d)        beta: one rate for each of the four groups of columns
//
// PyTorch owns all memory. Arrays are contiguous float32, in the shapes that stand beside them.

#include "common.cuh"

namespace {

struct Shape {
  int T, B, H, Y, C;
  int bptt_length;  // 0: gradients flow through the whole unroll
};

// Which of the groups [y | q | k | beta], 0 to 3, column c belongs to, and where group g begins (g = 4: where all end).
template <int D>
__device__ int group_of(int c, int Y) { return (c >= Y) + (c >= Y + D) + (c >= Y + 2 * D); }
template <int D>
__device__ int group_begin(int g, const Shape& s) { return g == 0 ? 0 : g == 4 ? s.C : s.Y + (g - 1) * D; }

// Thread c keeps column c of W in registers for all T steps. There are two barriers in a step, after the logits and after
// the exponentials; each thread then normalises the softmaxes for itself.
template <int D>
__global__ void __launch_bounds__(MAX_COLUMNS) srwm_forward_kernel(Shape s,
                                    const float* __restrict__ x,      // (T, B, H, D)
                                    const float* __restrict__ W0,     // (H, D, C)
                                    const float* __restrict__ state,  // (B, H, D, C)
                                    const bool* __restrict__ done,    // (T, B)
                                    float* __restrict__ y,            // (T, B, H, Y)
                                    float* __restrict__ new_state,    // (B, H, D, C)
                                    float* __restrict__ qkb,          // (T, B, H, 2D + 4)  [q | k | beta]  } for the backward
                                    float* __restrict__ d,            // (T, B, H, C)                        } pass, or null
                                    int* __restrict__ episode)        // (T, B)  step at which step t's episode began, or -1
{
  __shared__ __align__(16) float x_now[2][D];       // of step t, and of step t + 1 on its way
  __shared__ __align__(16) float logits[2 * D];     // of q and k
  __shared__ __align__(16) float exps[2 * D + 4];   // exp(logits - maximum), and beta

  const int c = threadIdx.x, b = blockIdx.x / s.H, h = blockIdx.x % s.H;
  const int group = group_of<D>(c, s.Y), offset = c - s.Y;  // offset: within [q | k | beta]
  const bool is_column = c < s.C;
  const float* W0_column = W0 + (size_t)h * D * s.C + c;
  const size_t column = (size_t)blockIdx.x * D * s.C + c;  // of (B, H, D, C), row 0

  float w[D];
#pragma unroll
  for (int i = 0; i < D; ++i) w[i] = is_column ? W0_column[i * s.C] + state[column + i * s.C] : 0.f;

  int start = -1;
  bool done_now = done[b];
  if (c < D) x_now[0][c] = x[(size_t)blockIdx.x * D + c];
  __syncthreads();

  for (int t = 0; t < s.T; ++t) {
    const size_t row = (size_t)t * gridDim.x + blockIdx.x;  // of (T, B, H, ...)
    if (done_now) {
      start = t;
#pragma unroll
      for (int i = 0; i < D; ++i) w[i] = is_column ? W0_column[i * s.C] : 0.f;
    }
    float x_next = 0.f;
    if (t + 1 < s.T) {
      done_now = done[(size_t)(t + 1) * s.B + b];
      if (c < D) x_next = x[(row + gridDim.x) * D + c];
    }

    float out = dot<D>(w, x_now[t & 1]);
    if (group == 0) y[row * s.Y + c] = out;
    if (group == 1 || group == 2) logits[offset] = out;
    __syncthreads();

    if (group == 1 || group == 2) out = expf(out - maximum<D>(logits + (group - 1) * D));
    if (group == 3) out = 1.f / (1.f + expf(-out));
    if (group > 0 && is_column) exps[offset] = out;
    if (c < D) x_now[(t + 1) & 1][c] = x_next;
    __syncthreads();

    const float q_scale = 1.f / sum<D>(exps), k_scale = 1.f / sum<D>(exps + D);
    float d_c = 0.f;
    if (D > 16) asm volatile("" ::: "memory");
#pragma unroll
    for (int i = 0; i < D; ++i) d_c += (exps[i] * q_scale - exps[D + i] * k_scale) * w[i];
    const float change = k_scale * exps[2 * D + group] * d_c;
    if (D > 16) asm volatile("" ::: "memory");
#pragma unroll
    for (int i = 0; i < D; ++i) w[i] += exps[D + i] * change;

    if (d != nullptr && is_column) {
      d[row * s.C + c] = d_c;
      if (group > 0) qkb[row * (2 * D + 4) + offset] = out * (group == 1 ? q_scale : group == 2 ? k_scale : 1.f);
      if (c == 0 && h == 0) episode[(size_t)t * s.B + b] = start;
    }
  }
#pragma unroll
  for (int i = 0; i < D; ++i)
    if (is_column) new_state[column + i * s.C] = w[i] - W0_column[i * s.C];
}

// What one thread reads of step t, loaded a step ahead of its use.
struct Step {
  float x, dy, qkb, d;
};

// The sum over columns of M[row, c] v[c], by the LANES threads of that row.
__device__ float row_dot(const float* M_row, const float* v, int lane, int C) {
  float total = 0.f;
#pragma unroll 8
  for (int c = lane; c < C; c += LANES) total += M_row[c] * v[c];
  return sum_over_lanes<LANES>(total);
}

// Walks the unroll backwards, with W as it stood before each step and G, the loss's gradient with respect to it, in shared
// memory. W is not stored at each step: its last value in an episode is replayed from the saved k, beta and d (rank-one
// updates, no reductions), and then each update is taken back. Threads work by turns as columns (thread c: all sums over
// rows) and as rows (LANES threads each: all sums over columns; the four sums for beta are rows D to D + 3).
template <int D>
__global__ void __launch_bounds__(MAX_COLUMNS) srwm_backward_kernel(Shape s,
                                     const float* __restrict__ x,        // (T, B, H, D)
                                     const float* __restrict__ W0,       // (H, D, C)
                                     const float* __restrict__ state,    // (B, H, D, C)
                                     const float* __restrict__ qkb,      // (T, B, H, 2D + 4)
                                     const float* __restrict__ d,        // (T, B, H, C)
                                     const int* __restrict__ episode,    // (T, B)
                                     const float* __restrict__ dy,       // (T, B, H, Y)
                                     const float* __restrict__ dnew,     // (B, H, D, C)     gradient of new_state
                                     float* __restrict__ dx,             // (T, B, H, D)
                                     float* __restrict__ dW,             // (B, H, D, C)     of W0, each environment's part
                                     float* __restrict__ dstate)         // (B, H, D, C)
{
  const int stride = row_stride(s.C, LANES);
  extern __shared__ __align__(16) float shared[];
  float* x_now = shared;               // D
  float* q = x_now + D;                // D
  float* k = q + D;                    // D
  float* beta = k + D;                 // 4
  float* dq = beta + 4;                // D
  float* dk = dq + D;                  // D
  float* dbeta = dk + D;               // 4
  float* change = dbeta + 4;           // C  beta d
  float* dd = change + stride;         // C
  float* d_dchange = dd + stride;      // C  d times the gradient of beta d
  float* dlogits = d_dchange + stride; // C  gradient of x W
  float* W = dlogits + stride;         // (D, stride)
  float* G = W + D * stride;           // (D, stride)

  const int c = threadIdx.x, b = blockIdx.x / s.H, h = blockIdx.x % s.H;
  const int group = group_of<D>(c, s.Y), offset = c - s.Y;
  const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const bool is_column = c < s.C;
  const size_t column = (size_t)blockIdx.x * D * s.C + c;
  const float* W0_column = W0 + (size_t)h * D * s.C + c;

  auto load = [&](int t) {
    const size_t at = (size_t)t * gridDim.x + blockIdx.x;
    Step step = {};
    if (c < D) step.x = x[at * D + c];
    if (c < s.Y) step.dy = dy[at * s.Y + c];
    if (c < 2 * D + 4) step.qkb = qkb[at * (2 * D + 4) + c];
    if (is_column) step.d = d[at * s.C + c];
    return step;
  };

  // Column c of W as it stood after step `last`.
  auto replay = [&](int last) {
    const int first = episode[(size_t)last * s.B + b];
    float w[D];
#pragma unroll
    for (int i = 0; i < D; ++i) w[i] = W0_column[i * s.C] + (first < 0 ? state[column + i * s.C] : 0.f);
#pragma unroll (D < 64 ? 4 : 1)
    for (int t = max(first, 0); t <= last; ++t) {
      const size_t at = (size_t)t * gridDim.x + blockIdx.x;
      const float* qkb_t = qkb + at * (2 * D + 4);
      const float change_c = qkb_t[2 * D + group] * d[at * s.C + c];
#pragma unroll
      for (int i = 0; i < D; ++i) w[i] += qkb_t[D + i] * change_c;
    }
#pragma unroll
    for (int i = 0; i < D; ++i) W[i * stride + c] = w[i];
  };

  if (is_column) {
    replay(s.T - 1);
#pragma unroll
    for (int i = 0; i < D; ++i) {
      // new_state = W - W0: its gradient reaches the recurrence through G, and W0 with the opposite sign.
      G[i * stride + c] = dnew[column + i * s.C];
      dW[column + i * s.C] = -dnew[column + i * s.C];
    }
  }

  Step step = load(s.T - 1);
  for (int t = s.T - 1; t >= 0; --t) {
    const size_t at = (size_t)t * gridDim.x + blockIdx.x;
    const int start = episode[(size_t)t * s.B + b];
    if (c < D) x_now[c] = step.x;
    if (c < 2 * D + 4) (c < 2 * D ? q[c] : beta[c - 2 * D]) = step.qkb;
    const float d_c = step.d, dy_c = step.dy;
    __syncthreads();

    if (t > 0) step = load(t - 1);
    float dd_c = 0.f;
    if (is_column) {
      const float change_c = beta[group] * d_c;
      float dchange = 0.f;  // k G
#pragma unroll (D < 16 ? D : 16)
      for (int i = 0; i < D; ++i) {
        W[i * stride + c] -= k[i] * change_c;
        dchange += k[i] * G[i * stride + c];
      }
      dd_c = beta[group] * dchange;
      change[c] = change_c;
      dd[c] = dd_c;
      d_dchange[c] = d_c * dchange;
    }
    __syncthreads();

    if (row < D) {  // D * LANES threads are whole warps
      const float dq_row = row_dot(W + row * stride, dd, lane, s.C);
      const float dk_row = row_dot(G + row * stride, change, lane, s.C) - dq_row;
      if (lane == 0) dq[row] = dq_row, dk[row] = dk_row;
    } else {
      const int g = min(row - D, 3);
      float total = 0.f;
      for (int j = group_begin<D>(g, s) + lane; j < group_begin<D>(g + 1, s); j += LANES) total += d_dchange[j];
      total = sum_over_lanes<LANES>(total);
      if (lane == 0 && row < D + 4) dbeta[g] = total;
    }
    __syncthreads();

    if (is_column) {
      float dlogit = dy_c;
      if (group == 1 || group == 2) {  // softmax: p (dp - sum(p dp))
        const float* p = group == 1 ? q : k;
        const float* dp = group == 1 ? dq : dk;
        const int j = offset - (group - 1) * D;
        dlogit = p[j] * (dp[j] - dot<D>(p, dp));
      }
      if (group == 3) {
        const int g = offset - 2 * D;
        dlogit = beta[g] * (1.f - beta[g]) * dbeta[g];
      }
      dlogits[c] = dlogit;
#pragma unroll (D < 16 ? D : 16)
      for (int i = 0; i < D; ++i) G[i * stride + c] += (q[i] - k[i]) * dd_c + x_now[i] * dlogit;
    }
    __syncthreads();

    if (row < D) {
      const float dx_row = row_dot(W + row * stride, dlogits, lane, s.C);
      if (lane == 0) dx[at * D + row] = dx_row;
    }
    const bool reset = start == t;
    if (is_column && (t == 0 || reset || (s.bptt_length > 0 && t % s.bptt_length == 0))) {
#pragma unroll 4
      for (int i = 0; i < D; ++i) {
        dW[column + i * s.C] += G[i * stride + c];
        if (t == 0) dstate[column + i * s.C] = reset ? 0.f : G[i * stride + c];
        G[i * stride + c] = 0.f;
      }
    }
    if (reset && t > 0) {
      __syncthreads();  // dx still read this episode's W
      if (is_column) replay(t - 1);
    }
  }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Launchers. They return CUDA's error code, 0 if there is none.

int srwm_forward(int T, int B, int H, int D, int Y, const float* x, const float* W0, const float* state, const bool* done,
                 float* y, float* new_state, float* qkb, float* d, int* episode, cudaStream_t stream) {
  const Shape shape = {T, B, H, Y, Y + 2 * D + 4, 0};
#define LAUNCH(D)                                                                                                     \
  srwm_forward_kernel<D><<<B * H, round_up(shape.C, 32), 0, stream>>>(shape, x, W0, state, done, y, new_state, qkb, d, \
                                                                      episode);                                       \
  return cudaGetLastError()
  FOR_D(D, LAUNCH)
#undef LAUNCH
}

// Bytes of shared memory that a block of the backward kernel needs.
int srwm_backward_shared_memory(int D, int C) {
  return sizeof(float) * (5 * D + 8 + (4 + 2 * D) * row_stride(C, LANES));
}

int srwm_backward(int T, int B, int H, int D, int Y, int bptt_length, const float* x, const float* W0, const float* state,
                  const float* qkb, const float* d, const int* episode, const float* dy, const float* dnew, float* dx,
                  float* dW, float* dstate, cudaStream_t stream) {
  const Shape shape = {T, B, H, Y, Y + 2 * D + 4, bptt_length};
  const int bytes = srwm_backward_shared_memory(D, shape.C);
  const int threads = round_up(max(shape.C, (D + 4) * LANES), 32);
#define LAUNCH(D)                                                                                                  \
  {                                                                                                                \
    const cudaError_t error =                                                                                      \
        cudaFuncSetAttribute(srwm_backward_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);         \
    if (error != cudaSuccess) return error;                                                                        \
    srwm_backward_kernel<D><<<B * H, threads, bytes, stream>>>(shape, x, W0, state, qkb, d, episode, dy, dnew, dx, \
                                                               dW, dstate);                                        \
    return cudaGetLastError();                                                                                     \
  }
  FOR_D(D, LAUNCH)
#undef LAUNCH
}
