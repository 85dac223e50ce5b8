"""Self-referential weight matrices, the delta rule and IMPALA's CNN for PyTorch: fused CUDA kernels, and plain PyTorch.

    y, new_state = srwm_cuda.srwm(x, W, state, done)
    out, new_state = srwm_cuda.delta_rule(q, k, v, beta, state, done)
    features = srwm_cuda.impala_cnn(frames, *parameters)

CUDA tensors of float32 take the kernels. `srwm_cuda.kernels` compiles them at first use, in seconds, with the compiler that
comes with PyTorch; if that fails, a warning says why. All other tensors take `srwm_cuda.reference`, which reads like the
equations. To what records a graph, such as torch.compile and torch.export, each function is an operator, torch.ops.srwm_cuda,
with the kernels behind it; docs/srwm_cuda.md shows it in a model.
"""

import collections
import hashlib
import pathlib

import torch
import torch.utils.hooks

from . import cnn, delta_rule_op, kernels, reference, srwm_op
from .cnn import is_impala_cnn
from .flags import Flags
from .graphs import Reports, capture, compile, record_event, synchronize
from .kernels import KERNEL_HEAD_SIZES, MAX_COLUMNS
from .weights import Weights, acting_logits, prepare_optimizer, reset_diverged, try_both_modes

__all__ = ["Flags", "Reports", "Weights", "acting_logits", "capture", "check_heads", "compile", "delta_rule", "impala_cnn",
           "is_impala_cnn", "prepare_optimizer", "record_event", "reference", "register_forward_hook", "reset_diverged",
           "srwm", "synchronize", "try_both_modes"]

_SOURCES = sorted(path for path in pathlib.Path(__file__).parent.iterdir() if path.suffix in (".py", ".cu", ".cuh"))
SHA256 = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()  # by which a run tells versions apart


def check_heads(hidden_size, num_head, cuda):
    """Raises ValueError, in terms of a script's arguments, for heads whose size is no number, or one without kernels."""
    if hidden_size % num_head:
        raise ValueError(f"--num-head must divide --hidden-size {hidden_size}, got {num_head}")
    if cuda and hidden_size // num_head not in KERNEL_HEAD_SIZES:
        raise ValueError(f"--hidden-size / --num-head must be one of {KERNEL_HEAD_SIZES} on a GPU, "
                         f"got {hidden_size} / {num_head}")


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
    _check_kernel_sizes("x", x, "W", columns)
    training = _is_training(x, W, state)
    if reference.is_tracing() or kernels.take(srwm_op.launches, x, columns, training):
        y, new_state, *_ = torch.ops.srwm_cuda.srwm(x, W, state, done, bptt_length or 0, training)
    else:
        y, new_state = reference.srwm(x, W, state, done, bptt_length)
    for hook in _hooks.values():
        hook(x, W, state, done, y, new_state)
    return y, new_state


_hooks = collections.OrderedDict()  # by their handles


def register_forward_hook(hook):
    """Lets hook(x, W, state, done, y, new_state) be called after each call of srwm, with its arguments and results.

    Returns:
        A handle, as of a module's forward hooks: `remove()` ends it, and so does the end of a `with` block.
    """
    handle = torch.utils.hooks.RemovableHandle(_hooks)
    _hooks[handle.id] = hook
    return handle


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
    _check_kernel_sizes("q", q, "v", V)
    training = _is_training(q, k, v, beta, state)
    if reference.is_tracing() or kernels.take(delta_rule_op.launches, q, V, training):
        return torch.ops.srwm_cuda.delta_rule(q, k, v, beta, state, done, bptt_length or 0, training)[:2]
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
        return torch.ops.srwm_cuda.impala_cnn(frames, parameters, _is_training(*parameters))[0]
    return reference.impala_cnn(frames, *parameters)


def _is_training(*tensors):
    """Whether the kernels are to save what the backward pass needs."""
    return tensors[0].is_cuda and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


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


def _check_kernel_sizes(first_name, first, wide_name, columns):
    D = first.shape[-1]
    if first.is_cuda and D not in KERNEL_HEAD_SIZES:
        raise ValueError(f"{first_name}: on CUDA, the head size D must be one of {KERNEL_HEAD_SIZES}, got {D}")
    if first.is_cuda and columns > MAX_COLUMNS:
        raise ValueError(f"{wide_name}: on CUDA, at most {MAX_COLUMNS} columns, got {columns}")


def _got(argument):
    return f"{argument.dtype} {tuple(argument.shape)}" if isinstance(argument, torch.Tensor) else type(argument).__name__
