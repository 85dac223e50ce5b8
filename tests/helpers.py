"""What the tests of both kernels share."""

import torch


def sr_delta(functions, x, W, srwm_state, state, done, bptt_length=None):
    """The recurrence of an SR-Delta layer, with the functions of `srwm_cuda` or of `srwm_cuda.reference`."""
    y, _ = functions.srwm(x, W, srwm_state, done, bptt_length)
    q, k, v, b = y.split([x.shape[-1]] * 3 + [1], dim=-1)
    return functions.delta_rule(q.softmax(-1), k.softmax(-1), v, b.sigmoid().squeeze(-1), state, done, bptt_length)


def fixed_weights(out):
    """Numbers in [-1, 1] without a pattern, the same on every device."""
    return torch.arange(out.numel(), dtype=torch.float64, device=out.device).cos().view(out.shape).to(out.dtype)


def gradients(function, *arguments, bptt_length=None, weight_state=1.0):
    """Outputs, and the gradients of a weighted sum of both with respect to all arguments but the last, `done`."""
    *tensors, done = arguments
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out, new_state = function(*leaves, done, bptt_length)
    loss = (out * fixed_weights(out)).sum() + weight_state * (new_state * fixed_weights(new_state)).sum()
    return [out.detach(), new_state.detach(), *torch.autograd.grad(loss, leaves)]


def relative_error(ours, exact):
    return ((ours.double().cpu() - exact.double().cpu()).norm() / exact.double().cpu().norm()).item()


def assert_agree(ours, exact, tolerance):
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        if b.abs().max() > 0:
            assert relative_error(a, b) < tolerance, i
        else:
            assert a.abs().max() == 0, i


def through_a_cuda_graph(function):
    """What the function returns, computed by the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = function()
    for result in results:
        result.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return results
