"""Self-referential weight matrices, the delta rule and IMPALA's CNN for PyTorch: fused CUDA kernels, and plain PyTorch.

    y, new_state = srwm_cuda.srwm(x, W, state, done)
    out, new_state = srwm_cuda.delta_rule(q, k, v, beta, state, done)
    features = srwm_cuda.impala_cnn(frames, *parameters)

CUDA tensors of float32 take the kernels. `srwm_cuda.kernels` compiles them at first use, in seconds, with the compiler that
comes with PyTorch; if that fails, a warning says why. All other tensors take `srwm_cuda.reference`, which reads like the
equations.
"""

import functools
import hashlib
import pathlib
import warnings
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import cnn, kernels, reference
from .cnn import is_impala_cnn
from .flags import Flags, lock_pages

__all__ = ["Flags", "delta_rule", "impala_cnn", "is_impala_cnn", "lock_pages", "reference", "srwm"]

_SOURCES = sorted(path for path in pathlib.Path(__file__).parent.iterdir() if path.suffix in (".py", ".cu", ".cuh"))
SHA256 = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()  # by which a run tells versions apart

KERNEL_HEAD_SIZES = (8, 16, 32, 64)
MAX_COLUMNS, LANES = 512, 4  # as in common.cuh: columns of a matrix, and threads that sum over those of one row together


def srwm(x, W, state, done, bptt_length=None):
    """One layer of self-referential weight matrices over an unroll (Irie et al. 2022, arXiv 2202.05780, equations 5 to 8).

    At each step t, with W_t = W + state, zeroed state where done, and row vectors:

        y, q, k, b = split(x W_t);  q, k = softmax(q), softmax(k);  beta = sigmoid(b)
        state[:, group] += beta[group] * outer(k, (q - k) W_t)[:, group]      for the groups of columns y, q, k, b

    Args:
        x: (T, B, H, D), the layer's input at T steps of B environments, for H heads of size D.
        W: (H, D, Y + 2D + 4), the initial matrix of each head, columns [y | q | k | b]; Y is the number of columns that remain.
        state: (B, H, D, Y + 2D + 4), what the matrices have changed by before the first step.
        done: (T, B) bool; True: a new episode begins at t, and the state is zeroed before step t.
        bptt_length: the state is detached every so many steps; None: gradients flow through the whole unroll.

    Returns:
        y: (T, B, H, Y), and new_state, like state. Both are differentiable with respect to x, W and state.

    Raises:
        ValueError: a shape, dtype or device other than these; on CUDA also a head size D other than 8, 16, 32, 64,
            or more than 512 columns.

    The kernels are deterministic, run on PyTorch's current stream and can be captured into a CUDA graph.
    """
    T, B, H, D = _shape("x", x, "(T, B, H, D)")
    _, _, columns = _shape("W", W, "(H, D, Y + 2D + 4)")
    if columns - 2 * D - 4 < 1:
        raise ValueError(f"W must have at least 2D + 5 = {2 * D + 5} columns for D = {D}, got {columns}")
    _check_like("W", W, (H, D, columns), "x", x)
    _check_like("state", state, (B, H, D, columns), "x", x)
    _check_done_and_bptt_length(done, bptt_length, (T, B), "x", x)
    if _kernels_take(_srwm_launches, "x", x, "W", columns):
        return _SRWM.apply(x, W, state, done, bptt_length or 0, torch.is_grad_enabled())
    return reference.srwm(x, W, state, done, bptt_length)


def delta_rule(q, k, v, beta, state, done, bptt_length=None):
    """A fast weight memory written by the delta rule over an unroll (Schlag, Irie and Schmidhuber 2021, "Linear Transformers
    Are Secretly Fast Weight Programmers", arXiv 2102.11174).

    At each step t, with row vectors, and F the state, zeroed where done:

        F += beta * outer(k, v - k F);  out = q F      with the updated F

    Args:
        q, k: (T, B, H, D), queries and keys at T steps of B environments, for H heads of size D; the caller normalizes them.
        v: (T, B, H, V), values.
        beta: (T, B, H), rates, of any size; the caller squashes them.
        state: (B, H, D, V), the memory F before the first step.
        done: (T, B) bool; True: a new episode begins at t, and the state is zeroed before step t.
        bptt_length: the state is detached every so many steps; None: gradients flow through the whole unroll.

    Returns:
        out: (T, B, H, V), and new_state, like state. Both are differentiable with respect to q, k, v, beta and state.

    Raises:
        ValueError: a shape, dtype or device other than these; on CUDA also a head size D other than 8, 16, 32, 64,
            or more than 512 columns.

    The kernels are deterministic, run on PyTorch's current stream and can be captured into a CUDA graph.
    """
    T, B, H, D = _shape("q", q, "(T, B, H, D)")
    V = _shape("v", v, "(T, B, H, V)")[-1]
    _check_like("k", k, (T, B, H, D), "q", q)
    _check_like("v", v, (T, B, H, V), "q", q)
    _check_like("beta", beta, (T, B, H), "q", q)
    _check_like("state", state, (B, H, D, V), "q", q)
    _check_done_and_bptt_length(done, bptt_length, (T, B), "q", q)
    if _kernels_take(_delta_rule_launches, "q", q, "v", V):
        return _DeltaRule.apply(q, k, v, beta, state, done, bptt_length or 0, torch.is_grad_enabled())
    return reference.delta_rule(q, k, v, beta, state, done, bptt_length)


def impala_cnn(frames, *parameters):
    """The residual CNN of IMPALA (Espeholt et al. 2018, figure 3), without its last, fully connected layer.

    Each of three sections, of 16, 32 and 32 channels, is

        x0 = maxpool(conv(input));  x1 = x0 + conv(relu(conv(relu(x0))));  x2 = x1 + conv(relu(conv(relu(x1))))

    with convolutions of 3 x 3 and padding 1, and pooling of 3 x 3, stride 2 and padding 1.

    Args:
        frames: (N, 64, 64, 3) uint8; the network's input is frames / 255.
        parameters: weight (OUT, IN, 3, 3) and bias (OUT,) of the 15 convolutions in their order, float32.

    Returns:
        (N, 2048), x2 of the third section, its 32 channels of 8 x 8 one after another, differentiable with respect to the
        parameters. The kernels compute it from operands in bfloat16 with sums in float32, in bfloat16. They run on GPUs from
        compute capability 8.0, on float32 parameters; elsewhere `reference.impala_cnn` computes it.

    Raises:
        ValueError: a shape, dtype or device other than these.

    The kernels are deterministic, run on PyTorch's current stream and can be captured into a CUDA graph. What they compute of a
    frame does not depend on the others of its batch.
    """
    is_frames = isinstance(frames, torch.Tensor) and frames.dim() == 4 and frames.shape[1:] == (64, 64, 3) and len(frames) > 0
    if not is_frames or frames.dtype != torch.uint8:
        raise ValueError(f"frames must be a uint8 tensor of shape (N, 64, 64, 3), N at least 1, got {_got(frames)}")
    if len(parameters) != len(cnn.SHAPES):
        raise ValueError(f"parameters must be {len(cnn.SHAPES)} tensors, weight and bias of each layer, got {len(parameters)}")
    for i, (parameter, shape) in enumerate(zip(parameters, cnn.SHAPES)):
        if not isinstance(parameter, torch.Tensor) or tuple(parameter.shape) != shape:
            raise ValueError(f"parameters[{i}] must have shape {shape}, got {_got(parameter)}")
        if parameter.dtype not in (torch.float32, torch.float64) or parameter.dtype != parameters[0].dtype:
            raise ValueError(f"parameters[{i}] must be float32 or float64 like the first, got {parameter.dtype}")
        if parameter.device != frames.device:
            raise ValueError(f"parameters[{i}] must be on {frames.device} like frames, got {parameter.device}")
    if frames.is_cuda and parameters[0].dtype == torch.float32 and cnn.kernels_run_on(frames.device):
        return cnn.ImpalaCNN.apply(frames, torch.is_grad_enabled(), *parameters)
    return reference.impala_cnn(frames, *parameters)


# Under no_grad needs_input_grad still says True, and within forward is_grad_enabled() always says False: hence the argument.

class _SRWM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, state, done, bptt_length, grad_enabled):
        x, W, state, done = x.contiguous(), W.contiguous(), state.contiguous(), done.contiguous()
        T, B, H, D = x.shape
        columns = W.shape[-1]
        Y = columns - 2 * D - 4
        y, new_state = x.new_empty(T, B, H, Y), torch.empty_like(state)
        saved = (None, None, None)  # q, k and beta; (q - k) W; first step of each step's episode
        if grad_enabled and any(ctx.needs_input_grad):
            saved = x.new_empty(T, B, H, 2 * D + 4), x.new_empty(T, B, H, columns), done.new_empty(T, B, dtype=torch.int32)
        _srwm_launches(D, columns)[0](B * H, (T, B, H, Y, columns, 0), x, W, state, done, y, new_state, *saved)
        ctx.save_for_backward(x, W, state, new_state, *saved)
        ctx.set_materialize_grads(False)
        ctx.shape = (T, B, H, Y, columns, bptt_length)
        return y, new_state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_new_state):
        x, W, state, *saved = ctx.saved_tensors
        T, B, H, Y, columns, _ = ctx.shape
        grad_y = x.new_zeros(T, B, H, Y) if grad_y is None else grad_y.contiguous()
        grad_new_state = None if grad_new_state is None else grad_new_state.contiguous()  # None, as in training: zeros
        grad_x, grad_W, grad_state = torch.empty_like(x), torch.empty_like(state), torch.empty_like(state)
        _srwm_launches(x.shape[-1], columns)[1](B * H, ctx.shape, x, W, state, *saved, grad_y, grad_new_state,
                                                grad_x, grad_W, grad_state)
        return grad_x, grad_W.sum(0), grad_state, None, None, None  # each environment its own part of grad_W: no atomics


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, state, done, bptt_length, grad_enabled):
        q, k, v, beta, state, done = (tensor.contiguous() for tensor in (q, k, v, beta, state, done))
        (T, B, H, D), V = q.shape, v.shape[-1]
        out, new_state = torch.empty_like(v), torch.empty_like(state)
        saved = (None, None)  # v - k F; first step of each step's episode
        if grad_enabled and any(ctx.needs_input_grad):
            saved = torch.empty_like(v), torch.empty_like(done, dtype=torch.int32)
        _delta_rule_launches(D, V)[0](B * H, (T, B, H, V, 0), q, k, v, beta, state, done, out, new_state, *saved)
        ctx.save_for_backward(q, k, beta, state, *saved)
        ctx.shape = (T, B, H, V, bptt_length)
        return out, new_state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_new_state):
        q, k, beta, state, error, episode = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (q, k, error, beta, state)]  # v's shape is that of its error
        _, B, H, V, _ = ctx.shape
        _delta_rule_launches(q.shape[-1], V)[1](B * H, ctx.shape, q, k, beta, state, error, episode,
                                                grad_out.contiguous(), grad_new_state.contiguous(), *grads)
        return *grads, None, None, None


class _Launch(NamedTuple):
    """How a kernel is launched for given sizes. Called with the number of blocks, one for each environment and head, and with
    the kernel's arguments."""

    source: str
    kernel: str
    threads: int
    shared_bytes: int = 0

    def __call__(self, blocks, *arguments):
        kernels.launch(self.source, self.kernel, (blocks, 1, 1), (self.threads, 1, 1), self.shared_bytes, *arguments)


@functools.cache
def _srwm_launches(D, columns):
    """Forward and backward. PARTS threads share a column's D rows; the fewer threads a block may have, the more registers
    each of them gets."""
    parts = 2 if D > 32 else 1
    forward = _Launch("srwm.cu", f"srwm_forward_kernel<{D}, {parts}>", _round_up(columns * parts, 32))
    parts, fewer = (4, 2) if D > 32 else (D // 8, (D // 8 + 1) // 2)
    most = MAX_COLUMNS * fewer
    variants = [(parts, 800 if D > 16 else 512), (fewer, 768 if D > 32 else most), (fewer, most)]
    parts, max_threads = next(variant for variant in variants if columns * variant[0] <= variant[1])
    rows, threads = D // parts, _round_up(columns * parts, 32)
    floats = 8 * D * _round_up(threads // 32, 4) + 4 * _round_up(D + 2 * columns + 1, 4)  # sums, and four steps' inputs
    floats += rows * max_threads if rows > 16 else 0  # W
    return forward, _Launch("srwm.cu", f"srwm_backward_kernel<Variant<{D}, {parts}, {max_threads}>>", threads, 4 * floats)


@functools.cache
def _delta_rule_launches(D, V):
    """Forward and backward, whose rows in shared memory are padded to an odd multiple of what LANES threads read at once."""
    forward = _Launch("delta_rule.cu", f"delta_rule_forward_kernel<{D}>", _round_up(max(V, 2 * D), 32))
    width = 4 * LANES
    floats = 4 * D + (6 + 2 * D) * (_round_up(V - width, 2 * width) + width)
    threads = _round_up(max(V, D * LANES + 32), 32)
    return forward, _Launch("delta_rule.cu", f"delta_rule_backward_kernel<{D}>", threads, 4 * floats)


def _round_up(n, multiple):
    return (n + multiple - 1) // multiple * multiple


def _kernels_take(launches, first_name, first, wide_name, columns):
    """Whether the kernels of these launches run. On CUDA, it is an error if no kernel takes the head size D, the last size of
    the first argument, or the number of columns, the last size of another."""
    if not first.is_cuda:
        return False
    D = first.shape[-1]
    if D not in KERNEL_HEAD_SIZES:
        raise ValueError(f"{first_name}: on CUDA, the head size D must be one of {KERNEL_HEAD_SIZES}, got {D}")
    if columns > MAX_COLUMNS:
        raise ValueError(f"{wide_name}: on CUDA, at most {MAX_COLUMNS} columns, got {columns}")
    if first.dtype != torch.float32:
        return False
    forward, backward = launches(D, columns)
    if backward.shared_bytes > torch.cuda.get_device_properties(first.device).shared_memory_per_block_optin:
        _warn_once(f"srwm_cuda: {forward.source} with D = {D} and {columns} columns needs {backward.shared_bytes // 1024} KiB "
                   "of shared memory, which this GPU lacks: PyTorch's version runs, many times slower")
        return False
    architecture = kernels.architecture_of(first.device)
    needed = (forward, backward) if torch.is_grad_enabled() else (forward,)
    return all(kernels.can_compile(launch.source, launch.kernel, architecture) for launch in needed)


@functools.cache
def _warn_once(message):
    warnings.warn(message, stacklevel=3)


def _shape(name, tensor, layout):
    """The shape of a tensor from which sizes are read: a function's first, and others with a size of their own."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != layout.count(",") + 1 or 0 in tensor.shape:
        raise ValueError(f"{name} must be a tensor of shape {layout}, every size at least 1, got {_got(tensor)}")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, got {tensor.dtype}")
    return tensor.shape


def _check_like(name, tensor, shape, first_name, first):
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} to go with {first_name}, got {_got(tensor)}")
    if tensor.dtype != first.dtype or tensor.device != first.device:
        raise ValueError(f"{name} must be {first.dtype} on {first.device} like {first_name}, "
                         f"got {tensor.dtype} on {tensor.device}")


def _check_done_and_bptt_length(done, bptt_length, shape, first_name, first):
    if not isinstance(done, torch.Tensor) or tuple(done.shape) != shape or done.dtype != torch.bool:
        raise ValueError(f"done must be a bool tensor of shape {shape}, got {_got(done)}")
    if done.device != first.device:
        raise ValueError(f"done must be on {first.device} like {first_name}, got {done.device}")
    if bptt_length is not None and bptt_length < 1:
        raise ValueError(f"bptt_length must be None or at least 1, got {bptt_length}")


def _got(argument):
    return f"{argument.dtype} {tuple(argument.shape)}" if isinstance(argument, torch.Tensor) else type(argument).__name__
