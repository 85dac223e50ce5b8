"""Times of the CNN and of the recurrent cores on this machine's GPU, forward and backward: `srwm_cuda`'s kernels beside
the same functions in PyTorch, and the LSTM script's core, whose cell is compiled there, beside the same without
torch.compile.

    python benchmarks/kernels.py

Milliseconds are medians over replays of a CUDA graph (kernels alone, without Python's overhead).
"""

import math
import pathlib
import statistics
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import impala_procgen_lstm  # noqa: E402
import srwm_cuda  # noqa: E402
from srwm_cuda import cnn  # noqa: E402
from tests.helpers import sr_delta  # noqa: E402


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

    print_times(name, T, B, D, columns, milliseconds(forward), milliseconds(lambda: both(srwm_cuda)),
                milliseconds(lambda: both(srwm_cuda.reference), repeats=5) if T <= 51 else None)


class Features(torch.nn.Module):
    """Stands where the CNN was: its features are given."""

    def __init__(self, T, B):
        super().__init__()
        self.features = torch.nn.Parameter(torch.rand(T * B, 256, device="cuda"))

    def forward(self, frames):
        return self.features


def measure_lstm(T, B):
    frames = torch.zeros(T, B, 1, device="cuda")
    reward, done = torch.randn(T, B, device="cuda"), torch.rand(T, B, device="cuda") < 0.005

    def core(compiled):
        agent = impala_procgen_lstm.Agent(impala_procgen_lstm.Args(cuda=True, bf16=True)).cuda()
        agent.encoder = Features(T, B)
        agent.cell = agent.cell if compiled else impala_procgen_lstm.lstm_cell
        state = agent.initial_state(B)

        def forward():
            with torch.no_grad():
                return agent(frames, reward, done, state)

        def both():
            logits, values, _ = agent(frames, reward, done, state)
            torch.autograd.grad(logits.sum() + values.square().sum(), list(agent.parameters()))

        return forward, both

    (forward, both), (_, plain) = core(True), core(False)
    print_times("lstm", T, B, 256, "-", milliseconds(forward), milliseconds(both), milliseconds(plain, repeats=5))


def measure_cnn(frames_at_once):
    """Forward for acting, and forward and backward, beside PyTorch's bfloat16, as it is and compiled, and beside what
    as many operations take in a large matrix product."""
    parameters = [torch.nn.Parameter(torch.randn(shape, device="cuda") / math.prod(shape[1:]) ** 0.5)
                  for shape in cnn.SHAPES]
    operations = 3 * sum(2 * 9 * i * o * w * w for (i, o), w in zip(cnn.LAYERS, [64, *[32] * 5, *[16] * 5, *[8] * 4]))
    operations -= 2 * 9 * 3 * 16 * 64 * 64  # frames need no gradient
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    a_second = 2 * 8192**3 / milliseconds(lambda: a @ b, repeats=5) * 1000

    def both(function, frames):
        features = function(frames, *parameters)
        torch.autograd.grad(features, parameters, torch.ones_like(features))

    @torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    def pytorch(frames, *parameters):
        return srwm_cuda.reference.impala_cnn(frames, *(p.to(memory_format=torch.channels_last) if p.dim() == 4 else p
                                                        for p in parameters))

    print(f"CNN: frames  fwd (ms)  f+b (ms)  PyTorch f+b  compiled f+b  floor at {a_second / 1e12:.0f} TFLOP/s")
    for N in frames_at_once:
        frames = torch.randint(0, 256, (N, 64, 64, 3), dtype=torch.uint8, device="cuda")
        with torch.no_grad():
            forward = milliseconds(lambda: srwm_cuda.impala_cnn(frames, *parameters))  # noqa: B023
        times = [milliseconds(lambda: both(function, frames)) for function in  # noqa: B023
                 (srwm_cuda.impala_cnn, pytorch, torch.compile(pytorch, dynamic=False))]
        floor = operations * N / a_second * 1000
        print(f"{N:11} {forward:9.3f} {times[0]:9.3f} {times[1]:12.3f} {times[2]:13.3f} {floor:6.3f}", flush=True)


def print_times(name, T, B, D, columns, forward, both, plain):
    sizes, times = f"{name:10} {T:5} {B:5} {D:3} {columns:>4}", f"{forward:9.3f} {both:9.3f}"
    per_step = f"{1000 * forward / T:9.2f} {1000 * both / T:9.2f}"
    print(sizes, times, per_step, f"{plain:10.2f} {plain / both:8.0f}x" if plain else "", flush=True)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print(f"{pathlib.Path(__file__).name}: error: the kernels run on a CUDA GPU, and there is none", file=sys.stderr)
        sys.exit(2)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    torch.backends.cudnn.benchmark = True
    measure_cnn((1, 96, 192, 384, 1632))
    print("function       T     B   D  Y/V  fwd (ms)  f+b (ms) fwd us/t  f+b us/t  plain (ms)   faster")
    sizes = [(51, 32, 16), (1, 192, 16), (51, 1, 16), (51, 128, 16), (51, 512, 16), (51, 32, 8), (51, 32, 32),
             (51, 32, 64), (200, 32, 16), (1000, 32, 16)]
    torch.set_float32_matmul_precision("high")
    measure_lstm(51, 32)
    measure("srwm", 51, 32, 16, 49)
    for name in ("srwm", "delta_rule", "sr_delta"):
        for T, B, D in sizes:
            measure(name, T, B, D, D)
