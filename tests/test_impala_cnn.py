"""IMPALA's CNN: who takes the kernels, what they refuse, and what they compute, against float64 and PyTorch's bfloat16."""

import functools
import os
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, through_a_cuda_graph
from test_agent import make_agent
from test_kernels import cache, nvrtc  # noqa: F401

import impala_procgen_srwm as script
import srwm_cuda
from srwm_cuda import cnn, kernels, reference

RNG = torch.Generator().manual_seed(0)


@functools.cache  # so that a CUDA graph need not copy them
def parameters(dtype=torch.float32, device="cpu"):
    """PyTorch's initial weights, of a fixed seed."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(inputs, outputs, 3) for inputs, outputs in cnn.LAYERS]
    return [parameter.detach().to(device, dtype) for layer in layers for parameter in layer.parameters()]


def noise(N, device="cpu"):
    return torch.randint(0, 256, (N, 64, 64, 3), dtype=torch.uint8, generator=RNG).to(device)


def engine_frames(N):
    """What six games show after some steps."""
    args, games = script.resolve_args(script.Args(cuda=False))
    envs = script.make_envs(args, games, N, seed=0)
    for _ in range(20):
        envs.observe()
        envs.act(torch.randint(0, 15, (N,), dtype=torch.int32, generator=RNG).numpy())
    return torch.from_numpy(envs.observe()[1]["rgb"].copy())


def test_the_definition_in_the_scripts_is_the_function_s():
    encoder, frames = make_agent().encoder, noise(3)
    torch.testing.assert_close(srwm_cuda.impala_cnn(frames, *encoder.cnn.parameters()), encoder.conv(frames))


@pytest.mark.parametrize("broken, message", [
    (lambda frames, ps: (frames.float(), *ps), r"frames must be a uint8 tensor of shape \(N, 64, 64, 3\)"),
    (lambda frames, ps: (frames[:, :32], *ps), "frames must be .* got torch.uint8"),
    (lambda frames, ps: (frames[:0], *ps), "frames must be .* N at least 1"),
    (lambda frames, ps: (frames[0], *ps), "frames must be"),
    (lambda frames, ps: (frames, *ps[:-1]), "parameters must be 30 tensors, .* got 29"),
    (lambda frames, ps: (frames, ps[1], *ps[1:]), r"parameters\[0\] must have shape \(16, 3, 3, 3\), got torch.float32"),
    (lambda frames, ps: (frames, *ps[:3], ps[3].double(), *ps[4:]), r"parameters\[3\] must be .* like the first"),
    (lambda frames, ps: (frames, *(p.half() for p in ps)), r"parameters\[0\] must be float32 or float64"),
    (lambda frames, ps: (frames, *ps[:2], ps[2].to("meta"), *ps[3:]), r"parameters\[2\] must be on cpu like frames, got meta"),
])
def test_wrong_arguments_are_refused_by_name(broken, message):
    with pytest.raises(ValueError, match=message):
        srwm_cuda.impala_cnn(*broken(noise(2), parameters()))


def launches(shared_memory, monkeypatch):
    """The kernels launched on a GPU whose blocks may have so many KiB of shared memory, for few frames and for many, each
    with the bytes that its blocks ask for."""
    asked, gpu = {}, types.SimpleNamespace(multi_processor_count=100, shared_memory_per_block_optin=shared_memory * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(cnn, "_launch", lambda kernel, blocks, threads, shared, *arguments: asked.update({kernel: shared}))
    for N in (gpu.multi_processor_count, gpu.multi_processor_count + 1, cnn.MANY):
        frames = torch.empty(N, 64, 64, 3, dtype=torch.uint8, device="meta")
        leaves = [parameter.to("meta") for parameter in parameters()]
        features, fragments, saved = cnn._forward(frames, leaves, True)
        cnn._backward(frames, fragments, saved, leaves, features)
    return asked


GEFORCE, A100, H100 = 99, 163, 227  # KiB


@pytest.mark.parametrize("shared_memory", [GEFORCE, A100, H100])
def test_no_block_asks_for_more_shared_memory_than_it_may_have(shared_memory, monkeypatch):
    asked = launches(shared_memory, monkeypatch)
    assert {name.split("<")[0] for name in asked} == {"pack", "section_forward", "layer_backward", "frames_backward"}
    assert max(asked.values()) <= shared_memory * 1024


def test_torch_compile_asks_once_whether_the_kernels_run(monkeypatch):
    def architecture_of(device):
        asked.append(os.listdir())  # which cannot be compiled
        return 70

    asked, gpu = [], types.SimpleNamespace(shared_memory_per_block_optin=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(kernels, "architecture_of", architecture_of)
    add = torch.compile(lambda x: x + (2 if cnn.kernels_run_on(x.device) else 1), backend="eager", fullgraph=True)
    assert add(torch.zeros(())) == add(torch.zeros(())) == 1 and len(asked) == 1


def assert_compiles(kernel, architecture):
    name, cubin = kernels.compiled("impala_cnn.cu", kernel, architecture)
    assert kernel.split("<")[0].encode() in name and cubin.startswith(b"\x7fELF")


def test_one_kernel_of_each_name_compiles(nvrtc, monkeypatch):  # noqa: F811
    for kernel in {kernel.split("<")[0]: kernel for kernel in launches(H100, monkeypatch)}.values():
        assert_compiles(kernel, 90)


@pytest.mark.slow
@pytest.mark.parametrize("architecture, shared_memory", [(80, GEFORCE), (90, H100)])
def test_every_kernel_of_the_cnn_compiles(nvrtc, architecture, shared_memory, monkeypatch):  # noqa: F811
    for kernel in launches(shared_memory, monkeypatch):
        assert_compiles(kernel, architecture)


# On a GPU.

@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    """Launches are those for a small GPU, and those for a large one if this is one."""
    buffers = 1 if request.param == "small" else 2
    if buffers > cnn._buffers("cuda"):
        pytest.skip("too little shared memory")
    monkeypatch.setattr(cnn, "_buffers", lambda device: buffers)


@functools.cache
def loss_weights(N, dtype):
    """Weights (N, 2048) of the features, exact in all dtypes."""
    return torch.randn(N, 2048, generator=torch.Generator().manual_seed(0)).bfloat16().to("cuda", dtype)


def gradients(function, frames, dtype=torch.float32, autocast=False):
    """Features, and the gradients of a weighted sum of them with respect to all parameters."""
    leaves = [parameter.detach().requires_grad_() for parameter in parameters(dtype, "cuda")]
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        features = function(frames, *leaves)
    loss = (features.to(dtype) * loss_weights(len(frames), dtype)).sum()
    return [features.detach(), *torch.autograd.grad(loss, leaves)]


def decided_alike(frames, *leaves):
    """The function in float64, with the values that the kernels computed and saved, and with their decisions: which of a window
    is its maximum, and what ReLU lets pass. What is left to differ is the arithmetic of the backward pass."""
    features = srwm_cuda.impala_cnn(frames, *(leaf.detach().float().requires_grad_() for leaf in leaves))
    node = features.grad_fn
    _, *sections = node.saved_tensors
    x, layers = frames.permute(0, 3, 1, 2).double() / 255, iter(zip(leaves[::2], leaves[1::2]))

    def conv(x):
        return F.conv2d(x, *next(layers), padding=1)

    def with_value(x, value):
        return x + (value.permute(0, 3, 1, 2).double() - x).detach()

    for section in range(3):
        _, inner, argmax = sections[3 * section : 3 * section + 3]
        before, W, places = conv(x), inner.shape[2], argmax.permute(0, 3, 1, 2).long()
        row, column = torch.arange(W, device="cuda").view(-1, 1), torch.arange(W, device="cuda")
        chosen = (2 * row - 1 + places // 3) * 2 * W + 2 * column - 1 + places % 3
        x = with_value(before.flatten(2).gather(2, chosen.flatten(2)).view(chosen.shape), inner[0])
        for block in range(2):
            hidden = inner[1 + 2 * block]
            h = with_value(conv(x * (x > 0)), hidden) * (hidden > 0).permute(0, 3, 1, 2)
            x = x + conv(h)
            if block == 0:
                x = with_value(x, inner[2])
        if section < 2:
            x = with_value(x, sections[3 * section + 3])
    return x.flatten(1) + (features.double() - x.flatten(1)).detach()


@pytest.mark.gpu
@pytest.mark.parametrize("make_frames, N", [(noise, 1), (noise, 7), (engine_frames, 30), (noise, 517)])
def test_features_and_gradients_are_those_of_float64(make_frames, N, size):
    frames = make_frames(N).cuda()
    ours = gradients(srwm_cuda.impala_cnn, frames)
    features, *_ = exact = gradients(reference.impala_cnn, frames, torch.float64)
    autocast = gradients(reference.impala_cnn, frames, autocast=True)
    assert ours[0].dtype == torch.bfloat16
    assert relative_error(ours[0], features) <= min(1e-2, 1.2 * relative_error(autocast[0], features))
    alike = gradients(decided_alike, frames, torch.float64)
    each = [relative_error(a, b) for a, b in zip(ours[1:], alike[1:])]
    assert sum(each) / len(each) <= 1e-2 and max(each) <= 3e-2  # sums of few frames nearly cancel: 1.8e-2 was seen
    errors, theirs = (sum(relative_error(a, b) for a, b in zip(those[1:], exact[1:])) for those in (ours, autocast))
    assert errors <= 1.2 * theirs  # decisions differ by chance, and with them single gradients


@pytest.mark.gpu
def test_a_frame_s_features_are_the_same_bits_in_whatever_batch_and_place(size):
    frames, ps = noise(1037, "cuda"), parameters(device="cuda")
    together = srwm_cuda.impala_cnn(frames, *ps)
    for n in (0, 1, 511, 1036):
        assert torch.equal(srwm_cuda.impala_cnn(frames[n : n + 1], *ps)[0], together[n])
    assert torch.equal(srwm_cuda.impala_cnn(frames[3:102], *ps), together[3:102])
    assert torch.equal(srwm_cuda.impala_cnn(frames.flip(0), *ps).flip(0), together)


@pytest.mark.gpu
def test_two_runs_give_the_same_bits_and_a_graph_the_same_again(size):
    frames = noise(130, "cuda")
    first = gradients(srwm_cuda.impala_cnn, frames)
    second = gradients(srwm_cuda.impala_cnn, frames)
    captured = through_a_cuda_graph(lambda: gradients(srwm_cuda.impala_cnn, frames))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, captured))


@pytest.mark.gpu
def test_an_agent_in_bf16_takes_the_kernels():
    agent = script.Agent(script.resolve_args(script.Args(cuda=True, bf16=True))[0]).cuda()
    assert "impala_cnn" in names_of_graph(agent.encoder(noise(2, "cuda"))) and agent.encoder.fused()


def names_of_graph(tensor):
    names, nodes = "", [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        names += node.name()
        nodes += [other for other, _ in node.next_functions if other is not None]
    return names
