"""Times of `srwm_cuda`'s kernels on this machine's GPU, forward and backward, beside the same functions in plain PyTorch.

    python tests/benchmark_kernels.py

Milliseconds are medians over replays of a CUDA graph (kernels alone, without Python's overhead).
"""

import pathlib
import statistics
import sys

import torch
from helpers import sr_delta

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import srwm_cuda  # noqa: E402


def milliseconds(function, repeats=20):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            function()
        times = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def srwm_arguments(T, B, D, Y, H=8):
    W = torch.randn(H, D, Y + 2 * D + 4, device="cuda") / D**0.5
    return torch.randn(T, B, H, D, device="cuda").softmax(-1), W, W.new_zeros(B, *W.shape)


def delta_rule_arguments(T, B, D, V, H=8):
    q, k = torch.randn(2, T, B, H, D, device="cuda").softmax(-1)
    v, beta = torch.randn(T, B, H, V, device="cuda"), torch.rand(T, B, H, device="cuda")
    return q.clone(), k.clone(), v, beta, v.new_zeros(B, H, D, V)


def sr_delta_arguments(T, B, D, V, H=8):
    return *srwm_arguments(T, B, D, 3 * D + 1, H), torch.zeros(B, H, D, V, device="cuda")


def measure(name, T, B, D, columns):
    run, arguments = {
        "srwm": (lambda functions, *arguments: functions.srwm(*arguments), srwm_arguments),
        "delta_rule": (lambda functions, *arguments: functions.delta_rule(*arguments), delta_rule_arguments),
        "sr_delta": (sr_delta, sr_delta_arguments),
    }[name]
    tensors = [tensor.requires_grad_() for tensor in arguments(T, B, D, columns)]
    done = torch.rand(T, B, device="cuda") < 0.005
    weights = torch.randn_like(run(srwm_cuda, *tensors, done)[0])

    def forward():
        with torch.no_grad():
            run(srwm_cuda, *tensors, done)

    def both(functions):
        torch.autograd.grad(run(functions, *tensors, done)[0], tensors, weights)

    ours_forward, ours = milliseconds(forward), milliseconds(lambda: both(srwm_cuda))
    line = f"{name:10} {T:5} {B:5} {D:3} {columns:4} {ours_forward:9.3f} {ours:9.3f} "
    line += f"{1000 * ours_forward / T:9.2f} {1000 * ours / T:9.2f}"
    if T <= 51:
        theirs = milliseconds(lambda: both(srwm_cuda.reference), repeats=5)
        line += f" {theirs:10.2f} {theirs / ours:8.0f}x"
    print(line, flush=True)


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print("function       T     B   D  Y/V  fwd (ms)  f+b (ms) fwd us/t  f+b us/t  plain (ms)   faster")
    sizes = [(51, 32, 16), (1, 192, 16), (51, 1, 16), (51, 128, 16), (51, 512, 16), (51, 32, 8), (51, 32, 32), (51, 32, 64),
             (200, 32, 16), (1000, 32, 16)]
    measure("srwm", 51, 32, 16, 49)
    for name in ("srwm", "delta_rule", "sr_delta"):
        for T, B, D in sizes:
            measure(name, T, B, D, D)
