// Python's way to the launchers. Tensors come as their addresses, so that neither this file nor the kernels include a
// PyTorch header and all of it builds in seconds.

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

int srwm_forward(int T, int B, int H, int D, int Y, const float* x, const float* W0, const float* state, const bool* done,
                 float* y, float* new_state, float* qkb, float* d, int* episode, cudaStream_t stream);
int srwm_backward(int T, int B, int H, int D, int Y, int bptt_length, const float* x, const float* W0, const float* state,
                  const float* new_state, const float* qkb, const float* d, const int* episode, const float* dy,
                  const float* dnew, float* dx, float* dW, float* dstate, cudaStream_t stream);
int srwm_backward_shared_memory(int D, int C);

int delta_rule_forward(int T, int B, int H, int D, int V, const float* q, const float* k, const float* v, const float* beta,
                       const float* state, const bool* done, float* out, float* new_state, float* e, int* episode,
                       cudaStream_t stream);
int delta_rule_backward(int T, int B, int H, int D, int V, int bptt_length, const float* q, const float* k,
                        const float* beta, const float* state, const float* e, const int* episode, const float* dout,
                        const float* dnew, float* dq, float* dk, float* dv, float* dbeta, float* dstate,
                        cudaStream_t stream);
int delta_rule_backward_shared_memory(int D, int V);

namespace {

// An address, as Python's integers hold it: converts itself to whatever pointer the launcher takes.
struct Address {
  uintptr_t value;
  template <typename T>
  operator T*() const { return reinterpret_cast<T*>(value); }
};

void check(int error) {
  if (error != 0) throw std::runtime_error(cudaGetErrorString(static_cast<cudaError_t>(error)));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  pybind11::class_<Address>(m, "Address").def(pybind11::init<uintptr_t>());
  pybind11::implicitly_convertible<pybind11::int_, Address>();

  m.def("srwm_forward", [](int T, int B, int H, int D, int Y, Address x, Address W0, Address state, Address done, Address y,
                           Address new_state, Address qkb, Address d, Address episode, Address stream) {
    check(srwm_forward(T, B, H, D, Y, x, W0, state, done, y, new_state, qkb, d, episode, stream));
  });
  m.def("srwm_backward", [](int T, int B, int H, int D, int Y, int bptt_length, Address x, Address W0, Address state,
                            Address new_state, Address qkb, Address d, Address episode, Address dy, Address dnew, Address dx,
                            Address dW, Address dstate, Address stream) {
    check(srwm_backward(T, B, H, D, Y, bptt_length, x, W0, state, new_state, qkb, d, episode, dy, dnew, dx, dW, dstate,
                        stream));
  });
  m.def("srwm_backward_shared_memory", &srwm_backward_shared_memory);

  m.def("delta_rule_forward", [](int T, int B, int H, int D, int V, Address q, Address k, Address v, Address beta,
                                 Address state, Address done, Address out, Address new_state, Address e, Address episode,
                                 Address stream) {
    check(delta_rule_forward(T, B, H, D, V, q, k, v, beta, state, done, out, new_state, e, episode, stream));
  });
  m.def("delta_rule_backward", [](int T, int B, int H, int D, int V, int bptt_length, Address q, Address k, Address beta,
                                  Address state, Address e, Address episode, Address dout, Address dnew, Address dq,
                                  Address dk, Address dv, Address dbeta, Address dstate, Address stream) {
    check(delta_rule_backward(T, B, H, D, V, bptt_length, q, k, beta, state, e, episode, dout, dnew, dq, dk, dv, dbeta,
                              dstate, stream));
  });
  m.def("delta_rule_backward_shared_memory", &delta_rule_backward_shared_memory);
}
