"""The operator torch.ops.srwm_cuda.delta_rule: how its kernels are launched, and what graphs know of them."""

import functools

import torch

from . import kernels, operators, reference
from .kernels import LANES, Launch, round_up


@functools.cache
def launches(D, V):
    """Forward and backward, whose rows in shared memory are padded to an odd multiple of what LANES threads read at
    once."""
    forward = Launch("delta_rule.cu", f"delta_rule_forward_kernel<{D}>", round_up(max(V, 2 * D), 32))
    width = 4 * LANES
    floats = 4 * D + (6 + 2 * D) * (round_up(V - width, 2 * width) + width)
    threads = round_up(max(V, D * LANES + 32), 32)
    return forward, Launch("delta_rule.cu", f"delta_rule_backward_kernel<{D}>", threads, 4 * floats)


# What the kernels save, as in srwm_op.py: e = v - k F, and the first step of each step's episode.
torch.library.define(
    "srwm_cuda::delta_rule", "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor state, Tensor done, int bptt_length,"
    " bool training) -> (Tensor out, Tensor new_state, Tensor e, Tensor episode)")
torch.library.define(
    "srwm_cuda::delta_rule_backward", "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor state, Tensor done, Tensor e,"
    " Tensor episode, Tensor? grad_out, Tensor? grad_new_state, int bptt_length)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_beta, Tensor grad_state)")


@torch.library.register_fake("srwm_cuda::delta_rule")
def _outputs(q, k, v, beta, state, done, bptt_length, training):
    return (v.new_empty(v.shape), state.new_empty(state.shape), v.new_empty(v.shape if training else 0),
            done.new_empty(done.shape if training else 0, dtype=torch.int32))


def _forward(q, k, v, beta, state, done, bptt_length, training):
    (T, B, H, D), V = q.shape, v.shape[-1]
    tensors = q, k, v, beta, state, done
    out, new_state, *saved = _outputs(*tensors, bptt_length, training)
    if kernels.take(launches, q, V, training):
        forward, _ = launches(D, V)
        forward(B * H, (T, B, H, V, 0), *(tensor.contiguous() for tensor in tensors), out, new_state,
                *(saved if training else [None] * 2))
    else:
        out, new_state = (each.contiguous() for each in reference.delta_rule(*tensors, bptt_length))
        saved = [each.zero_() for each in saved]
    return out, new_state, *saved


@torch.library.register_fake("srwm_cuda::delta_rule_backward")
def _gradients(*tensors):
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors[:5])


def _backward(q, k, v, beta, state, done, e, episode, grad_out, grad_new_state, bptt_length):
    (T, B, H, D), V = q.shape, v.shape[-1]
    tensors = q, k, v, beta, state
    if not kernels.take(launches, q, V, True):
        return reference.gradients(reference.delta_rule, tensors, done, bptt_length, (grad_out, grad_new_state))
    if not len(e):
        _, _, e, episode = _forward(*tensors, done, bptt_length, True)
    grad_out = torch.zeros_like(e) if grad_out is None else grad_out.contiguous()
    grad_new_state = state.new_zeros(state.shape) if grad_new_state is None else grad_new_state.contiguous()
    grads = _gradients(*tensors)
    _, backward = launches(D, V)
    backward(B * H, (T, B, H, V, bptt_length), q.contiguous(), k.contiguous(), beta.contiguous(), state.contiguous(), e,
             episode, grad_out, grad_new_state, *grads)
    return grads


operators.register("delta_rule", _forward, _backward, first_saved=2)
