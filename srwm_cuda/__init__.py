"""Self-referential weight matrices for PyTorch: fused CUDA kernels, and the same functions in plain PyTorch.

    y, new_state = srwm_cuda.srwm(x, W, state, done)

CUDA tensors of float32 take the kernels (compiled at first use, in seconds, with `nvcc`; cached as PyTorch caches its
extensions); all others take `srwm_cuda.reference`, a loop over time that reads like the equations.
"""

import functools
import pathlib
import shutil
import sys
import threading
import warnings

import torch
from torch.autograd.function import once_differentiable

from . import reference

__all__ = ["reference", "srwm"]

KERNEL_HEAD_SIZES = (8, 16, 32, 64)
MAX_COLUMNS = 512  # of W, as in srwm.cu: one thread each
_compiling = threading.Lock()


def srwm(x, W, state, done, bptt_length=None):
    """One layer of self-referential weight matrices over an unroll (Irie et al. 2022, arXiv 2202.05780, equations 5 to 8).

    At each step t, with W_t = W + state, zeroed state where done, and row vectors:

        y, q, k, b = split(x W_t);  q, k = softmax(q), softmax(k);  beta = sigmoid(b)
        state[:, group] += beta[group] * outer(k, (q - k) W_t)[:, group]      for the groups of columns y, q, k, b

    Args:
        x: (T, B, H, D), the layer's input at T steps of B environments, for H heads of size D.
        W: (H, D, Y + 2D + 4), the initial matrix of each head, columns [y | q | k | b]; Y is what is left over.
        state: (B, H, D, Y + 2D + 4), what the matrices have changed by before the first step.
        done: (T, B) bool; True: a new episode begins at t, and the state is zeroed before step t.
        bptt_length: the state is detached every so many steps; None: gradients flow through the whole unroll.

    Returns:
        y: (T, B, H, Y), and new_state, like state. Both are differentiable with respect to x, W and state.

    Raises:
        ValueError: a shape, dtype or device that is none of the above; on CUDA also a head size D other than 8, 16, 32, 64.

    The kernels are deterministic, run on PyTorch's current stream and can be captured into a CUDA graph.
    """
    T, B, H, D = _shape("x", x, "(T, B, H, D)")
    _, _, columns = _shape("W", W, "(H, D, Y + 2D + 4)")
    if T < 1 or B < 1 or H < 1 or D < 1:
        raise ValueError(f"x: every size must be at least 1, got {tuple(x.shape)}")
    if columns - 2 * D - 4 < 1:
        raise ValueError(f"W must have at least 2D + 5 = {2 * D + 5} columns for D = {D}, got {columns}")
    _like("W", W, x, (H, D, columns))
    _like("state", state, x, (B, H, D, columns))
    _check_done(done, x, (T, B))
    if bptt_length is not None and bptt_length < 1:
        raise ValueError(f"bptt_length must be None or at least 1, got {bptt_length}")
    if x.is_cuda and D not in KERNEL_HEAD_SIZES:
        raise ValueError(f"x: on CUDA, the head size D must be one of {KERNEL_HEAD_SIZES}, got {D}")
    if x.is_cuda and columns > MAX_COLUMNS:
        raise ValueError(f"W: on CUDA, at most {MAX_COLUMNS} columns, got {columns}")
    if x.is_cuda and x.dtype == torch.float32 and (kernels := _kernels()) is not None:
        needed = kernels.srwm_backward_shared_memory(D, columns - 2 * D - 4)
        if needed <= torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin:
            return _SRWM.apply(x, W, state, done, bptt_length or 0)
        _warn_once(f"srwm_cuda: W with D = {D} and {columns} columns needs {needed // 1024} KiB of shared memory, which "
                   "this GPU lacks: PyTorch's version runs, many times slower")
    return reference.srwm(x, W, state, done, bptt_length)


class _SRWM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, state, done, bptt_length):
        x, W, state, done = x.contiguous(), W.contiguous(), state.contiguous(), done.contiguous()
        T, B, H, D = x.shape
        columns = W.shape[-1]
        sizes = (T, B, H, D, columns - 2 * D - 4)
        y, new_state = x.new_empty(T, B, H, sizes[-1]), torch.empty_like(state)
        saved = (None, None, None)  # q, k and beta; (q - k) W; first step of each step's episode
        if any(ctx.needs_input_grad):
            saved = x.new_empty(T, B, H, 2 * D + 4), x.new_empty(T, B, H, columns), done.new_empty(T, B, dtype=torch.int32)
        _launch(_kernels().srwm_forward, *sizes, x, W, state, done, y, new_state, *saved)
        ctx.save_for_backward(x, W, state, *saved)
        ctx.sizes, ctx.bptt_length = sizes, bptt_length
        return y, new_state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_new_state):
        x, W, state, *saved = ctx.saved_tensors
        grad_x, grad_W, grad_state = torch.empty_like(x), torch.empty_like(state), torch.empty_like(state)
        _launch(_kernels().srwm_backward, *ctx.sizes, ctx.bptt_length, x, W, state, *saved,
                grad_y.contiguous(), grad_new_state.contiguous(), grad_x, grad_W, grad_state)
        return grad_x, grad_W.sum(0), grad_state, None, None  # each environment its own part of grad_W: no atomics


def _launch(kernel, *arguments):
    """Calls a launcher on the current stream of the tensors' device; tensors go as addresses, None as the null pointer."""
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    with torch.cuda.device(device):
        addresses = (a.data_ptr() if isinstance(a, torch.Tensor) else a or 0 for a in arguments)
        kernel(*addresses, torch.cuda.current_stream(device).cuda_stream)


def _kernels():
    """The compiled extension; None, with a warning, where it cannot be compiled."""
    with _compiling:  # actor threads may be the first users
        return _compile()


@functools.cache
def _compile():
    from torch.utils.cpp_extension import CUDA_HOME, load

    if CUDA_HOME is None or shutil.which("nvcc", path=f"{CUDA_HOME}/bin") is None:
        warnings.warn("srwm_cuda: no nvcc found, so PyTorch's version of the kernels runs, many times slower; install the "
                      "CUDA toolkit that matches torch.version.cuda, or set CUDA_HOME", stacklevel=2)
        return None
    print("srwm_cuda: loading the CUDA kernels (compiled at first use, about 20 s)", file=sys.stderr, flush=True)
    folder = pathlib.Path(__file__).parent
    return load("srwm_cuda_kernels", [str(folder / name) for name in ("binding.cpp", "srwm.cu")],
                extra_cflags=["-O3"], extra_cuda_cflags=["-O3"])


@functools.cache
def _warn_once(message):
    warnings.warn(message, stacklevel=3)


def _shape(name, tensor, layout):
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != layout.count(",") + 1:
        got = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must be a tensor of shape {layout}, got {got}")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, got {tensor.dtype}")
    return tensor.shape


def _like(name, tensor, x, shape):
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
        got = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must have shape {shape} to go with x, got {got}")
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise ValueError(f"{name} must be {x.dtype} on {x.device} like x, got {tensor.dtype} on {tensor.device}")


def _check_done(done, x, shape):
    if not isinstance(done, torch.Tensor) or tuple(done.shape) != shape or done.dtype != torch.bool:
        got = f"{done.dtype} {tuple(done.shape)}" if isinstance(done, torch.Tensor) else type(done).__name__
        raise ValueError(f"done must be a bool tensor of shape {shape}, got {got}")
    if done.device != x.device:
        raise ValueError(f"done must be on {x.device} like x, got {done.device}")
