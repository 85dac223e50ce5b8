"""The agents of all six scripts: their size, their equations, their state."""

import importlib

import pytest
import torch
import torch.nn.functional as F

import srwm_cuda

PARAMETERS = {"ff": 626_272, "lstm": 1_153_616, "delta": 1_054_800, "srwm": 967_248, "fake_sr": 958_032, "sr_delta": 975_696}
STATE = {"ff": [], "lstm": [(256,)] * 2, "delta": [(8, 16, 16)] * 2, "srwm": [(8, 16, 52)] * 2, "fake_sr": [],
         "sr_delta": [(8, 16, 101)] * 2}
RECURRENT = ["lstm", "delta", "srwm", "sr_delta"]


def load(name):
    return importlib.import_module(f"impala_procgen_{name}")


def make_agent(name="srwm", **changes):
    torch.manual_seed(0)
    return load(name).Agent(load(name).Args(cuda=False, bf16=False, **changes))


def time_steps(T, B, dones=0.1):
    generator = torch.Generator().manual_seed(0)
    obs = torch.randint(0, 256, (T, B, 64, 64, 3), dtype=torch.uint8, generator=generator)
    return obs, torch.randn(T, B, generator=generator), torch.rand(T, B, generator=generator) < dones


@pytest.mark.parametrize("name", PARAMETERS)
def test_agents_have_as_many_parameters_as_the_paper_s(name):
    assert sum(parameter.numel() for parameter in make_agent(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_are_those_of_the_interface(name):
    agent = make_agent(name)
    logits, value, state = agent(*time_steps(3, 2), agent.initial_state(2))
    assert logits.shape == (3, 2, 15) and value.shape == (3, 2)
    assert [part.shape[1:] for part in state] == [part.shape[1:] for part in agent.initial_state(2)] == STATE[name]
    assert all(len(part) == 2 and part.abs().max() == 0 for part in agent.initial_state(2))


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_unroll_of_2t_equals_two_unrolls_of_t(name):
    agent, (obs, reward, done) = make_agent(name), time_steps(8, 2)
    assert done[1:].any()
    logits, value, state = agent(obs, reward, done, agent.initial_state(2))
    first = agent(obs[:4], reward[:4], done[:4], agent.initial_state(2))
    second = agent(obs[4:], reward[4:], done[4:], first[2])
    torch.testing.assert_close(torch.cat([first[0], second[0]]), logits)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), value)
    torch.testing.assert_close(second[2], state)


@pytest.mark.parametrize("name", RECURRENT)
def test_the_state_matters_until_an_episode_ends(name):
    agent, (obs, reward, done) = make_agent(name), time_steps(4, 2, dones=0.0)
    reward[0] = 0  # as an episode begins
    used = agent(obs, reward, done, agent.initial_state(2))[2]
    fresh = agent(obs, reward, done, agent.initial_state(2))[0]
    assert not torch.allclose(agent(obs, reward, done, used)[0], fresh)
    done[0] = True
    torch.testing.assert_close(agent(obs, reward, done, used)[0], fresh)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_reward_that_an_agent_sees_is_clamped(name):
    agent, (obs, reward, done) = make_agent(name), time_steps(1, 2)
    seven, one, none = (agent(obs, torch.full_like(reward, r), done, agent.initial_state(2))[0] for r in (7.0, 1.0, 0.0))
    torch.testing.assert_close(seven, one)
    assert not torch.allclose(one, none)


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_gets_a_gradient(name):
    agent = make_agent(name)
    logits, value, _ = agent(*time_steps(5, 2), agent.initial_state(2))
    (logits.square().sum() + value.square().sum()).backward()
    assert [name for name, parameter in agent.named_parameters() if not parameter.grad.abs().max() > 0] == []


def test_bf16_changes_the_features_only_a_little():
    agent = make_agent()
    frames = time_steps(4, 2)[0].flatten(0, 1)
    exact = agent.encoder(frames)
    agent.encoder.dtype = torch.bfloat16
    assert ((agent.encoder(frames) - exact).norm() / exact.norm()).item() < 0.02


def test_pieces_of_a_large_batch_give_the_same_features():
    encoder, frames = make_agent().encoder, time_steps(1, 300)[0][0]
    torch.testing.assert_close(encoder(frames), torch.cat([encoder(frames[:100]), encoder(frames[100:])]))


# The layers against their equations, head by head and step by step, in float64. Here T = 4, B = 3, two heads of size 8.

T, B, H, D = 4, 3, 2, 8


def make_layer(name, kind):
    torch.manual_seed(0)
    script = load(name)
    return getattr(script, kind)(script.Args(hidden_size=H * D, num_head=H)).double()


def layer_inputs():
    generator = torch.Generator().manual_seed(0)
    done = torch.zeros(T, B, dtype=torch.bool)
    done[2, 1] = True
    return torch.randn(T, B, H * D, generator=generator, dtype=torch.float64), done


def heads(vector):
    return [vector[..., D * h : D * h + D] for h in range(H)]


@pytest.mark.parametrize("name, kind, columns", [("srwm", "SRWM", 52), ("sr_delta", "SRDelta", 85), ("fake_sr", "FakeSR", 16)])
def test_initial_matrices_have_standard_deviation_one_over_root_d(name, kind, columns):
    torch.manual_seed(0)
    W = getattr(load(name), kind)(load(name).Args(hidden_size=1024, num_head=64)).W
    assert W.shape == (64, 16, columns)
    assert W.std().item() == pytest.approx(16**-0.5, rel=0.02) and W.mean().item() == pytest.approx(0, abs=0.005)


def self_referential(x, W, state, b, h, t, done):
    """One step for one environment and head: y, and W changes in place."""
    if done[t, b]:
        state[b, h] = 0
    now = W[h] + state[b, h]
    out = x @ now
    Y = W.shape[-1] - 2 * D - 4
    q, k, beta = out[Y : Y + D].softmax(0), out[Y + D : Y + 2 * D].softmax(0), out[Y + 2 * D :].sigmoid()
    rates = torch.repeat_interleave(beta, torch.tensor([Y, D, D, 4]))
    state[b, h] += torch.outer(k, rates * ((q - k) @ now))
    return out[:Y]


def write(memory, q, k, v, rate):
    memory += rate * torch.outer(k, v - k @ memory)
    return q @ memory


@torch.no_grad()
def test_the_srwm_layer_follows_its_equations():
    layer, (hs, done) = make_layer("srwm", "SRWM"), layer_inputs()
    out, state = layer(hs, layer.initial_state(B), done)
    expected_state = torch.zeros_like(state)
    for t in range(T):
        for b in range(B):
            ys = [self_referential(x.softmax(0), layer.W, expected_state, b, h, t, done) for h, x in enumerate(heads(hs[t, b]))]
            torch.testing.assert_close(out[t, b], hs[t, b] + layer.out.weight @ torch.cat(ys))
    torch.testing.assert_close(state, expected_state)


@torch.no_grad()
def test_the_sr_delta_layer_follows_its_equations():
    layer, (hs, done) = make_layer("sr_delta", "SRDelta"), layer_inputs()
    out, state = layer(hs, layer.initial_state(B), done)
    change, memory = torch.zeros_like(state[..., :-D]), torch.zeros_like(state[..., -D:])
    for t in range(T):
        for b in range(B):
            ys = []
            for h, x in enumerate(heads(hs[t, b])):
                if done[t, b]:
                    memory[b, h] = 0
                y = self_referential(x.softmax(0), layer.W, change, b, h, t, done)
                q, k, v, rate = y[:D].softmax(0), y[D : 2 * D].softmax(0), y[2 * D : 3 * D], y[3 * D].sigmoid()
                ys.append(write(memory[b, h], q, k, v, rate))
            torch.testing.assert_close(out[t, b], hs[t, b] + layer.out.weight @ torch.cat(ys))
    torch.testing.assert_close(state, torch.cat([change, memory], -1))


@torch.no_grad()
def test_the_delta_net_layer_follows_its_equations():
    layer, (hs, done) = make_layer("delta", "DeltaNet"), layer_inputs()
    layer.norm.weight.uniform_(0.5, 2)
    out, state = layer(hs, layer.initial_state(B), done)
    memory = torch.zeros_like(state)
    for t in range(T):
        for b in range(B):
            normalized = F.layer_norm(hs[t, b], (H * D,), layer.norm.weight, layer.norm.bias)
            ys = []
            for h, z in enumerate((layer.slow.weight @ normalized).chunk(H)):
                if done[t, b]:
                    memory[b, h] = 0
                q, k = (F.elu(part) + 1 for part in (z[:D], z[D : 2 * D]))
                q, k = q / (q.sum() + 1e-5), k / (k.sum() + 1e-5)
                ys.append(write(memory[b, h], q, k, z[2 * D : 3 * D], z[3 * D].sigmoid()))
            torch.testing.assert_close(out[t, b], hs[t, b] + layer.out.weight @ torch.cat(ys))
    torch.testing.assert_close(state, memory)


@torch.no_grad()
def test_the_fake_sr_layer_follows_its_equations():
    layer, (hs, _) = make_layer("fake_sr", "FakeSR"), layer_inputs()
    ys = torch.cat([x @ layer.W[h] for h, x in enumerate(heads(hs))], -1)
    torch.testing.assert_close(layer(hs), hs + ys @ layer.out.weight.T)


@torch.no_grad()
def test_the_lstm_is_pytorch_s_lstm_restarted_where_an_episode_ends():
    agent, (obs, reward, done) = make_agent("lstm"), time_steps(6, 2, dones=0.0)
    done[3, 1], reward[3, 1] = True, 0
    lstm = torch.nn.LSTM(257, 256)
    for name, layer in (("ih", agent.input), ("hh", agent.recurrent)):
        getattr(lstm, f"weight_{name}_l0").copy_(layer.weight)
        getattr(lstm, f"bias_{name}_l0").copy_(layer.bias)
    features = agent.encoder(obs.flatten(0, 1)).unflatten(0, (6, 2))
    x = torch.cat([features, reward.clamp(-1, 1).unsqueeze(-1)], -1)
    for b, pieces in ((0, [slice(0, 6)]), (1, [slice(0, 3), slice(3, 6)])):
        h = torch.cat([lstm(x[piece, b])[0] for piece in pieces])
        torch.testing.assert_close(agent(obs, reward, done, agent.initial_state(2))[0][:, b], agent.policy(h))


@pytest.mark.gpu
@pytest.mark.parametrize("name", PARAMETERS)
def test_agents_compute_on_the_gpu_what_they_compute_on_the_cpu(name):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    agent, steps = make_agent(name), time_steps(6, 3)
    results = []
    for device in ("cpu", "cuda"):
        agent.to(device).zero_grad()
        logits, value, state = agent(*(x.to(device) for x in steps), agent.initial_state(3))
        (logits.square().sum() + value.square().sum()).backward()
        gradients = [parameter.grad.cpu().clone() for parameter in agent.parameters()]
        results.append([logits.cpu(), value.cpu(), *(part.cpu() for part in state), *gradients])
    for ours, exact in zip(*reversed(results)):
        assert ((ours - exact).norm() / (exact.norm() + 1e-12)).item() < 1e-3


def test_head_sizes_without_a_kernel_are_refused_on_a_gpu_only():
    assert 6 not in srwm_cuda.KERNEL_HEAD_SIZES
    for name in ("srwm", "delta", "sr_delta"):
        make_agent(name, hidden_size=12, num_head=2)
        with pytest.raises(ValueError, match="must be one of"):
            load(name).Agent(load(name).Args(cuda=True, bf16=False, hidden_size=12, num_head=2))
