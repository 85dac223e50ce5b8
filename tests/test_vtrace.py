"""V-trace against its definition (Espeholt et al. 2018, equation 1), written as the double sum that it is."""

import numpy as np
import torch

from impala_procgen_srwm import vtrace


def vtrace_numpy(log_rhos, discounts, rewards, values, bootstrap_value):
    T, B = values.shape
    rho = c = np.minimum(np.exp(log_rhos), 1.0)
    next_values = np.concatenate([values[1:], bootstrap_value[None]])
    delta = rho * (rewards + discounts * next_values - values)
    vs = values.copy()
    for b in range(B):
        for s in range(T):
            for t in range(s, T):
                vs[s, b] += np.prod(discounts[s:t, b]) * np.prod(c[s:t, b]) * delta[t, b]
    next_vs = np.concatenate([vs[1:], bootstrap_value[None]])
    return vs, rho * (rewards + discounts * next_vs - values)


def test_vtrace_follows_its_definition():
    rng = np.random.default_rng(0)
    log_rhos, rewards, values = rng.normal(size=(3, 12, 5))
    discounts = 0.9 * (rng.random((12, 5)) > 0.2)  # 0 where an episode ends
    arguments = log_rhos, discounts, rewards, values, rng.normal(size=5)
    expected = vtrace_numpy(*arguments)
    for ours, exact in zip(vtrace(*map(torch.from_numpy, arguments)), expected):
        np.testing.assert_allclose(ours.numpy(), exact, atol=1e-12)


def test_on_policy_vtrace_is_the_n_step_return():
    rewards, values, zeros = torch.tensor([[1.0], [2.0], [3.0]]), torch.randn(3, 1), torch.zeros(3, 1)
    vs, advantages = vtrace(zeros, zeros + 0.5, rewards, values, torch.tensor([8.0]))
    torch.testing.assert_close(vs, torch.tensor([[1 + 1 + 0.75 + 1], [2 + 1.5 + 2], [3 + 4.0]]))
    torch.testing.assert_close(advantages, vs - values)


def test_nothing_flows_back_over_an_episode_end():
    rewards, values, discounts = torch.zeros(3, 1), torch.zeros(3, 1), torch.tensor([[0.9], [0.0], [0.9]])
    vs, _ = vtrace(torch.zeros(3, 1), discounts, rewards, values, torch.tensor([100.0]))
    torch.testing.assert_close(vs, torch.tensor([[0.0], [0.0], [90.0]]))
