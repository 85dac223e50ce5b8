"""Self-referential weight matrices and the delta rule in plain PyTorch: loops over time that read like the equations.

This is what CPU runs use, and what the CUDA kernels are tested against. Any floating-point dtype; autograd gives the
gradients. The arguments are those of the functions in `srwm_cuda`, which check them and are what models should call.
"""

import functools

import torch
import torch.nn.functional as F


def _without_autocast(function):
    """The function in its arguments' dtype, wherever it is called, as the kernels are."""
    @functools.wraps(function)
    def run(first, *arguments):
        if not torch.is_autocast_enabled(first.device.type):  # as a rule: the next line takes microseconds
            return function(first, *arguments)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *arguments)

    return run


@_without_autocast
def srwm(x, W, state, done, bptt_length=None):
    """The self-referential weight matrix of Irie et al. 2022 (arXiv 2202.05780), equations 5 to 8; see `srwm_cuda.srwm`."""
    D, columns = W.shape[-2:]
    parts = (columns - 2 * D - 4, D, D, 4)  # y, q, k, beta
    W_t = W + state  # (B, H, D, Y + 2D + 4)
    ys = []
    for t in range(len(x)):
        if bptt_length and t > 0 and t % bptt_length == 0:
            W_t = W + (W_t - W).detach()
        if _may_begin_episodes(done[t]):
            W_t = torch.where(done[t, :, None, None, None], W, W_t)
        y, q, k, b = torch.einsum("bhi,bhij->bhj", x[t], W_t).split(parts, dim=-1)
        q, k = q.softmax(-1), k.softmax(-1)
        beta = torch.cat([rate.expand(*rate.shape[:-1], n) for rate, n in zip(b.sigmoid().split(1, -1), parts)], dim=-1)
        change = beta * torch.einsum("bhi,bhij->bhj", q - k, W_t)
        W_t = torch.addcmul(W_t, k[..., :, None], change[..., None, :])  # W_t + outer(k, change)
        ys.append(y)
    return torch.stack(ys), W_t - W


@_without_autocast
def delta_rule(q, k, v, beta, state, done, bptt_length=None):
    """The delta rule of Schlag, Irie and Schmidhuber 2021 (arXiv 2102.11174); see `srwm_cuda.delta_rule`."""
    outs = []
    for t in range(len(q)):
        if bptt_length and t > 0 and t % bptt_length == 0:
            state = state.detach()
        if _may_begin_episodes(done[t]):
            state = state.masked_fill(done[t, :, None, None, None], 0.0)  # F: (B, H, D, V)
        change = beta[t, ..., None] * (v[t] - torch.einsum("bhi,bhij->bhj", k[t], state))
        state = torch.addcmul(state, k[t, ..., :, None], change[..., None, :])  # state + outer(k, change)
        outs.append(torch.einsum("bhi,bhij->bhj", q[t], state))
    return torch.stack(outs), state


def impala_cnn(frames, *parameters):
    """The residual CNN of IMPALA (Espeholt et al. 2018, figure 3), in its parameters' dtype; see `srwm_cuda.impala_cnn`."""
    x = frames.permute(0, 3, 1, 2).to(parameters[0].dtype) / 255
    layers = zip(parameters[::2], parameters[1::2])
    for _ in range(3):
        x = F.max_pool2d(F.conv2d(x, *next(layers), padding=1), 3, 2, 1)
        for _ in range(2):
            hidden = F.relu(F.conv2d(F.relu(x), *next(layers), padding=1))
            x = x + F.conv2d(hidden, *next(layers), padding=1)
    return x.flatten(1)


def gradients(function, tensors, done, bptt_length, grad_outputs):
    """Of `srwm` or `delta_rule`, computed anew, with respect to all tensors; a gradient of an output may be None."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        outputs = function(*leaves, done, bptt_length)
    outputs, grad_outputs = zip(*[pair for pair in zip(outputs, grad_outputs) if pair[1] is not None])
    grads = torch.autograd.grad(outputs, leaves, grad_outputs, allow_unused=True, materialize_grads=True)
    return tuple(grad.clone(memory_format=torch.contiguous_format) for grad in grads)


def is_tracing():
    """Whether PyTorch records a graph, whose later inputs are not known yet."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _may_begin_episodes(done):
    """Whether there may be something to reset. A GPU is not asked: one would have to wait for it, and a graph cannot."""
    return done.is_cuda or is_tracing() or done.any()
