"""CUDA streams and graphs, in the words that a training loop needs. Until CUDA is used, nobody waits."""

import torch


def record_event():
    """An event on the calling thread's CUDA stream, waiting for which takes no core."""
    event = torch.cuda.Event(blocking=True) if torch.cuda.is_initialized() else torch.cpu.Event()
    event.record()
    return event


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
