// IMPALA's residual CNN (Espeholt et al. 2018, figure 3) on frames of 64 x 64 pixels, forward and backward. Three sections of
// OUT = 16, 32, 32 channels each halve the image, to W = 32, 16, 8 pixels a side:
//
//     x0 = maxpool(conv(input))                         3 x 3, stride 2, padding 1
//     x1 = x0 + conv(h1),  h1 = relu(conv(relu(x0)))
//     x2 = x1 + conv(h2),  h2 = relu(conv(relu(x1)))    the next section's input
//
// All convolutions are 3 x 3 with padding 1. Operands are bfloat16, sums float32. Images lie in memory pixel by pixel, the
// channels of a pixel together. The CNN's 15 convolutions are its layers 0 to 14; all their float32 parameters are one array,
// a layer's weight (OUT, IN, 3, 3) before its bias (OUT).
//
// A product of tensor cores, 16 x 16 times 16 x 8, has as its rows a strip of 16 neighbouring pixels. A warp slides down such a
// strip: what it loads of a row serves the three rows of the output that the row is part of. What is computed of a frame does
// not depend on the others, and nothing is added in an order of chance.

#include "common.cuh"

namespace {

typedef unsigned short bf16;  // its bits; two of them, the first in the lower half, are an unsigned

constexpr int LAYERS = 15, WARPS = 8;

__host__ __device__ constexpr int inputs_of(int layer) { return layer == 0 ? 3 : layer < 6 ? 16 : 32; }
__host__ __device__ constexpr int outputs_of(int layer) { return layer < 5 ? 16 : 32; }

// Where a layer's parameters begin.
__host__ __device__ constexpr int parameters_before(int layer) {
  int sum = 0;
  for (int i = 0; i < layer; ++i) sum += outputs_of(i) * (9 * inputs_of(i) + 1);
  return sum;
}

// Where a layer's weights begin as `pack` writes them, in numbers of four unsigneds.
__host__ __device__ constexpr int fragments_before(int layer) {
  int sum = 0;
  for (int i = 0; i < layer; ++i) sum += i == 0 ? 3 * 32 : 9 * 32 * inputs_of(i) / 16 * outputs_of(i) / 16;
  return sum;
}

__device__ inline float low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ inline float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000); }

__device__ inline unsigned pair_of(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ inline unsigned maximum(unsigned a, unsigned b) {
  unsigned result;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

__device__ inline unsigned relu(unsigned pair) { return maximum(pair, 0u); }

__device__ inline unsigned sum_of(unsigned a, unsigned b) {
  unsigned result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(0x3f803f80), "r"(b));  // a * 1 + b
  return result;
}

// All bits of each half in which two pairs are equal.
__device__ inline unsigned equal(unsigned a, unsigned b) {
#if __CUDA_ARCH__ >= 900
  unsigned mask;
  asm("set.eq.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
  return mask;
#else
  return ((a ^ b) & 0xffff ? 0 : 0xffff) | ((a ^ b) >> 16 ? 0 : 0xffff0000);
#endif
}

// All bits of each half that is greater than 0.
__device__ inline unsigned positive(unsigned a) {
#if __CUDA_ARCH__ >= 900
  unsigned mask;
  asm("set.gt.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(0));
  return mask;
#else
  return (low(a) > 0.f ? 0xffff : 0) | (high(a) > 0.f ? 0xffff0000 : 0);
#endif
}

// Four 8 x 8 matrices from shared memory, of which thread i gives the address of row i % 8 of number i / 8.
template <bool TRANSPOSED>
__device__ inline void load_matrices(unsigned* to, const bf16* row) {
  const unsigned address = __cvta_generic_to_shared(row);
  if (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}

// sum += a b, 16 x 16 times 16 x 8. Of the sum, a thread holds columns 2t and 2t + 1 of row g, then of row g + 8, where
// g = lane / 4 and t = lane % 4.
__device__ inline void multiply(float* sum, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Starts a copy of 16 bytes from global to shared memory; of zeros, if not `valid`.
__device__ inline void copy16_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__device__ inline void clear(void* memory, int bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) static_cast<uint4*>(memory)[i] = make_uint4(0, 0, 0, 0);
}

// Where a pixel's channel lies in a row of images of C channels. Groups of eight change places, so that those of eight
// neighbours are in different banks.
template <int C>
__device__ inline int in_row(int x, int channel) {
  constexpr int GROUPS = C / 8;
  return (x * GROUPS + (channel / 8 ^ x / (8 / GROUPS) % GROUPS)) * 8 + channel % 8;
}

// FRAMES images of H rows of W pixels and C channels in shared memory, each with a border of one pixel of zeros.
template <int W_, int C_, int FRAMES_, int H_ = W_>
struct Images {
  static constexpr int W = W_, C = C_, FRAMES = FRAMES_, H = H_;
  static constexpr int ROW = (W + 2) * C, IMAGE = (H + 2) * ROW, SIZE = FRAMES * IMAGE;

  static __device__ int at(int frame, int y, int x, int channel) {
    return frame * IMAGE + (y + 1) * ROW + in_row<C>(x + 1, channel);
  }

  // Starts copying whole images, those of `valid` frames, and zeros for the others. THREADS have so many rows at a time that a
  // thread's pixel moves by whole rows.
  template <int THREADS>
  static __device__ void load(bf16* images, const bf16* from, int valid) {
    constexpr int CHUNKS = W * C / 8, ROWS = THREADS / CHUNKS;  // of eight channels, in a row; rows at a time
    const int row = threadIdx.x / CHUNKS, x = threadIdx.x % CHUNKS / (C / 8), group = threadIdx.x % (C / 8) * 8;
    bf16* to = images + at(row / H, row % H, x, group);
#pragma unroll
    for (int r = 0; r < FRAMES * H; r += ROWS) {
      const bool copied = FRAMES == 1 || r / H + row / H < valid;
      copy16_async(to + r / H * IMAGE + r % H * ROW, from + (copied ? (r * CHUNKS + threadIdx.x) * 8 : 0), copied);
    }
  }
};

// The strips that warps slide down: 16 pixels of a row, or 8 of each of two frames where a row has no more.
template <int W, int FRAMES>
struct Strips {
  static constexpr int NUMBER = FRAMES * W / 16, IN_ROW = W < 16 ? 1 : W / 16;
  static __device__ int frame(int strip, int i) { return W < 16 ? 2 * strip + i / 8 : strip / IN_ROW; }
  static __device__ int x(int strip, int i) { return W < 16 ? i % 8 : strip % IN_ROW * 16 + i; }
};

// A layer's weights for a warp that computes 16 channels of its output.
template <int C>
struct Fragments {
  uint4 of[9 * C / 16];  // by row and column of the kernel, and 16 channels of the input

  __device__ void load(const uint4* fragments, int part) {
#pragma unroll
    for (int i = 0; i < 9 * C / 16; ++i) of[i] = fragments[(part * (9 * C / 16) + i) * 32 + threadIdx.x % 32];
  }
};

// Slides down ROWS rows of a convolution's output from row y on, 16 of its channels. Its input is `in`, an image of In; the
// lane's pixel of the strip, number lane % 16, is in column x. A thread gets of pixel g of the strip the channels 4t to 4t + 3
// of the 16, and the same of pixel g + 8: store(row, four, four).
template <typename In, int ROWS, bool RELU, typename Store>
__device__ void slide(const bf16* in, int y, int x, const Fragments<In::C>& weights, float4 bias, Store store) {
  constexpr int PARTS = In::C / 16;
  asm volatile("" : "+r"(x));  // or the compiler keeps all addresses, computed before the loop over frames, in registers
  float sums[3][8];
#pragma unroll
  for (int r = 0; r < ROWS + 2; ++r) {
    float* next = sums[r % 3];
    next[0] = next[2] = bias.x, next[1] = next[3] = bias.y, next[4] = next[6] = bias.z, next[5] = next[7] = bias.w;
#pragma unroll
    for (int i = 0; i < 3 * PARTS; ++i) {
      const int column = i / PARTS, part = i % PARTS;
      unsigned a[4];
      load_matrices<false>(a, in + In::at(0, y + r - 1, x + column - 1, part * 16 + threadIdx.x % 32 / 16 * 8));
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = RELU ? relu(a[j]) : a[j];
#pragma unroll
      for (int row = 0; row < 3; ++row) {
        if (r - row < 0 || r - row >= ROWS) continue;
        const uint4 b = weights.of[(row * 3 + column) * PARTS + part];
        multiply(sums[(r - row) % 3], a[0], a[1], a[2], a[3], b.x, b.y);
        multiply(sums[(r - row) % 3] + 4, a[0], a[1], a[2], a[3], b.z, b.w);
      }
    }
    if (r >= 2) {
      const float* s = sums[(r - 2) % 3];
      store(r - 2, make_float4(s[0], s[1], s[4], s[5]), make_float4(s[2], s[3], s[6], s[7]));
    }
  }
}

__device__ inline uint2 packed(float4 v) { return make_uint2(pair_of(v.x, v.y), pair_of(v.z, v.w)); }

// A convolution of whole images by THREADS: store(frame, y, x, channel, four) gets all results by fours.
template <typename In, int OUT, int THREADS, bool RELU, typename Store>
__device__ void convolve(int warp, const bf16* in, const Fragments<In::C>& weights, float4 bias, Store store) {
  typedef Strips<In::W, In::FRAMES> S;
  constexpr int PARTS = OUT / 16, ROWS = S::NUMBER * PARTS * In::H / (THREADS / 32);
  const int part = warp % PARTS, strip = warp / PARTS % S::NUMBER, y = warp / (PARTS * S::NUMBER) * ROWS;
  const int lane = threadIdx.x % 32, g = lane / 4, channel = part * 16 + lane % 4 * 4;
  slide<In, ROWS, RELU>(in + S::frame(strip, lane % 16) * In::IMAGE, y, S::x(strip, lane % 16), weights, bias,
                        [&](int row, float4 first, float4 second) {
    store(S::frame(strip, g), y + row, S::x(strip, g), channel, first);
    store(S::frame(strip, g + 8), y + row, S::x(strip, g + 8), channel, second);
  });
}

// Writes all layers' weights as slide() wants them: for the forward pass, and behind them for the backward pass, which
// convolves with the kernels turned round and inputs and outputs exchanged. A thread writes four unsigneds.
__global__ void pack(const float* __restrict__ parameters, uint4* __restrict__ fragments) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= 2 * fragments_before(LAYERS)) return;
  const bool backward = thread >= fragments_before(LAYERS);
  int i = thread % fragments_before(LAYERS), layer = 0, first = 0;
  const float* weight = parameters;
#pragma unroll
  for (int l = 1; l < LAYERS; ++l)
    if (i >= fragments_before(l)) layer = l, first = fragments_before(l), weight = parameters + parameters_before(l);
  if (layer == 0 && backward) return;
  i -= first;
  const int in = inputs_of(layer), out = outputs_of(layer);
  const int lane = i % 32, parts = (backward ? out : in) / 16;
  // The product's 16 rows are (channel of its input), its columns (channel of its output): the weight that joins the two.
  auto at = [&](int row, int column) {
    if (layer == 0) {  // a kernel's row is one product: four pixels of four channels, of which there are three each
      const int y = i / 32, x = row / 4, channel = row % 4;
      return x < 3 && channel < 3 ? weight[(column * 3 + channel) * 9 + 3 * y + x] : 0.f;
    }
    const int step = i / 32, tap = step / parts % 9;
    const int from = step % parts * 16 + row, to = step / parts / 9 * 16 + column;
    return backward ? weight[(from * in + to) * 9 + 8 - tap] : weight[(to * in + from) * 9 + tap];
  };
  unsigned words[4];
  for (int j = 0; j < 4; ++j) {  // columns in an order in which a thread gets four neighbouring channels from two products
    const int row = j % 2 * 8 + lane % 4 * 2, column = lane / 8 * 4 + j / 2 * 2 + lane / 4 % 2;
    words[j] = pair_of(at(row, column), at(row + 1, column));
  }
  fragments[thread] = make_uint4(words[0], words[1], words[2], words[3]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// Sizes of a section: of its input, SIZE x SIZE x IN, and of the rest, W x W x OUT.
template <int SECTION>
struct Section {
  static constexpr int LAYER = 5 * SECTION, SIZE = 64 >> SECTION, W = SIZE / 2;
  static constexpr int IN = SECTION == 0 ? 4 : inputs_of(LAYER), OUT = outputs_of(LAYER);
  static constexpr int AT_ONCE = SECTION == 2 ? 2 : 1;  // frames whose first convolution is computed together
  static constexpr int BAND = SECTION == 2 ? 16 : 8;    // rows of it that are computed before they are pooled
};

// Frames in shared memory: rows of 68 pixels of four channels, of which the last is 0, with a border of zeros.
constexpr int FRAME_PITCH = 68;

// Copies `rows` rows of a frame, of which `first` may be -1, to rows of FRAME_PITCH pixels; store(row, pixel, channels).
template <typename Store>
__device__ void load_frame(const unsigned char* frame, int first, int rows, Store store) {
  const unsigned* words = reinterpret_cast<const unsigned*>(frame);  // four pixels are three
  for (int i = threadIdx.x; i < rows * 16; i += blockDim.x) {
    const int row = i / 16, y = first + row;
    const bool inside = y >= 0 && y < 64;
    const unsigned* w = words + y * 48 + i % 16 * 3;
    const unsigned a = inside ? w[0] : 0, b = inside ? w[1] : 0, c = inside ? w[2] : 0;
    const unsigned pixels[4] = {a, __funnelshift_r(a, b, 24), __funnelshift_r(b, c, 16), c >> 8};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const unsigned p = pixels[j];
      store(row, 1 + i % 16 * 4 + j, make_uint2(pair_of(p & 255, p >> 8 & 255), pair_of(p >> 16 & 255, 0.f)));
    }
  }
}

// The first section's convolution, as slide(): a kernel's row, three pixels of three channels, is one product. `frame` is where
// pixel g of the strip has its neighbour above and to the left.
template <int ROWS, typename Store>
__device__ void slide_frame(const bf16* frame, const uint4 (&weights)[3], Store store) {
  float sums[3][8];
#pragma unroll
  for (int r = 0; r < ROWS + 2; ++r) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[r % 3][i] = 0.f;
    unsigned a[4];  // pixels g and g + 8; channels 2t and 2t + 1 of 16, and 8 further: those of two pixels further
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = *reinterpret_cast<const unsigned*>(frame + (r * FRAME_PITCH + i % 2 * 8 + i / 2 * 2) * 4 + threadIdx.x % 4 * 2);
#pragma unroll
    for (int row = 0; row < 3; ++row) {
      if (r - row < 0 || r - row >= ROWS) continue;
      multiply(sums[(r - row) % 3], a[0], a[1], a[2], a[3], weights[row].x, weights[row].y);
      multiply(sums[(r - row) % 3] + 4, a[0], a[1], a[2], a[3], weights[row].z, weights[row].w);
    }
    if (r >= 2) {
      const float* s = sums[(r - 2) % 3];
      store(r - 2, make_float4(s[0], s[1], s[4], s[5]), make_float4(s[2], s[3], s[6], s[7]));
    }
  }
}

// The maxima of windows of 3 x 3 with stride 2, of a band of rows of SIZE pixels and OUT channels, eight channels to a thread;
// two numbers go as one. `above` is the row above the band, null if there is none. store(y, x, group, maxima, their places).
template <int SIZE, int OUT, typename Store>
__device__ void pool(const bf16* band, const bf16* above, int i, Store store) {
  const int group = i % (OUT / 8) * 8, x = i / (OUT / 8) % (SIZE / 2), y = i / (OUT / 8) / (SIZE / 2);
  unsigned v[9][4], most[4], which[4] = {};
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) {
    const bf16* row = tap < 3 && y == 0 ? above : band + (2 * y - 1 + tap / 3) * SIZE * OUT;
    const bool inside = (tap % 3 > 0 || x > 0) && (tap > 2 || row != nullptr);  // the border on the other side is not reached
    uint4 four = make_uint4(0xff80ff80, 0xff80ff80, 0xff80ff80, 0xff80ff80);  // -infinity
    if (inside) four = *reinterpret_cast<const uint4*>(row + in_row<OUT>(2 * x - 1 + tap % 3, group));
    v[tap][0] = four.x, v[tap][1] = four.y, v[tap][2] = four.z, v[tap][3] = four.w;
#pragma unroll
    for (int j = 0; j < 4; ++j) most[j] = tap == 0 ? v[tap][j] : maximum(most[j], v[tap][j]);
  }
#pragma unroll
  for (int tap = 8; tap >= 0; --tap)  // of equal ones the first, as PyTorch has it
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const unsigned mask = equal(v[tap][j], most[j]);
      which[j] = (which[j] & ~mask) | (0x00010001 * tap & mask);
    }
  store(y, x, group, make_uint4(most[0], most[1], most[2], most[3]),
        make_uint2(__byte_perm(which[0], which[1], 0x6420), __byte_perm(which[2], which[3], 0x6420)));
}

// A section, FRAMES frames to a block of THREADS.
template <int SECTION, int FRAMES, int THREADS>
__global__ void __launch_bounds__(THREADS, 512 / THREADS) section_forward(int N,
                                    const void* __restrict__ input,         // (N, SIZE, SIZE, IN); uint8 in section 0
                                    const float* __restrict__ parameters,   // of all layers
                                    const uint4* __restrict__ fragments,    // of all layers, from pack()
                                    bf16* __restrict__ output,              // (N, W, W, OUT)
                                    bf16* __restrict__ saved,               // (4, N, W, W, OUT)  x0, h1, x1, h2, for the backward pass, or null
                                    unsigned char* __restrict__ argmax)     // (N, W, W, OUT)  places of maxima, 0 to 8, for the same, or null
{
  typedef Section<SECTION> S;
  constexpr int SIZE = S::SIZE, W = S::W, IN = S::IN, OUT = S::OUT, BAND = S::BAND, AT_ONCE = S::AT_ONCE;
  constexpr int CONV_ROW = SIZE * OUT;
  typedef Images<W, OUT, FRAMES> Inner;
  typedef Images<SIZE, IN < 16 ? 16 : IN, AT_ONCE> Outer;
  constexpr int INPUT = SECTION == 0 ? 66 * FRAME_PITCH * 4 : Outer::SIZE;
  extern __shared__ __align__(16) bf16 shared[];
  bf16* x = shared;            // Inner
  bf16* h = x + Inner::SIZE;   // Inner, but before that:
  bf16* in = h;                // AT_ONCE inputs with their borders
  bf16* conv = in + INPUT;     // (AT_ONCE, BAND + 2, SIZE, OUT)  a band of the first convolution's output. The next band needs
                               // its last row too: row BAND + b % 2 is what band b has above it

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  const int first = blockIdx.x * FRAMES;
  const int valid = min(FRAMES, N - first);
  const size_t base = (size_t)first * W * W * OUT;

  clear(x, (Inner::SIZE + INPUT) * sizeof(bf16));
  {
    // Warps share the first convolution out by 16 channels, then strips, then rows.
    typedef Strips<SIZE, AT_ONCE> T;
    constexpr int PARTS = OUT / 16, ROWS = T::NUMBER * PARTS * BAND / (THREADS / 32);
    const int part = warp % PARTS, strip = warp / PARTS % T::NUMBER, y0 = warp / (PARTS * T::NUMBER) * ROWS;
    const int channel = part * 16 + lane % 4 * 4;
    const float* b = parameters + parameters_before(S::LAYER + 1) - OUT + channel;
    const float4 bias = make_float4(b[0], b[1], b[2], b[3]);
    const uint4* layer = fragments + fragments_before(S::LAYER);
    uint4 frame_weights[3];
    Fragments<IN < 16 ? 16 : IN> weights;
    if constexpr (SECTION == 0) {
      for (int i = 0; i < 3; ++i) frame_weights[i] = layer[i * 32 + lane];
    } else {
      weights.load(layer, part);
    }

    for (int frame = 0; frame < FRAMES; frame += AT_ONCE) {
      __syncthreads();
      if constexpr (SECTION == 0) {
        const unsigned char* frame = static_cast<const unsigned char*>(input) + (size_t)first * 64 * 64 * 3;
        load_frame(frame, 0, 64, [&](int y, int pixel, uint2 v) {
          *reinterpret_cast<uint2*>(in + ((y + 1) * FRAME_PITCH + pixel) * 4) = v;
        });
      } else {
        const size_t at = frame < valid ? first + frame : 0;
        Outer::template load<THREADS>(in, static_cast<const bf16*>(input) + at * SIZE * SIZE * IN, valid - frame);
        commit_copies();
        wait_for_copies<0>();
      }
      __syncthreads();

      for (int band = 0; band < SIZE / BAND; ++band) {
        auto store = [&](int row, float4 one, float4 other) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float4 v = half ? other : one;
            if (SECTION == 0) {
              v.x = v.x * (1 / 255.f) + bias.x, v.y = v.y * (1 / 255.f) + bias.y;
              v.z = v.z * (1 / 255.f) + bias.z, v.w = v.w * (1 / 255.f) + bias.w;
            }
            const int i = g + 8 * half;
            bf16* to = conv + T::frame(strip, i) * (BAND + 2) * CONV_ROW + in_row<OUT>(T::x(strip, i), channel);
            *reinterpret_cast<uint2*>(to + (y0 + row) * CONV_ROW) = packed(v);
            if (row == ROWS - 1 && y0 + ROWS == BAND)
              *reinterpret_cast<uint2*>(to + (BAND + (band + 1) % 2) * CONV_ROW) = packed(v);
          }
        };
        if constexpr (SECTION == 0)
          slide_frame<ROWS>(in + ((band * BAND + y0) * FRAME_PITCH + T::x(strip, g)) * 4, frame_weights, store);
        else
          slide<Outer, ROWS, false>(in + T::frame(strip, lane % 16) * Outer::IMAGE, band * BAND + y0, T::x(strip, lane % 16),
                                    weights, bias, store);
        __syncthreads();

        constexpr int EACH = BAND / 2 * W * OUT / 8;
        for (int i = threadIdx.x; i < AT_ONCE * EACH; i += THREADS) {
          const int image = i / EACH;
          const bf16* from = conv + image * (BAND + 2) * CONV_ROW;
          pool<SIZE, OUT>(from, band == 0 ? nullptr : from + (BAND + band % 2) * CONV_ROW, i % EACH,
                                [&](int y, int px, int group, uint4 eight, uint2 places) {
            y += band * BAND / 2;
            *reinterpret_cast<uint4*>(x + Inner::at(frame + image, y, px, group)) = eight;
            if (saved == nullptr || frame + image >= valid) return;
            const size_t at = base + (((frame + image) * W + y) * W + px) * OUT + group;
            *reinterpret_cast<uint4*>(saved + at) = eight;
            *reinterpret_cast<uint2*>(argmax + at) = places;
          });
        }
        __syncthreads();
      }
    }
  }

  clear(h, Inner::SIZE * sizeof(bf16));
  uint4* ahead = reinterpret_cast<uint4*>(h + Inner::SIZE);  // the next layer's weights
  auto fetch = [&](int layer) {
    const uint4* from = fragments + fragments_before(layer);
    for (int i = threadIdx.x; i < 9 * 32 * OUT / 16 * OUT / 16; i += THREADS) copy16_async(ahead + i, from + i, true);
    commit_copies();
  };
  fetch(S::LAYER + 1);
  for (int i = 1; i <= 4; ++i) {  // layers of the two residual blocks
    const int layer = S::LAYER + i, part = warp % (OUT / 16);
    const float* b = parameters + parameters_before(layer + 1) - OUT + part * 16 + lane % 4 * 4;
    const float4 bias = make_float4(b[0], b[1], b[2], b[3]);
    Fragments<OUT> weights;
    wait_for_copies<0>();
    __syncthreads();
    weights.load(ahead, part);
    __syncthreads();
    if (i < 4) fetch(layer + 1);
    bf16* to = i == 4 ? output + base : saved == nullptr ? nullptr : saved + i * (size_t)N * W * W * OUT + base;
    auto write = [&](int frame, int y, int x, int channel, uint2 v) {
      if (to != nullptr && (FRAMES == 1 || frame < valid))
        *reinterpret_cast<uint2*>(to + ((frame * W + y) * W + x) * OUT + channel) = v;
    };
    if (i % 2 == 1) {
      convolve<Inner, OUT, THREADS, true>(warp, x, weights, bias, [&](int frame, int y, int px, int channel, float4 v) {
        uint2 result = packed(v);
        result = make_uint2(relu(result.x), relu(result.y));
        *reinterpret_cast<uint2*>(h + Inner::at(frame, y, px, channel)) = result;
        write(frame, y, px, channel, result);
      });
    } else {
      convolve<Inner, OUT, THREADS, false>(warp, h, weights, bias, [&](int frame, int y, int px, int channel, float4 v) {
        uint2& skipped = *reinterpret_cast<uint2*>(x + Inner::at(frame, y, px, channel));
        v.x += low(skipped.x), v.y += high(skipped.x), v.z += low(skipped.y), v.w += high(skipped.y);
        skipped = packed(v);
        write(frame, y, px, channel, skipped);
      });
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// The gradient of max pooling: of 2 x 2 pixels of the convolution's output, eight channels, from the up to four windows that
// the pixels belong to. `gradient` and `argmax` are a frame's, (W, W, OUT); store(y, x, eight) gets each pixel.
template <int W, int OUT, typename Store>
__device__ void unpool(const bf16* gradient, const unsigned char* argmax, int y, int x, int group, Store store) {
  unsigned sums[2][2][4] = {};
#pragma unroll
  for (int window = 0; window < 4; ++window) {
    const int i = window / 2, j = window % 2;
    if (y + i < 0 || y + i >= W || x + j >= W) continue;
    const int at = ((y + i) * W + x + j) * OUT + group;
    const uint4 four = *reinterpret_cast<const uint4*>(gradient + at);
    const uint2 places = *reinterpret_cast<const uint2*>(argmax + at);
    const unsigned pairs[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const unsigned place = __byte_perm(c < 2 ? places.x : places.y, 0, c % 2 ? 0x4342 : 0x4140);  // a pair's
#pragma unroll
      for (int a = i; a < 2; ++a)
#pragma unroll
        for (int b = j; b < 2; ++b) {
          const unsigned chosen = pairs[c] & equal(place, 0x00010001 * ((a + 1 - 2 * i) * 3 + b + 1 - 2 * j));
          sums[a][b][c] = window == 0 ? chosen : sum_of(sums[a][b][c], chosen);
        }
    }
  }
#pragma unroll
  for (int pixel = 0; pixel < 4; ++pixel) {
    const unsigned* s = sums[pixel / 2][pixel % 2];
    store(2 * y + pixel / 2, 2 * x + pixel % 2, make_uint4(s[0], s[1], s[2], s[3]));
  }
}

constexpr unsigned ONES = 0x3f803f80;

// A warp's part of a layer's gradient: 16 of its outputs, 16 of its inputs, and the bias. As in slide(), it goes down a strip,
// whose 16 pixels a product sums over.
struct WeightGradient {
  float sums[9][8] = {}, bias[4] = {};

  // Adds what ROWS rows of the layer's input from row y on contribute, its 16 channels from in_channel on, and the gradient's
  // from out_channel on. `input` and `gradient` are the lane's images, x its pixel's column in them.
  template <typename Input, typename Output, int ROWS, bool RELU>
  __device__ void add(const bf16* input, int in_channel, const bf16* gradient, int out_channel, int y, int x, bool with_bias) {
    const int group = threadIdx.x % 32 / 16 * 8;
    asm volatile("" : "+r"(x));  // as in slide()
    unsigned dy[3][4];  // rows of the gradient: before, at and after the input's
    auto load = [&](int row) {
      load_matrices<true>(dy[(row + 1) % 3], gradient + Output::at(0, y + row, x, out_channel + group));
    };
    load(-1), load(0);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      load(r + 1);
      const unsigned* now = dy[(r + 1) % 3];
      if (with_bias) multiply(bias, now[0], now[2], now[1], now[3], ONES, ONES);
#pragma unroll
      for (int column = 0; column < 3; ++column) {
        unsigned b[4];
        load_matrices<true>(b, input + Input::at(0, y + r, x + column - 1, in_channel + group));
#pragma unroll
        for (int j = 0; j < 4; ++j) b[j] = RELU ? relu(b[j]) : b[j];
#pragma unroll
        for (int row = 0; row < 3; ++row) {  // of the kernel: with its first row, the input's is above the output's
          const unsigned* a = dy[(r + 2 - row) % 3];
          multiply(sums[row * 3 + column], a[0], a[2], a[1], a[3], b[0], b[1]);
          multiply(sums[row * 3 + column] + 4, a[0], a[2], a[1], a[3], b[2], b[3]);
        }
      }
    }
  }
};

// Writes the warps' parts of a layer's gradient, and then the block's, sums of them: of every PARTS-th warp's, which have the
// same 16 x 16 channels.
constexpr int GRADIENT_SIZE = 9 * 256 + 16;  // (16, 16, 9) and the bias

__device__ inline void write_part(const WeightGradient& gradient, float* to) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int tap = 0; tap < 9; ++tap)
#pragma unroll
    for (int i = 0; i < 8; ++i)  // product i / 4, row g or g + 8, column 2t or 2t + 1
      to[((g + i % 4 / 2 * 8) * 16 + i / 4 * 8 + 2 * t + i % 2) * 9 + tap] = gradient.sums[tap][i];
  if (t == 0) to[9 * 256 + g] = gradient.bias[0], to[9 * 256 + g + 8] = gradient.bias[2];
}

template <int IN, int OUT>
__device__ void write_sum(const float* parts, float* to) {
  constexpr int PARTS = IN / 16 * (OUT / 16);
  for (int i = threadIdx.x; i < OUT * (IN * 9 + 1); i += blockDim.x) {
    const bool is_bias = i >= OUT * IN * 9;
    const int out = is_bias ? i - OUT * IN * 9 : i / (IN * 9), in = is_bias ? 0 : i / 9 % IN;
    const int at = is_bias ? 9 * 256 + out % 16 : (out % 16 * 16 + in % 16) * 9 + i % 9;
    float sum = 0.f;
    for (int warp = out / 16 * (IN / 16) + in / 16; warp < WARPS; warp += PARTS) sum += parts[warp * GRADIENT_SIZE + at];
    to[i] = sum;
  }
}

enum Kind {
  FIRST,   // of a residual block: conv(relu(input)); the gradient skips it too
  SECOND,  // of a residual block: conv(input), whose input is relu(...)
  POOLED   // of a section: maxpool(conv(input))
};

// A layer's gradients of its input and of its weights, in one pass over all frames: half of the warps compute the one, half the
// other. A block keeps its sums over frames until it has seen its last; the blocks' are added later. Of two buffers, one is
// computed with while the next frames are on their way into the other. With one, blocks need no more than the 99 KiB of shared
// memory that GeForce GPUs have: `skipping` is read where it lies, and the largest frames come in two bands of H rows. A band is
// an image of its own, but what is unpooled has its neighbours in the frame as border above and below.
template <int W, int IN, int OUT, int KIND, int FRAMES, int BUFFERS>
__global__ void __launch_bounds__(64 * WARPS, 1) layer_backward(int N, int layer,
                                    const bf16* __restrict__ gradient,         // (N, W, W, OUT), or POOLED: (N, W/2, W/2, OUT)
                                    const unsigned char* __restrict__ argmax,  // POOLED: (N, W/2, W/2, OUT)
                                    const bf16* __restrict__ input,            // (N, W, W, IN)
                                    const bf16* __restrict__ skipping,         // FIRST: (N, W, W, IN), gradient of x + conv(h)
                                    const uint4* __restrict__ fragments,       // of all layers, from pack()
                                    bf16* __restrict__ grad_input,             // (N, W, W, IN)
                                    float* __restrict__ partial)               // (blocks, parameters of all layers)
{
  constexpr bool POOL = KIND == POOLED;
  constexpr int BANDS = POOL && W == 32 && BUFFERS == 1 ? 2 : 1, H = W / BANDS;
  typedef Images<W, IN, FRAMES, H> Input;
  typedef Images<W, OUT, FRAMES, H> Output;
  constexpr int THREADS = 64 * WARPS, POOLED_SIZE = FRAMES * W * W / 4 * OUT, INPUT_SIZE = FRAMES * W * W * IN;
  const int images = N * BANDS;
  extern __shared__ __align__(16) bf16 shared[];
  bf16* inputs = shared;                             // (BUFFERS, Input)
  bf16* gradients = inputs + BUFFERS * Input::SIZE;  // (BUFFERS, Output), or POOLED: (1, Output), what is unpooled
  bf16* more = gradients + (POOL ? 1 : BUFFERS) * Output::SIZE;  // FIRST with two: (2, FRAMES, W, W, IN), `skipping`
  unsigned char* more_argmax = reinterpret_cast<unsigned char*>(more + POOLED_SIZE);  // POOLED: `gradient` and this, to unpool

  auto copy = [&](void* to, const void* from, int bytes, int valid_bytes) {
    for (int i = threadIdx.x * 16; i < bytes; i += THREADS * 16) {
      const bool copied = i < valid_bytes;
      copy16_async(static_cast<char*>(to) + i, static_cast<const char*>(from) + (copied ? i : 0), copied);
    }
  };
  auto fetch = [&](int first, int buffer) {
    if (first < images) {
      const int valid = min(FRAMES, images - first);
      const size_t base = (size_t)first * H * W;
      Input::template load<THREADS>(inputs + buffer * Input::SIZE, input + base * IN, valid);
      if constexpr (POOL) {
        const size_t pooled = (size_t)(first / BANDS) * W * W / 4 * OUT;
        copy(more, gradient + pooled, POOLED_SIZE * 2, valid * W * W / 4 * OUT * 2);
        copy(more_argmax, argmax + pooled, POOLED_SIZE, valid * W * W / 4 * OUT);
      } else {
        Output::template load<THREADS>(gradients + buffer * Output::SIZE, gradient + base * OUT, valid);
        if (KIND == FIRST && BUFFERS == 2)
          copy(more + buffer * INPUT_SIZE, skipping + base * IN, INPUT_SIZE * 2, valid * W * W * IN * 2);
      }
    }
    commit_copies();
  };
  // Calls use(buffer, gradients, first image) for all of the block's images; all threads must come along.
  auto for_all = [&](auto use) {
    int buffer = 0;
    for (int first = blockIdx.x * FRAMES; first < images; first += gridDim.x * FRAMES) {
      const int next = first + gridDim.x * FRAMES;
      wait_for_copies<0>();
      __syncthreads();
      bf16* dy = gradients + (POOL ? 0 : buffer * Output::SIZE);
      if constexpr (POOL) {
        constexpr int HALF = W / 2, GROUPS = OUT / 8, BORDER = BANDS > 1, PAIRS = H / 2 + 2 * BORDER;  // of rows
        const int top = first % BANDS * H;
        for (int i = threadIdx.x; i < FRAMES * PAIRS * HALF * GROUPS; i += THREADS) {
          const int group = i % GROUPS * 8, x = i / GROUPS % HALF, y = i / GROUPS / HALF % PAIRS + top / 2 - BORDER;
          const int frame = i / GROUPS / HALF / PAIRS, from = frame * HALF * HALF * OUT;
          unpool<HALF, OUT>(more + from, more_argmax + from, y, x, group, [&](int y, int x, uint4 v) {
            if (BANDS > 1 && (y < top - 1 || y > top + H)) return;
            if (BANDS > 1 && y < 0) v = make_uint4(0, 0, 0, 0);  // no row of the frame; nor is W, to which unpool gives zeros
            *reinterpret_cast<uint4*>(dy + Output::at(frame, y - top, x, group)) = v;
          });
        }
        __syncthreads();
      }
      if (BUFFERS == 2) fetch(next, buffer ^ 1);
      use(buffer, dy, first);
      if (BUFFERS == 1) __syncthreads(), fetch(next, 0);
      buffer = BUFFERS - 1 - buffer;
    }
    __syncthreads();
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  clear(shared, (BUFFERS * Input::SIZE + (POOL ? 1 : BUFFERS) * Output::SIZE) * sizeof(bf16));
  __syncthreads();
  fetch(blockIdx.x * FRAMES, 0);
  float* parts = reinterpret_cast<float*>(shared);  // at the end: (WARPS, GRADIENT_SIZE)
  if (warp < WARPS) {
    Fragments<OUT> weights;
    weights.load(fragments + fragments_before(LAYERS) + fragments_before(layer), warp % (IN / 16));
    for_all([&](int buffer, const bf16* dy, int first) {
      const bf16* x = inputs + buffer * Input::SIZE;
      const bf16* skipped = BUFFERS == 2 ? more + buffer * INPUT_SIZE : skipping + (size_t)first * H * W * IN;
      bf16* to = grad_input + (size_t)first * H * W * IN;
      const int valid = images - first;
      convolve<Output, IN, 32 * WARPS, false>(warp, dy, weights, make_float4(0, 0, 0, 0),
                                              [&](int frame, int y, int px, int channel, float4 v) {
        if (FRAMES > 1 && frame >= valid) return;
        const int at = ((frame * H + y) * W + px) * IN + channel;
        uint2 result = packed(v);
        if (!POOL) {
          const uint2 mask = *reinterpret_cast<const uint2*>(x + Input::at(frame, y, px, channel));
          result.x &= positive(mask.x), result.y &= positive(mask.y);
        }
        if (KIND == FIRST) {
          const uint2 more = *reinterpret_cast<const uint2*>(skipped + at);
          result.x = sum_of(result.x, more.x), result.y = sum_of(result.y, more.y);
        }
        *reinterpret_cast<uint2*>(to + at) = result;
      });
    });
  } else {
    typedef Strips<W, FRAMES> S;
    constexpr int PARTS = IN / 16 * (OUT / 16), ROWS = S::NUMBER * PARTS * H / WARPS;
    const int my = warp - WARPS, in = my % (IN / 16), out = my / (IN / 16) % (OUT / 16);
    const int strip = my / PARTS % S::NUMBER, frame = S::frame(strip, lane % 16), x = S::x(strip, lane % 16);
    const int y = my / (PARTS * S::NUMBER) * ROWS;
    WeightGradient weight;
    for_all([&](int buffer, const bf16* dy, int) {
      weight.add<Input, Output, ROWS, KIND == FIRST>(inputs + buffer * Input::SIZE + frame * Input::IMAGE, in * 16,
                                                     dy + frame * Output::IMAGE, out * 16, y, x, in == 0);
    });
    write_part(weight, parts + my * GRADIENT_SIZE);
  }
  __syncthreads();
  write_sum<IN, OUT>(parts, partial + (size_t)blockIdx.x * parameters_before(LAYERS) + parameters_before(layer));
}

// The gradient of layer 0's weights, the only ones that come from the frames. As in slide_frame(), a product has the three
// pixels of a kernel's row for its columns, four each; matrices begin at even pixels only, so there are two copies of a frame.
__global__ void __launch_bounds__(32 * WARPS, 3) frames_backward(int N,
                                    const unsigned char* __restrict__ frames,  // (N, 64, 64, 3)
                                    const bf16* __restrict__ gradient,         // (N, 32, 32, 16)  of x0
                                    const unsigned char* __restrict__ argmax,  // (N, 32, 32, 16)
                                    float* __restrict__ partial)               // (blocks, parameters of layer 0)
{
  constexpr int BAND = 16, COPY = (BAND + 2) * FRAME_PITCH * 4;
  typedef Strips<64, 1> S;
  constexpr int ROWS = S::NUMBER * BAND / WARPS, SIZE = 3 * 256 + 16;
  extern __shared__ __align__(16) bf16 shared[];
  bf16* even = shared;      // (BAND + 2, FRAME_PITCH, 4)  pixels from 0 on
  bf16* odd = even + COPY;  // the same                    pixels from 1 on
  bf16* dy = odd + COPY;    // (BAND, 64, 16)
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int strip = warp % S::NUMBER, y0 = warp / S::NUMBER * ROWS;

  clear(even, 2 * COPY * sizeof(bf16));
  float sums[3][8] = {}, bias[4] = {};
  for (int n = blockIdx.x; n < N; n += gridDim.x)
    for (int band = 0; band < 64; band += BAND) {
      __syncthreads();
      load_frame(frames + (size_t)n * 64 * 64 * 3, band - 1, BAND + 2, [&](int y, int pixel, uint2 v) {
        *reinterpret_cast<uint2*>(even + (y * FRAME_PITCH + pixel) * 4) = v;
        *reinterpret_cast<uint2*>(odd + (y * FRAME_PITCH + pixel - 1) * 4) = v;
      });
      const size_t from = (size_t)n * 32 * 32 * 16;
      for (int i = threadIdx.x; i < BAND / 2 * 32 * 2; i += blockDim.x)
        unpool<32, 16>(gradient + from, argmax + from, band / 2 + i / 64, i / 2 % 32, i % 2 * 8, [&](int y, int x, uint4 v) {
          *reinterpret_cast<uint4*>(dy + (y - band) * 64 * 16 + in_row<16>(x, i % 2 * 8)) = v;
        });
      __syncthreads();

      const int pixel = strip * 16 + lane % 16, group = lane / 16 * 8;
      unsigned a[3][4];
#pragma unroll
      for (int r = 0; r < ROWS + 2; ++r) {
        if (r < ROWS) {
          load_matrices<true>(a[r % 3], dy + (y0 + r) * 64 * 16 + in_row<16>(pixel, group));
          multiply(bias, a[r % 3][0], a[r % 3][2], a[r % 3][1], a[r % 3][3], ONES, ONES);
        }
        unsigned b[4];
        load_matrices<true>(b, even + ((y0 + r) * FRAME_PITCH + pixel) * 4 + (pixel % 2 ? COPY - 4 : 0) + group);
#pragma unroll
        for (int row = 0; row < 3; ++row) {
          if (r - row < 0 || r - row >= ROWS) continue;
          const unsigned* dy_row = a[(r - row) % 3];
          multiply(sums[row], dy_row[0], dy_row[2], dy_row[1], dy_row[3], b[0], b[1]);
          multiply(sums[row] + 4, dy_row[0], dy_row[2], dy_row[1], dy_row[3], b[2], b[3]);
        }
      }
    }

  __syncthreads();
  float* parts = reinterpret_cast<float*>(shared);  // (WARPS, SIZE)
  for (int row = 0; row < 3; ++row)
    for (int i = 0; i < 8; ++i)
      parts[warp * SIZE + row * 256 + (g + i % 4 / 2 * 8) * 16 + i / 4 * 8 + 2 * t + i % 2] = sums[row][i];
  if (t == 0) parts[warp * SIZE + 3 * 256 + g] = bias[0], parts[warp * SIZE + 3 * 256 + g + 8] = bias[2];
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * 28; i += blockDim.x) {
    const int out = i / 27, channel = i / 9 % 3, y = i / 3 % 3, x = i % 3;
    const int at = i < 16 * 27 ? y * 256 + out * 16 + x * 4 + channel : 3 * 256 + i - 16 * 27;
    float sum = 0.f;
    for (int w = 0; w < WARPS; ++w) sum += parts[w * SIZE + at];
    partial[(size_t)blockIdx.x * 16 * 28 + i] = i < 16 * 27 ? sum * (1 / 255.f) : sum;
  }
}

}  // namespace
