"""CUDA streams and graphs, in the words that a training loop needs. Until CUDA is used, nobody waits."""

import math
import time

import numpy as np
import torch


class _Moment(torch.cpu.Event):
    """An event on a CPU, where nothing is queued."""

    def record(self):
        self.time = time.monotonic()

    def elapsed_time(self, later):
        return 1e3 * (later.time - self.time)


def record_event():
    """An event on the calling thread's CUDA stream, waiting for which takes no core. `begin.elapsed_time(end)`, in ms, is the
    time between two that have happened."""
    event = torch.cuda.Event(enable_timing=True, blocking=True) if torch.cuda.is_initialized() else _Moment()
    event.record()
    return event


class Reports:
    """What a device computes, round after round, in a row of numbers each. They are read later than they are asked for, so
    that the device has work meanwhile.

    Attributes:
        idle_and_all: two sums of seconds over the rounds that have been read: between rounds, and in all.
    """

    def __init__(self):
        self.queued, self.ended, self.idle_and_all = [], None, np.zeros(2)

    def add(self, names, row, begun):
        """Asks for the numbers of a round, a tensor (n,) that is computed by then, and that began at the event `begun`."""
        self.queued.append((names, row.to("cpu", non_blocking=True), begun, record_event()))

    def read(self, left):
        """For each round but the last `left`: a dict of the numbers, and whether all are finite. Waits for them, asleep."""
        while len(self.queued) > left:
            names, row, begun, ended = self.queued.pop(0)
            ended.synchronize()
            passed = [(self.ended or begun).elapsed_time(until) / 1e3 for until in (begun, ended)]
            self.idle_and_all = self.idle_and_all + passed  # another array, since whoever has read the old one keeps it
            self.ended, numbers = ended, dict(zip(names, row.tolist()))
            yield numbers, all(map(math.isfinite, numbers.values()))


def synchronize():
    """Waits for the calling thread's CUDA stream, if there is one."""
    record_event().synchronize()


def capture(function, stream, generator=None, memory=None):
    """Captures a function without arguments, whose results are what it writes, into a CUDA graph. Returns a function that
    replays it. Graphs that are replayed one after another can share a pool of memory.

    Args:
        stream: on which it is captured.
        generator: of the random numbers that the function draws, if any; a replay draws the next ones.
        memory: of torch.cuda.graph_pool_handle().
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, memory, stream):  # which first waits for the GPU
        function()
    return graph.replay


def compile(function):
    """torch.compile for fixed shapes; what does not compile runs as it is, with a warning."""
    torch._dynamo.config.suppress_errors = True
    return torch.compile(function, dynamic=False)
