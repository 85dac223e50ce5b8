"""Self-referential weight matrices and the delta rule for PyTorch: fused CUDA kernels, and the same in plain PyTorch.

    y, new_state = srwm_cuda.srwm(x, W, state, done)
    out, new_state = srwm_cuda.delta_rule(q, k, v, beta, state, done)

CUDA tensors of float32 take the kernels, which `srwm_cuda.kernels` compiles at first use, in seconds, with nothing but what
PyTorch brings along; if that fails, a warning says why. All others take `srwm_cuda.reference`, a loop over time that reads like
the equations.
"""

import functools
import math
import warnings
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import kernels, reference

__all__ = ["delta_rule", "impala_cnn", "reference", "srwm"]

KERNEL_HEAD_SIZES = (8, 16, 32, 64)
MAX_COLUMNS, LANES = 512, 4  # as in common.cuh: columns of a matrix, and threads that sum over those of one row together


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
        ValueError: a shape, dtype or device that is none of the above; on CUDA also a head size D other than 8, 16, 32, 64,
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
        q, k: (T, B, H, D), queries and keys at T steps of B environments, for H heads of size D; the caller normalises them.
        v: (T, B, H, V), values.
        beta: (T, B, H), rates, of any size; the caller squashes them.
        state: (B, H, D, V), the memory F before the first step.
        done: (T, B) bool; True: a new episode begins at t, and the state is zeroed before step t.
        bptt_length: the state is detached every so many steps; None: gradients flow through the whole unroll.

    Returns:
        out: (T, B, H, V), and new_state, like state. Both are differentiable with respect to q, k, v, beta and state.

    Raises:
        ValueError: a shape, dtype or device that is none of the above; on CUDA also a head size D other than 8, 16, 32, 64,
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
        parameters: on a GPU from compute capability 8.0, bfloat16, computed by the kernels from operands in bfloat16 with sums
        in float32; elsewhere what `reference.impala_cnn` makes of it.

    Raises:
        ValueError: a shape, dtype or device that is none of the above.

    The kernels are deterministic, run on PyTorch's current stream and can be captured into a CUDA graph. What they compute of a
    frame does not depend on the others of its batch.
    """
    if not isinstance(frames, torch.Tensor) or frames.shape[1:] != (64, 64, 3) or frames.dtype != torch.uint8 or not len(frames):
        raise ValueError(f"frames must be a uint8 tensor of shape (N, 64, 64, 3), N at least 1, got {_got(frames)}")
    if len(parameters) != len(CNN_SHAPES):
        raise ValueError(f"parameters must be {len(CNN_SHAPES)} tensors, weight and bias of each layer, got {len(parameters)}")
    for i, (parameter, shape) in enumerate(zip(parameters, CNN_SHAPES)):
        name = f"parameters[{i}]"
        if not isinstance(parameter, torch.Tensor) or tuple(parameter.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {_got(parameter)}")
        if parameter.dtype != parameters[0].dtype or parameter.device != frames.device:
            raise ValueError(f"{name} must be {parameters[0].dtype} on {frames.device}, got {parameter.dtype} on {parameter.device}")
    return _ImpalaCNN.apply(frames, torch.is_grad_enabled(), *parameters)


def is_impala_cnn(module):
    """Whether a module computes what `impala_cnn` does with the module's parameters, tried on two images."""
    parameters = [parameter.detach() for parameter in module.parameters()]
    if [tuple(parameter.shape) for parameter in parameters] != CNN_SHAPES:
        return False
    frames = (torch.arange(2 * 64 * 64 * 3) % 251).to(torch.uint8).view(2, 64, 64, 3)
    expected = reference.impala_cnn(frames, *parameters)
    with torch.no_grad():
        features = module(frames.permute(0, 3, 1, 2) / 255).flatten(1)
    return features.shape == expected.shape and torch.allclose(features, expected, rtol=1e-3, atol=1e-3)


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


CNN_LAYERS = [(3, 16), *[(16, 16)] * 4, (16, 32), *[(32, 32)] * 9]  # channels of each convolution's input and output
CNN_SHAPES = [shape for inputs, outputs in CNN_LAYERS for shape in ((outputs, inputs, 3, 3), (outputs,))]
CNN_FRAGMENTS = 2 * sum(9 * 32 * inputs * outputs // 256 if inputs > 3 else 96 for inputs, outputs in CNN_LAYERS)  # as in pack()


class _ImpalaCNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, frames, grad_enabled, *parameters):
        frames, N, x = frames.contiguous(), len(frames), frames
        flat = torch.cat([parameter.flatten() for parameter in parameters])
        fragments = flat.new_empty(CNN_FRAGMENTS, 4)
        _launch_cnn("pack", _round_up(CNN_FRAGMENTS, 256) // 256, 256, 0, flat, fragments)
        tensors = [frames, fragments]
        for section, (W, C) in enumerate(((32, 16), (16, 32), (8, 32))):
            output, saved, argmax = frames.new_empty(N, W, W, C, dtype=torch.bfloat16), None, None
            if grad_enabled and any(ctx.needs_input_grad):
                saved, argmax = output.new_empty(4, N, W, W, C), frames.new_empty(N, W, W, C)
            at_once = (1, 2, 4)[section] if N > 512 else (1, 1, 2)[section]
            first = ((66 * 68 * 4, 18 * 64 * 16), (34 * 34 * 16, 10 * 32 * 32), (2 * 18 * 18 * 32, 2 * 18 * 16 * 32))[section]
            images = at_once * (W + 2) ** 2 * C
            shared = 2 * (images + max(images + 9 * C * C, sum(first)))
            _launch_cnn(f"section_forward<{section}, {at_once}>", -(-N // at_once), 256, shared,
                        N, x, flat, fragments, output, saved, argmax)
            tensors += [x, saved, argmax]
            x = output
        ctx.save_for_backward(*tensors)
        return x.permute(0, 3, 1, 2).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        frames, fragments, *sections = ctx.saved_tensors
        N, blocks = len(frames), torch.cuda.get_device_properties(frames.device).multi_processor_count
        numbers = [math.prod(shape) for shape in CNN_SHAPES]
        partial = frames.new_empty(blocks, sum(numbers), dtype=torch.float32)
        gradient = gradient.unflatten(1, (32, 8, 8)).permute(0, 2, 3, 1).contiguous()

        def layer_backward(kind, layer, frames_at_once, gradient, argmax, input, skipping=None):
            inputs, outputs = CNN_LAYERS[layer]
            W = input.shape[1]
            grad_input, pooled = torch.empty_like(input), kind == "POOLED"
            images = frames_at_once * (W + 2) ** 2 * ((1 if pooled else 2) * outputs + 2 * inputs)
            shared = 2 * images + frames_at_once * W * W * (pooled * 3 * outputs // 4 + (kind == "FIRST") * 4 * inputs)
            _launch_cnn(f"layer_backward<{W}, {inputs}, {outputs}, {kind}, {frames_at_once}>", blocks, 512, shared,
                        N, layer, gradient, argmax, input, skipping, fragments, grad_input, partial)
            return grad_input

        for section in (2, 1, 0):
            x, saved, argmax = sections[3 * section : 3 * section + 3]
            x0, h1, x1, h2 = saved
            layer, at_once = 5 * section, (1, 2, 4)[section]
            for first, input, hidden in ((layer + 3, x1, h2), (layer + 1, x0, h1)):
                inner = layer_backward("SECOND", first + 1, at_once, gradient, None, hidden)
                gradient = layer_backward("FIRST", first, at_once, inner, None, input, gradient)
            if section > 0:
                gradient = layer_backward("POOLED", layer, section, gradient, argmax, x)
        of_frames = partial.new_empty(3 * blocks, sum(numbers[:2]))
        _launch_cnn("frames_backward", len(of_frames), 256, 2 * (2 * 18 * 68 * 4 + 16 * 64 * 16), N, frames, gradient, argmax, of_frames)
        sums = torch.cat([of_frames.sum(0), partial[:, of_frames.shape[1] :].sum(0)]).split(numbers)
        return None, None, *(part.view(shape) for part, shape in zip(sums, CNN_SHAPES))


def _launch_cnn(kernel, blocks, threads, shared_bytes, *arguments):
    kernels.launch("impala_cnn.cu", kernel, (blocks, 1, 1), (threads, 1, 1), shared_bytes, *arguments)


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
    """Forward and backward. PARTS threads share a column's D rows; the fewer threads at most, the more registers has each."""
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
    """Whether the kernels of these launches run. On CUDA, sizes that they never take are errors: of the head size D,
    which the first argument ends in, and of the columns of the matrix, which another one does."""
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
    """The shape of a function's first tensor, and of others that bring a size of their own."""
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
