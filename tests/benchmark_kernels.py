"""Times of `srwm_cuda`'s kernels on this machine's GPU, forward and backward, beside the same functions in plain PyTorch.

    python tests/benchmark_kernels.py

Milliseconds are medians over replays of a CUDA graph (kernels alone, without Python's overhead).
"""

import pathlib
import statistics
import sys

import torch

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


def measure(T, B, D, Y, H=8, plain=True):
    x = torch.randn(T, B, H, D, device="cuda").softmax(-1).requires_grad_()
    W = (torch.randn(H, D, Y + 2 * D + 4, device="cuda") / D**0.5).requires_grad_()
    state = torch.zeros(B, H, D, Y + 2 * D + 4, device="cuda", requires_grad=True)
    done = torch.rand(T, B, device="cuda") < 0.005
    weights = torch.randn(T, B, H, Y, device="cuda")

    def forward(srwm):
        with torch.no_grad():
            srwm(x, W, state, done)

    def both(srwm):
        torch.autograd.grad(srwm(x, W, state, done)[0], (x, W, state), weights)

    ours_forward, ours = milliseconds(lambda: forward(srwm_cuda.srwm)), milliseconds(lambda: both(srwm_cuda.srwm))
    line = f"{T:5} {B:5} {D:3} {Y:4} {ours_forward:9.3f} {ours:9.3f} {1000 * ours_forward / T:9.2f} {1000 * ours / T:9.2f}"
    if plain:
        theirs = milliseconds(lambda: both(srwm_cuda.reference.srwm), repeats=5)
        line += f" {theirs:10.2f} {theirs / ours:8.0f}x"
    print(line, flush=True)


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print("    T     B   D    Y  fwd (ms)  f+b (ms) fwd us/t  f+b us/t  plain (ms)   faster")
    for T, B, D, Y in [(51, 32, 16, 16), (51, 32, 16, 49), (1, 192, 16, 16), (51, 1, 16, 16), (51, 128, 16, 16), (51, 512, 16, 16),
                       (51, 32, 8, 8), (51, 32, 32, 32), (51, 32, 64, 64), (200, 32, 16, 16), (1000, 32, 16, 16)]:
        measure(T, B, D, Y, plain=T <= 51)
