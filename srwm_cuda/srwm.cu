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

constexpr int AHEAD = 4;  // steps for which there is room in shared memory: the one at hand, and those on their way there
constexpr int ROWS_IN_REGISTERS = 16;  // of a thread of the backward kernel, at most: if it has more, W is in shared memory

struct Shape {
  int T, B, H, Y, C;
  int bptt_length;  // 0: gradients flow through the whole unroll
};

// A thread's piece of W, which it keeps for all T steps: ROWS rows of column c, from `row` on. The PARTS threads of a
// column belong to one warp; neighbouring threads hold neighbouring columns, of which a warp has LANES.
template <int D, int PARTS>
struct Piece {
  static constexpr int ROWS = D / PARTS, LANES = 32 / PARTS;
  int c, row;
  int group;   // of [y | q | k | beta], 0 to 3
  int offset;  // of the column within [q | k | beta]
  bool is_column, is_first;  // false for threads beyond the last column; first: of the column's threads

  __device__ explicit Piece(const Shape& s) {
    c = threadIdx.x / 32 * LANES + threadIdx.x % LANES;
    row = threadIdx.x % 32 / LANES * ROWS;
    group = (c >= s.Y) + (c >= s.Y + D) + (c >= s.Y + 2 * D);
    offset = c - s.Y;
    is_column = c < s.C;
    is_first = is_column && row == 0;
  }
  // The sum over a column, by its threads; all of them get it.
  __device__ static float sum_of_column(float part) {
#pragma unroll
    for (int mask = 16; mask >= LANES; mask /= 2) part += __shfl_xor_sync(0xffffffff, part, mask);
    return part;
  }
};

template <int D, int PARTS>
__global__ void __launch_bounds__(MAX_COLUMNS * PARTS) srwm_forward_kernel(Shape s,
                                    const float* __restrict__ x,      // (T, B, H, D)
                                    const float* __restrict__ W0,     // (H, D, C)
                                    const float* __restrict__ state,  // (B, H, D, C)
                                    const bool* __restrict__ done,    // (T, B)
                                    float* __restrict__ y,            // (T, B, H, Y)
                                    float* __restrict__ new_state,    // (B, H, D, C)
                                    float* __restrict__ qkb,          // (T, B, H, 2D + 4)  [q | k | beta]  } for backward,
                                    float* __restrict__ d,            // (T, B, H, C)                        } or null
                                    int* __restrict__ episode)        // (T, B)  step at which step t's episode began, or -1
{
  constexpr int ROWS = D / PARTS;
  __shared__ __align__(16) float xs[AHEAD][D];
  __shared__ __align__(16) float logits[2 * D];    // of q and k
  __shared__ __align__(16) float exps[2 * D + 4];  // exp(logits - maximum), and beta

  const Piece<D, PARTS> my(s);
  const int b = blockIdx.x / s.H, h = blockIdx.x % s.H;
  const size_t piece = ((size_t)blockIdx.x * D + my.row) * s.C + my.c;  // of (B, H, D, C)
  const float* my_W0 = W0 + ((size_t)h * D + my.row) * s.C + my.c;

  auto fetch = [&](int t) {
    if (t < s.T && threadIdx.x < D)
      copy_async(&xs[t % AHEAD][threadIdx.x], x + ((size_t)t * gridDim.x + blockIdx.x) * D + threadIdx.x);
    commit_copies();
  };
  for (int t = 0; t < AHEAD; ++t) fetch(t);

  float w[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) w[i] = my.is_column ? my_W0[i * s.C] + state[piece + i * s.C] : 0.f;

  int start = -1;
  unsigned dones = 0;  // of 32 steps, a bit each
  wait_for_copies<AHEAD - 1>();
  __syncthreads();

  for (int t = 0; t < s.T; ++t) {
    const size_t at = (size_t)t * gridDim.x + blockIdx.x;  // of (T, B, H, ...)
    if (t % 32 == 0) {
      const int ahead = t + threadIdx.x % 32;
      dones = __ballot_sync(0xffffffff, ahead < s.T && done[(size_t)ahead * s.B + b]);
    }
    if (dones >> t % 32 & 1) {
      start = t;
#pragma unroll
      for (int i = 0; i < ROWS; ++i) w[i] = my.is_column ? my_W0[i * s.C] : 0.f;
    }

    float out = my.sum_of_column(dot<ROWS>(w, xs[t % AHEAD] + my.row));
    if (my.group == 0 && my.is_first) y[at * s.Y + my.c] = out;
    if ((my.group == 1 || my.group == 2) && my.is_first) logits[my.offset] = out;
    __syncthreads();

    if (my.group == 1 || my.group == 2) out = expf(out - maximum<D>(logits + (my.group - 1) * D));
    if (my.group == 3) out = __fdividef(1.f, 1.f + expf(-out));
    if (my.group > 0 && my.is_first) exps[my.offset] = out;
    fetch(t + AHEAD);
    wait_for_copies<AHEAD - 1>();
    __syncthreads();

    const float* my_q = exps + my.row;
    const float* my_k = exps + D + my.row;
    const float q_scale = __fdividef(1.f, my.sum_of_column(sum<ROWS>(my_q)));
    const float k_scale = __fdividef(1.f, my.sum_of_column(sum<ROWS>(my_k)));
    const float d_c = q_scale * my.sum_of_column(dot<ROWS>(w, my_q)) - k_scale * my.sum_of_column(dot<ROWS>(w, my_k));
    const float change = k_scale * exps[2 * D + my.group] * d_c;
    if (ROWS > 16) __syncwarp();  // keeps the compiler from holding all of k in registers
#pragma unroll
    for (int i = 0; i < ROWS; ++i) w[i] += my_k[i] * change;

    if (d != nullptr && my.is_first) {
      d[at * s.C + my.c] = d_c;
      if (my.group > 0)
        qkb[at * (2 * D + 4) + my.offset] = out * (my.group == 1 ? q_scale : my.group == 2 ? k_scale : 1.f);
      if (my.c == 0 && h == 0) episode[(size_t)t * s.B + b] = start;
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
    if (my.is_column) new_state[piece + i * s.C] = w[i] - my_W0[i * s.C];
}

// Sums each of N values over LANES neighbouring threads, of which each gets N / LANES of the sums: v[j] of thread `lane`
// becomes the sum of the threads' v[lane * N / LANES + j]. In each round two partners share the sums out between them.
template <int N, int LANES>
__device__ __forceinline__ void transposed_sum(float* v) {
  constexpr int HALF = LANES / 2;
  const bool upper = threadIdx.x & HALF;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float kept = upper ? v[N / 2 + i] : v[i], given = upper ? v[i] : v[N / 2 + i];
    v[i] = kept + __shfl_xor_sync(0xffffffff, given, HALF);
  }
  if constexpr (HALF > 1) transposed_sum<N / 2, HALF>(v);
}

// The sum of one number of each warp's; beyond the last warp there are zeros, so that four can be read at once.
template <int D>
__device__ float sum_over_warps(const float* v, int warps) {
  float total = 0.f;
#pragma unroll 1
  for (int i = 0; i < warps; i += 4, v += 16 * D) total += (v[0] + v[4 * D]) + (v[8 * D] + v[12 * D]);
  return total;
}

// A thread's rows of W: in shared memory, or, where there are few enough, in registers.
template <bool IN_SHARED, int ROWS, int STRIDE>
struct Rows {
  float* first;
  __device__ float& operator[](int i) const { return first[i * STRIDE]; }
};
template <int ROWS, int STRIDE>
struct Rows<false, ROWS, STRIDE> {
  float rows[ROWS];
  __device__ float& operator[](int i) { return rows[i]; }
  __device__ float operator[](int i) const { return rows[i]; }
};

// How the backward kernel is compiled for some number of columns; the fewer threads at most, the more registers each. Which
// variant, and how much shared memory its blocks need, srwm_op.py says.
template <int D_, int PARTS_, int THREADS_>
struct Variant {
  static constexpr int D = D_, PARTS = PARTS_, THREADS = THREADS_, ROWS = D / PARTS;
  static constexpr bool W_IN_SHARED = ROWS > ROWS_IN_REGISTERS;
  // Short of registers: what a step reads more than once is read anew, and sums are taken group by group.
  static constexpr bool LEAN = ROWS * THREADS >= 16384;
};

// Walks the unroll backwards, with W as it stood before each step and G, the loss's gradient with respect to it, in
// registers (W in shared memory, where there are too few). W is not stored at each step: each update is taken back, from
// the last W on, which is W0 + new_state, or for an episode that ended within the unroll is replayed from the saved k, beta
// and d.
//
// With dd the gradient of d, and dchange = k G that of change = beta d, the sums over columns that a step needs are
//
//     dq = W dd      dk = G change - W dd      dbeta = d dchange, within a group      dx = W dlogits
//
// each warp over its own, in shuffles; the threads that need a sum add up the warps'. What a warp leaves in `sums`, for
// D = 16 with PARTS = 2, so that a thread has 8 rows and HALF is 4 of them:
//
//                      dq               dk              dbeta             dx
//     part 0, lower  | 0  1  2  3     | 0  1  2  3    | y  q  k  beta   | 0  1  2  3     |   rows of W, or
//             upper  | 4  5  6  7     | 4  5  6  7    | y  q  k  beta   | 4  5  6  7     |   groups of columns
//     part 1, lower  | 8  9 10 11     | 8  9 10 11    | unused          | 8  9 10 11     |
//             upper  | 12 13 14 15    | 12 13 14 15   | unused          | 12 13 14 15    |
//
// The lower and the upper half of a part's lanes share its rows out between them, each over the columns of both; but of
// dbeta each half has the sums over its own columns, and who needs one adds the two. The sum that softmax's derivative
// takes off, dlogit = q (dq - sum(q dq)), is the same with the columns of W less q W; so too for k. dx is needed by no other
// step: it is summed along with the next step's, so that there is one barrier in a step.
//
// One block on a multiprocessor, said where W is in shared memory: the compiler makes room for two if it can't for one.
template <typename V>
__global__ void __launch_bounds__(V::THREADS, V::W_IN_SHARED ? 1 : 0) srwm_backward_kernel(Shape s,
                                     const float* __restrict__ x,          // (T, B, H, D)
                                     const float* __restrict__ W0,         // (H, D, C)
                                     const float* __restrict__ state,      // (B, H, D, C)
                                     const float* __restrict__ new_state,  // (B, H, D, C)
                                     const float* __restrict__ qkb,        // (T, B, H, 2D + 4)
                                     const float* __restrict__ d,          // (T, B, H, C)
                                     const int* __restrict__ episode,      // (T, B)
                                     const float* __restrict__ dy,         // (T, B, H, Y)
                                     const float* __restrict__ dnew,       // (B, H, D, C)  gradient of new_state, or null: 0
                                     float* __restrict__ dx,               // (T, B, H, D)
                                     float* __restrict__ dW,               // (B, H, D, C)  of W0, each environment's part
                                     float* __restrict__ dstate)           // (B, H, D, C)
{
  constexpr int D = V::D, PARTS = V::PARTS, ROWS = V::ROWS, HALF = ROWS / 2, LANES = 32 / PARTS;
  constexpr bool LEAN = V::LEAN;
  constexpr int AT_ONCE = LEAN ? 1 : 4;  // groups of sums
  const int warps = round_up(blockDim.x / 32, 4), slot_size = round_up(D + 2 * s.C + 1, 4);
  extern __shared__ __align__(16) float shared[];
  float* sums = shared;                 // (2, warps, PARTS, 2, 4, HALF)  for [q | k | beta | x], of odd and of even steps
  float* slots = sums + 8 * warps * D;  // (AHEAD, slot_size)             a step's [x | q | k | beta | d | dy | episode]

  const Piece<D, PARTS> my(s);
  const int b = blockIdx.x / s.H, h = blockIdx.x % s.H;

  // The thread's rows, the upper lanes' with halves swapped: in the first round of the sums, each keeps the first half.
  int first = my.row + threadIdx.x % LANES / (LANES / 2) * HALF, second = 2 * my.row + HALF - first;
  auto row = [&](int i) { return i < HALF ? first + i : second + i - HALF; };
  auto piece = [&](int i) { return ((size_t)blockIdx.x * D + row(i)) * s.C + my.c; };  // of (B, H, D, C)
  auto W0_piece = [&](int i) { return W0[((size_t)h * D + row(i)) * s.C + my.c]; };

  // Which numbers the thread copies into a slot, the next step's first, and how far apart those of two steps are.
  constexpr int COPIES = PARTS == 1 ? 3 : PARTS == 2 ? 2 : 1;
  const float* source[COPIES];
  int stride[COPIES];
#pragma unroll
  for (int n = 0; n < COPIES; ++n) {
    auto from = [&](const float* array, int size, int i) {
      source[n] = array + ((size_t)(s.T - 1) * gridDim.x + blockIdx.x) * size + i;
      stride[n] = gridDim.x * size;
    };
    const int i = threadIdx.x + n * blockDim.x;
    if (i < D) from(x, D, i);
    else if (i < 3 * D + 4) from(qkb, 2 * D + 4, i - D);
    else if (i < 3 * D + 4 + s.C) from(d, s.C, i - 3 * D - 4);
    else if (i < D + 2 * s.C) from(dy, s.Y, i - 3 * D - 4 - s.C);
    else source[n] = reinterpret_cast<const float*>(episode + (size_t)(s.T - 1) * s.B + b), stride[n] = s.B;
  }
  auto slot_of = [&](int t) { return slots + t % unsigned(AHEAD) * slot_size; };
  auto fetch = [&](int t) {
#pragma unroll
    for (int n = 0; n < COPIES; ++n) {
      const int i = threadIdx.x + n * blockDim.x;
      if (t >= 0 && i <= D + 2 * s.C) copy_async(slot_of(t) + i, source[n]);
      source[n] -= stride[n];
    }
    commit_copies();
  };
  for (int i = 1; i < AHEAD; ++i) fetch(s.T - i);

  float g[ROWS];
  Rows<V::W_IN_SHARED, ROWS, V::THREADS> w;
  if constexpr (V::W_IN_SHARED) w.first = slots + AHEAD * slot_size + threadIdx.x;
  auto replay = [&](int last) {  // W as it stood after step `last`
    const int begin = episode[(size_t)last * s.B + b];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) w[i] = W0_piece(i) + (begin < 0 ? state[piece(i)] : 0.f);
#pragma unroll (ROWS > 16 ? 1 : 4)
    for (int t = max(begin, 0); t <= last; ++t) {
      const size_t at = (size_t)t * gridDim.x + blockIdx.x;
      const float* qkb_t = qkb + at * (2 * D + 4);
      const float change = qkb_t[2 * D + my.group] * d[at * s.C + my.c];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) w[i] += qkb_t[D + row(i)] * change;
    }
  };

#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    w[i] = 0.f, g[i] = 0.f;
    if (my.is_column) {
      // new_state = W - W0: its gradient reaches the recurrence through G, and W0 with the opposite sign.
      w[i] = W0_piece(i) + new_state[piece(i)];
      if (dnew != nullptr) g[i] = dnew[piece(i)];
      dW[piece(i)] = -g[i];
    }
  }
  auto place = [&](int group, int row) { return (row / HALF * 4 + group) * HALF + row % HALF; };  // in a warp's sums
  const int dlogit_at = place(my.group - 1, my.offset - (my.group - 1) * D), dx_at = place(3, my.c);
  for (int i = threadIdx.x; i < 8 * warps * D; i += blockDim.x) sums[i] = 0.f;
  float dx_part[ROWS] = {};
  float v[AT_ONCE * HALF];  // what is to be summed over the warp's columns, of AT_ONCE groups
  auto part = [&](int group) { return v + group % AT_ONCE * HALF; };
  auto sum_up = [&](int t, int group) {  // v, which begins with that group
    constexpr int N = AT_ONCE * D / 32;
    const int i = threadIdx.x / (LANES / 2) * 4 * HALF + threadIdx.x % (LANES / 2) * N + group * HALF;
    float* to = sums + (t & 1) * warps * 4 * D + i;
    transposed_sum<AT_ONCE * HALF, LANES / 2>(v);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = v[i];
  };
  wait_for_copies<AHEAD - 2>();
  __syncthreads();

  for (int t = s.T - 1;; --t) {  // down to -1, for dx of step 0
    const float* slot = slot_of(t);
    const float beta = slot[3 * D + my.group], d_c = my.is_column ? slot[3 * D + 4 + my.c] : 0.f;
    const float change = beta * d_c;
    float q[ROWS], k[ROWS];
    auto load = [&](float* to, int at) {
#pragma unroll
      for (int i = 0; i < ROWS; i += 4) load4(to + i, slot + at + row(i));
    };
    load(q, D), load(k, 2 * D);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) w[i] -= k[i] * change;
    const float dchange = my.sum_of_column(dot<ROWS>(g, k)), qW = my.sum_of_column(dot<ROWS>(w, q));
    auto both_halves = [](float kept, float given) { return kept + __shfl_xor_sync(0xffffffff, given, LANES / 2); };
    if (LEAN) __syncwarp();  // here and below: so that the compiler reads anew
    const float dd = beta * dchange, dq_mean = qW * dd, dk_mean = (2.f * d_c - qW) * dd, d_dchange = d_c * dchange;

#pragma unroll
    for (int i = 0, j = HALF; i < HALF; ++i, ++j) part(0)[i] = both_halves(w[i] * dd - dq_mean, w[j] * dd - dq_mean);
    if (LEAN) sum_up(t, 0);
#pragma unroll
    for (int i = 0, j = HALF; i < HALF; ++i, ++j)
      part(1)[i] = both_halves(g[i] * change - (w[i] * dd + dk_mean), g[j] * change - (w[j] * dd + dk_mean));
    if (LEAN) sum_up(t, 1);
#pragma unroll
    for (int i = 0; i < HALF; ++i) part(2)[i] = i < 4 && i == my.group ? d_dchange : 0.f;
    if (LEAN) sum_up(t, 2);
    if (LEAN) {
      __syncwarp();
      load(q, D), load(k, 2 * D);
    } else {
#pragma unroll
      for (int i = 0, j = HALF; i < HALF; ++i, ++j) part(3)[i] = both_halves(dx_part[i], dx_part[j]);
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) g[i] += (q[i] - k[i]) * dd;
    if (!LEAN) sum_up(t, 0);
    const float* sums_t = sums + (t & 1) * warps * 4 * D;
    wait_for_copies<AHEAD - 3>();
    __syncthreads();

    if (t + 1 < s.T && my.c < D && my.row == 0)
      dx[((size_t)(t + 1) * gridDim.x + blockIdx.x) * D + my.c] = sum_over_warps<D>(sums_t + dx_at, warps);
    if (t < 0) break;

    float x_now[ROWS];
    load(x_now, 0);
    float dlogit = 0.f;
    if (my.group == 0) {
      dlogit = slot[3 * D + 4 + s.C + my.c];
    } else if (my.is_column) {
      const float p = slot[D + my.offset];
      dlogit = sum_over_warps<D>(sums_t + dlogit_at, warps);
      if (my.group < 3) dlogit *= p;
      else dlogit = (dlogit + sum_over_warps<D>(sums_t + dlogit_at + 4 * HALF, warps)) * p * (1.f - p);
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      g[i] += x_now[i] * dlogit;
      if (!LEAN) dx_part[i] = w[i] * dlogit;
    }
    if (LEAN) {  // the next step's sums are free: all have read those of the step before
      __syncwarp();
#pragma unroll
      for (int i = 0, j = HALF; i < HALF; ++i, ++j) part(3)[i] = both_halves(w[i] * dlogit, w[j] * dlogit);
      sum_up(t - 1, 3);
    }

    const bool reset = __float_as_int(slot[D + 2 * s.C]) == t;
    if (my.is_column && (t == 0 || reset || (s.bptt_length > 0 && t % s.bptt_length == 0))) {
      if (LEAN) asm volatile("" : "+r"(first), "+r"(second));  // or all rows' addresses are kept, computed before the loop
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        dW[piece(i)] += g[i];
        if (t == 0) dstate[piece(i)] = reset ? 0.f : g[i];
        g[i] = 0.f;
      }
      if (reset && t > 0) replay(t - 1);
    }
    fetch(t + 1 - AHEAD);
  }
}
