"""Flags for which a thread or a CUDA stream waits, and which other processes set."""

import threading
import time

import pytest
import torch

import srwm_cuda


def flags(n, device="cpu"):
    return srwm_cuda.Flags(torch.zeros(n, 16, dtype=torch.int32), device)


def test_a_thread_waits_until_all_flags_have_the_value():
    some, passed = flags(3), []
    some.set(1)
    thread = threading.Thread(target=lambda: (some.wait(0), passed.append(1)))
    thread.start()
    for n in range(3):
        time.sleep(0.1)
        assert not passed
        some.memory[n, 0] = 0
    thread.join(timeout=5)
    assert passed


def test_set_sets_all_flags_and_nothing_beside_them():
    some = flags(3)
    some.set(7)
    assert some.memory[:, 0].tolist() == [7, 7, 7] and not some.memory[:, 1:].any()


@pytest.mark.parametrize("memory", [torch.zeros(3).int(), torch.zeros(3, 8).int(), torch.zeros(3, 16)])
def test_memory_of_another_shape_or_type_is_refused(memory):
    with pytest.raises(ValueError, match="memory must be an int32 tensor of shape"):
        srwm_cuda.Flags(memory, "cpu")


@pytest.mark.gpu
def test_a_cuda_graph_waits_for_flags_and_sets_them():
    """A round trip in a graph: it waits for 0, counts, and sets the flags to 1."""
    some, count = flags(3, "cuda"), torch.zeros((), device="cuda")
    assert some.on_stream
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        some.wait(0)
        count.add_(1)
        some.set(1)
    some.memory[:, 0] = 1
    with torch.cuda.stream(stream):
        for _ in range(3):
            graph.replay()
    for _ in range(3):
        for n in range(3):
            time.sleep(0.05)
            assert not stream.query()
            assert some.memory[:, 0].tolist() == [0] * n + [1] * (3 - n)
            some.memory[n, 0] = 0
        end = time.time() + 5
        while not all(some.memory[:, 0] == 1) and time.time() < end:
            time.sleep(0.001)
        assert some.memory[:, 0].tolist() == [1, 1, 1]
    stream.synchronize()
    assert count.item() == 3


@pytest.mark.gpu
def test_without_stream_memory_operations_the_caller_waits(monkeypatch):
    monkeypatch.setattr(srwm_cuda.flags, "can_wait_on_stream", lambda device: False)
    some, x = flags(2, "cuda"), torch.zeros(1 << 20, device="cuda")
    x += 1
    some.set(1)  # after what the stream was to do
    assert torch.cuda.current_stream().query() and some.memory[:, 0].tolist() == [1, 1]
