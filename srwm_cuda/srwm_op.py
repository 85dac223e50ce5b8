"""The operator torch.ops.srwm_cuda.srwm: how its kernels are launched, and what graphs know of them."""

import functools

import torch

from . import kernels, operators, reference
from .kernels import MAX_COLUMNS, Launch, round_up

AHEAD, ROWS_IN_REGISTERS = (kernels.constant("srwm.cu", name) for name in ("AHEAD", "ROWS_IN_REGISTERS"))


@functools.cache
def launches(D, columns):
    """Forward and backward. PARTS threads share a column's D rows; the fewer threads a block may have, the more
    registers each of them gets."""
    parts = 2 if D > 32 else 1
    forward = Launch("srwm.cu", f"srwm_forward_kernel<{D}, {parts}>", round_up(columns * parts, 32))
    parts, fewer = (4, 2) if D > 32 else (D // 8, (D // 8 + 1) // 2)
    most = MAX_COLUMNS * fewer
    variants = [(parts, 800 if D > 16 else 512), (fewer, 768 if D > 32 else most), (fewer, most)]
    parts, max_threads = next(variant for variant in variants if columns * variant[0] <= variant[1])
    rows, threads = D // parts, round_up(columns * parts, 32)
    floats = 2 * round_up(threads // 32, 4) * 4 * D + AHEAD * round_up(D + 2 * columns + 1, 4)  # sums, and slots
    floats += rows * max_threads if rows > ROWS_IN_REGISTERS else 0  # W
    kernel = f"srwm_backward_kernel<Variant<{D}, {parts}, {max_threads}>>"
    return forward, Launch("srwm.cu", kernel, threads, 4 * floats)


# What the kernels save for the backward pass, if it is to come: q, k and beta of all steps, d = (q - k) W, and the
# first step of each step's episode. If it comes without, as in a graph that was recorded under no_grad or on a CPU, it
# begins with a forward pass.
torch.library.define(
    "srwm_cuda::srwm", "(Tensor x, Tensor W, Tensor state, Tensor done, int bptt_length, bool training)"
    " -> (Tensor y, Tensor new_state, Tensor qkb, Tensor d, Tensor episode)")
torch.library.define(
    "srwm_cuda::srwm_backward", "(Tensor x, Tensor W, Tensor state, Tensor done, Tensor new_state, Tensor qkb,"
    " Tensor d, Tensor episode, Tensor? grad_y, Tensor? grad_new_state, int bptt_length)"
    " -> (Tensor grad_x, Tensor grad_W, Tensor grad_state)")


@torch.library.register_fake("srwm_cuda::srwm")
def _outputs(x, W, state, done, bptt_length, training):
    (T, B, H, D), columns = x.shape, W.shape[-1]
    qkb, d, episode = [(T, B, H, 2 * D + 4), (T, B, H, columns), (T, B)] if training else [0, 0, 0]
    return (x.new_empty(T, B, H, columns - 2 * D - 4), state.new_empty(state.shape), x.new_empty(qkb), x.new_empty(d),
            done.new_empty(episode, dtype=torch.int32))


def _forward(x, W, state, done, bptt_length, training):
    (T, B, H, D), columns = x.shape, W.shape[-1]
    y, new_state, *saved = _outputs(x, W, state, done, bptt_length, training)
    if kernels.take(launches, x, columns, training):
        forward, _ = launches(D, columns)
        forward(B * H, (T, B, H, y.shape[-1], columns, 0), x.contiguous(), W.contiguous(), state.contiguous(),
                done.contiguous(), y, new_state, *(saved if training else [None] * 3))
    else:
        y, new_state = (each.contiguous() for each in reference.srwm(x, W, state, done, bptt_length))
        saved = [each.zero_() for each in saved]
    return y, new_state, *saved


@torch.library.register_fake("srwm_cuda::srwm_backward")
def _gradients(x, W, state, *others):
    return x.new_empty(x.shape), W.new_empty(W.shape), state.new_empty(state.shape)


def _backward(x, W, state, done, new_state, qkb, d, episode, grad_y, grad_new_state, bptt_length):
    (T, B, H, D), columns = x.shape, W.shape[-1]
    if not kernels.take(launches, x, columns, True):
        return reference.gradients(reference.srwm, (x, W, state), done, bptt_length, (grad_y, grad_new_state))
    if not len(qkb):
        _, _, qkb, d, episode = _forward(x, W, state, done, bptt_length, True)
    Y = columns - 2 * D - 4
    grad_y = x.new_zeros(T, B, H, Y) if grad_y is None else grad_y.contiguous()
    grad_new_state = None if grad_new_state is None else grad_new_state.contiguous()  # None, as in training: zeros
    grad_x, grad_W, grad_state = x.new_empty(x.shape), state.new_empty(state.shape), state.new_empty(state.shape)
    _, backward = launches(D, columns)
    backward(B * H, (T, B, H, Y, columns, bptt_length), x.contiguous(), W.contiguous(), state.contiguous(),
             new_state, qkb, d, episode, grad_y, grad_new_state, grad_x, grad_W, grad_state)
    return grad_x, grad_W.sum(0), grad_state  # each environment its own part of grad_W: no atomics


operators.register("srwm", _forward, _backward, first_saved=1)
