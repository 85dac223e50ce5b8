"""`srwm` and `delta_rule` in graphs: what torch.compile, torch.export and torch.jit.trace record holds for all inputs.

A graph is recorded from inputs without an episode's end, then given some, and compared with the model without a graph.
"""

import re
from pathlib import Path

import pytest
import torch
from helpers import assert_agree, fixed_weights, sr_delta, through_a_cuda_graph
from test_agent import make_agent

import srwm_cuda
from srwm_cuda import reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
H, D = 2, 8


class Model(torch.nn.Module):
    """An SR-Delta layer: a self-referential matrix programs a delta-rule memory."""

    def __init__(self, functions=srwm_cuda):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.W = torch.nn.Parameter(torch.randn(H, D, 5 * D + 5, generator=generator) / D**0.5)
        self.functions = functions

    def forward(self, x, state, memory, done):
        return sr_delta(self.functions, x.softmax(-1), self.W, state, memory, done)


def inputs(T, B, dones, device):
    generator = torch.Generator().manual_seed(T)
    tensors = (torch.randn(size, generator=generator) for size in ((T, B, H, D), (B, H, D, 5 * D + 5), (B, H, D, D)))
    return *(0.5 * tensor.to(device) for tensor in tensors), (torch.rand(T, B, generator=generator) < dones).to(device)


def results(model, x, state, memory, done, autocast=False):
    """Outputs of the model, and the gradients of its weights and inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, state, memory)]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        out, new_memory = model(*leaves, done)
    loss = (out * fixed_weights(out)).sum() + (new_memory * fixed_weights(new_memory)).sum()
    return [out.detach(), new_memory.detach(), *torch.autograd.grad(loss, [*model.parameters(), *leaves])]


def exported(model, arguments, **options):
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    shapes = {0: T, 1: B}, {0: B}, {0: B}, {0: T, 1: B}
    return torch.export.export(model, arguments, dynamic_shapes=shapes, **options).module()


def exported_without_gradients(model, arguments):
    with torch.no_grad():
        return exported(model, arguments)


RECORD = {
    "torch.compile": lambda model, arguments: torch.compile(model, fullgraph=True, backend="aot_eager"),
    "torch.export": exported,
    "torch.export, strict": lambda model, arguments: exported(model, arguments, strict=True),
    "torch.export, no_grad": exported_without_gradients,
    "torch.jit.trace": lambda model, arguments: torch.jit.trace(  # on a GPU, its check sees another graph without gradients
        model, arguments, check_trace=not arguments[0].is_cuda),
}


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", RECORD)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_graph_resets_the_state_where_an_episode_ends_and_has_the_same_gradients(way, device):
    model, ends = Model().to(device), inputs(6, 3, 0.3, device)
    graph = RECORD[way](model, inputs(6, 3, 0.0, device))
    results(graph, *inputs(6, 3, 0.0, device))
    assert ends[-1].any()
    for ours, expected in zip(results(graph, *ends), results(model, *ends), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_graph_of_the_plain_version_resets_the_state_too():
    model, ends = Model(reference), inputs(6, 3, 0.3, "cpu")
    graph = torch.jit.trace(model, inputs(6, 3, 0.0, "cpu"))
    assert all(torch.equal(ours, expected) for ours, expected in zip(results(graph, *ends), results(model, *ends)))


@pytest.mark.parametrize("name", ["srwm", "delta", "lstm"])
def test_an_exported_agent_forgets_what_it_did_in_the_episode_before(name):
    agent, obs, reward = make_agent(name), torch.zeros(2, 3, 64, 64, 3, dtype=torch.uint8), torch.zeros(2, 3)
    state = torch.utils._pytree.tree_map(torch.randn_like, agent.initial_state(3))
    going_on, begun = torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    graph = torch.export.export(agent, (obs, reward, going_on, state)).module()
    logits, *_ = agent(obs, reward, begun, state)
    assert torch.equal(graph(obs, reward, begun, state)[0], logits)
    assert not torch.equal(agent(obs, reward, going_on, state)[0], logits)


@pytest.mark.parametrize("device", DEVICES)
def test_an_exported_model_takes_unrolls_and_batches_of_other_sizes(device):
    model = Model().to(device)
    graph, others = exported(model, inputs(6, 3, 0.0, device)), inputs(9, 5, 0.3, device)
    assert all(torch.equal(ours, expected) for ours, expected in zip(results(graph, *others), results(model, *others)))


def operators(training):
    """Both operators, with arguments that require gradients."""
    x, state, memory, done = inputs(4, 3, 0.3, "cpu")
    W, keys, beta = Model().W, x.softmax(-1), torch.rand(4, 3, H)
    yield torch.ops.srwm_cuda.srwm.default, (x.requires_grad_(), W, state, done, 2, training)
    memory.requires_grad_()
    yield torch.ops.srwm_cuda.delta_rule.default, (x, keys, keys.exp(), beta, memory, done, 2, training)


@pytest.mark.parametrize("training", [False, True])
def test_the_operators_are_what_pytorch_asks_of_one(training):
    for operator, arguments in operators(training):
        torch.library.opcheck(operator, arguments)


def test_a_second_derivative_of_an_operator_is_refused():
    for operator, arguments in operators(False):
        gradient, = torch.autograd.grad(operator(*arguments)[0].square().sum(), arguments[0], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.sum().backward()


def test_autocast_changes_nothing():
    model, arguments = Model(), inputs(6, 3, 0.3, "cpu")
    expected = results(model, *arguments)
    for each in (model, exported(model, arguments)):
        ours = results(each, *arguments, autocast=True)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected))


@pytest.mark.parametrize("device", DEVICES)
def test_the_code_on_their_page_trains_q_k_and_beta_and_exports_what_it_trained(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    page, names = (Path(__file__).parent.parent / "docs/srwm_cuda.md").read_text(), {}
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(code, names)
    layer, h, state, done = (names[name] for name in ("layer", "h", "state", "done"))
    assert h.device.type == device and layer.W.grad.abs().amax((0, 1)).min() > 0  # of every column
    for ours, expected in zip((names["out"], names["new_state"]), layer(h[:1], state, done[:1])):
        assert torch.equal(ours, expected)


@pytest.mark.gpu
def test_inductor_s_graph_with_the_kernels_in_it_agrees():
    model, ends = Model().cuda(), inputs(51, 32, 0.05, "cuda")
    graph = torch.compile(model, fullgraph=True)
    results(graph, *inputs(51, 32, 0.0, "cuda"))
    assert_agree(results(graph, *ends), results(model, *ends), 1e-3)


@pytest.mark.gpu
def test_a_model_that_was_exported_on_a_cpu_takes_the_kernels_on_a_gpu():
    graph, model, ends = exported(Model(), inputs(6, 3, 0.0, "cpu")).cuda(), Model().cuda(), inputs(6, 3, 0.3, "cuda")
    assert all(torch.equal(ours, expected) for ours, expected in zip(results(graph, *ends), results(model, *ends)))


@pytest.mark.gpu
def test_a_recorded_graph_can_be_captured_into_a_cuda_graph():
    model, ends = Model().cuda(), inputs(6, 3, 0.3, "cuda")
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    captured = through_a_cuda_graph(lambda: results(graph, *ends))
    assert all(torch.equal(ours, expected) for ours, expected in zip(captured, results(model, *ends)))


@pytest.mark.gpu
def test_an_operator_without_a_kernel_computes_what_pytorch_s_version_does():
    model, ends = Model().double().cuda(), [*inputs(6, 3, 0.3, "cuda")]
    ends[:3] = (tensor.double() for tensor in ends[:3])
    graph = exported(model, tuple(ends))
    for ours, expected in zip(results(graph, *ends), results(Model(reference).double().cuda(), *ends)):
        torch.testing.assert_close(ours, expected)
