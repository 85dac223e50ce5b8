"""The SRWM agent: its size, its equations, its state."""

import pytest
import torch

import impala_procgen_srwm as script


def make_agent(**changes):
    torch.manual_seed(0)
    return script.Agent(script.Args(cuda=False, bf16=False, **changes))


def time_steps(T, B, dones=0.1):
    generator = torch.Generator().manual_seed(0)
    obs = torch.randint(0, 256, (T, B, 64, 64, 3), dtype=torch.uint8, generator=generator)
    return obs, torch.randn(T, B, generator=generator), torch.rand(T, B, generator=generator) < dones


def test_the_paper_s_agent_has_967248_parameters():
    assert sum(parameter.numel() for parameter in make_agent().parameters()) == 967_248


def test_initial_matrices_have_standard_deviation_one_over_root_d():
    W = make_agent(num_layers=1, hidden_size=1024, num_head=64).layers[0].W
    assert W.shape == (64, 16, 52)
    assert W.std().item() == pytest.approx(16**-0.5, rel=0.02)
    assert W.mean().item() == pytest.approx(0, abs=0.005)


def test_a_layer_is_its_input_plus_the_projected_outputs_of_the_heads():
    layer = make_agent(hidden_size=16, num_head=2).layers[0]
    h, done = torch.randn(3, 4, 16), torch.zeros(3, 4, dtype=torch.bool)
    out, state = layer(h, torch.zeros(4, 2, 8, 28), done)
    y = torch.cat([torch.softmax(h[0, :, 8 * i : 8 * i + 8], -1) @ layer.W[i, :, :8] for i in range(2)], -1)
    torch.testing.assert_close(out[0], h[0] + y @ layer.out.weight.T)
    assert state.shape == (4, 2, 8, 28) and state.abs().amax((1, 2, 3)).min() > 0


def test_shapes_are_those_of_the_interface():
    agent = make_agent()
    logits, value, state = agent(*time_steps(3, 2), agent.initial_state(2))
    assert logits.shape == (3, 2, 15) and value.shape == (3, 2)
    assert [part.shape for part in state] == [part.shape for part in agent.initial_state(2)] == [(2, 8, 16, 52)] * 2
    assert all(part.abs().max() == 0 for part in agent.initial_state(2))


def test_an_unroll_of_2t_equals_two_unrolls_of_t():
    agent, (obs, reward, done) = make_agent(), time_steps(8, 2)
    logits, value, state = agent(obs, reward, done, agent.initial_state(2))
    first = agent(obs[:4], reward[:4], done[:4], agent.initial_state(2))
    second = agent(obs[4:], reward[4:], done[4:], first[2])
    torch.testing.assert_close(torch.cat([first[0], second[0]]), logits)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), value)
    torch.testing.assert_close(second[2], state)


def test_an_episode_end_resets_the_state():
    agent, (obs, reward, done) = make_agent(), time_steps(4, 2, dones=0.0)
    used = agent(obs, reward, done, agent.initial_state(2))[2]
    done[0] = True
    torch.testing.assert_close(agent(obs, reward, done, used)[0], agent(obs, reward, done, agent.initial_state(2))[0])


def test_the_reward_that_the_agent_sees_is_clamped():
    agent, (obs, reward, done) = make_agent(), time_steps(1, 2)
    seven, one = (agent(obs, torch.full_like(reward, r), done, agent.initial_state(2))[0] for r in (7.0, 1.0))
    torch.testing.assert_close(seven, one)


def test_every_parameter_gets_a_gradient():
    agent = make_agent()
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
