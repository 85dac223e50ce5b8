"""The self-referential weight matrix against its equations, written out once more in NumPy, one number at a time."""

import numpy as np
import pytest
import torch
from helpers import assert_agree, fixed_weights, gradients, through_a_cuda_graph

from srwm_cuda import srwm


def srwm_numpy(x, W, state, done):
    """Irie et al. 2022, equations 5 to 8, for every environment and head on its own, in float64. Returns y, new_state."""
    T, B, H, D = x.shape
    columns = W.shape[-1]
    Y = columns - 2 * D - 4
    groups = {"y": range(Y), "q": range(Y, Y + D), "k": range(Y + D, Y + 2 * D), "beta": range(Y + 2 * D, columns)}
    ys, new_state = np.zeros((T, B, H, Y)), np.zeros_like(state)
    for b in range(B):
        for h in range(H):
            current = W[h] + state[b, h]
            for t in range(T):
                if done[t, b]:
                    current = W[h].copy()
                out = x[t, b, h] @ current
                ys[t, b, h] = out[groups["y"]]
                q, k = (np.exp(out[groups[name]]) / np.exp(out[groups[name]]).sum() for name in "qk")
                beta = 1 / (1 + np.exp(-out[groups["beta"]]))
                change = q @ current - k @ current
                for rate, columns_of_group in zip(beta, groups.values()):
                    for j in columns_of_group:
                        current[:, j] += rate * change[j] * k
            new_state[b, h] = current - W[h]
    return ys, new_state


def inputs(T, B, H, D, Y, dones=0.0, dtype=torch.float64, device="cpu", seed=0):
    """x after its softmax, W ~ N(0, 1/sqrt(D)), a small state, and episode ends with the given probability per step."""
    generator = torch.Generator().manual_seed(seed)
    columns = Y + 2 * D + 4
    x = torch.randn(T, B, H, D, generator=generator, dtype=torch.float64).softmax(-1)
    W = torch.randn(H, D, columns, generator=generator, dtype=torch.float64) / D**0.5
    state = 0.1 * torch.randn(B, H, D, columns, generator=generator, dtype=torch.float64)
    done = torch.rand(T, B, generator=generator) < dones
    return *(tensor.to(device, dtype) for tensor in (x, W, state)), done.to(device)


@pytest.mark.parametrize("Y", [8, 25, 3])
def test_plain_version_follows_the_equations(Y):
    x, W, state, done = inputs(T=12, B=3, H=2, D=8, Y=Y, dones=0.2)
    assert done.any()
    y, new_state = srwm(x, W, state, done)
    expected_y, expected_state = srwm_numpy(x.numpy(), W.numpy(), state.numpy(), done.numpy())
    np.testing.assert_allclose(y.numpy(), expected_y, rtol=0, atol=1e-12)
    np.testing.assert_allclose(new_state.numpy(), expected_state, rtol=0, atol=1e-12)


def test_plain_version_passes_gradcheck():
    x, W, state, done = inputs(T=4, B=2, H=1, D=3, Y=3, dones=0.3)
    leaves = [tensor.requires_grad_() for tensor in (x, W, state)]
    assert torch.autograd.gradcheck(lambda *leaves: srwm(*leaves, done), leaves)


def test_q_k_and_beta_are_trained_through_time_but_not_with_bptt_length_1():
    x, W, state, done = inputs(T=6, B=2, H=2, D=8, Y=8)
    through_time = gradients(srwm, x, W, state, done, weight_state=0.0)[3]
    one_step = gradients(srwm, x, W, state, done, bptt_length=1, weight_state=0.0)[3]
    assert through_time[..., 8:].abs().amax((0, 1)).min() > 0  # every column of q, k and beta
    assert one_step[..., 8:].abs().max() == 0 and one_step[..., :8].abs().max() > 0


def test_bptt_length_equals_unrolls_of_that_length_with_a_detached_state():
    x, W, state, done = inputs(T=7, B=2, H=2, D=8, Y=8, dones=0.2)
    *_, grad_x, grad_W, grad_state = gradients(srwm, x, W, state, done, bptt_length=3, weight_state=0.0)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, W, state)]
    carried, ys = leaves[2], []
    for begin in (0, 3, 6):
        y, carried = srwm(leaves[0][begin : begin + 3], leaves[1], carried, done[begin : begin + 3])
        carried = carried.detach()
        ys.append(y)
    y = torch.cat(ys)
    for ours, expected in zip((grad_x, grad_W, grad_state), torch.autograd.grad((y * fixed_weights(y)).sum(), leaves)):
        torch.testing.assert_close(ours, expected)


def test_an_unroll_of_2T_equals_two_unrolls_of_T():
    x, W, state, done = inputs(T=10, B=3, H=2, D=8, Y=8, dones=0.15)
    y, end = srwm(x, W, state, done)
    y1, middle = srwm(x[:5], W, state, done[:5])
    y2, end2 = srwm(x[5:], W, middle, done[5:])
    torch.testing.assert_close(torch.cat([y1, y2]), y, rtol=0, atol=1e-14)
    torch.testing.assert_close(end2, end, rtol=0, atol=1e-14)


def test_an_episode_end_forgets_everything_before_it():
    x, W, state, done = inputs(T=8, B=2, H=2, D=8, Y=8)
    done[5] = True
    y, end = srwm(x, W, state, done)
    fresh_y, fresh_end = srwm(x[5:], W, torch.zeros_like(state), torch.zeros_like(done[5:]))
    torch.testing.assert_close(y[5:], fresh_y, rtol=0, atol=0)
    torch.testing.assert_close(end, fresh_end, rtol=0, atol=0)


@pytest.mark.parametrize("name, change", {
    "x": dict(x=torch.zeros(4, 2, 8)),
    "W": dict(W=torch.zeros(2, 8, 20)),
    "W ": dict(W=torch.zeros(3, 8, 28)),
    "W  ": dict(W=torch.zeros(2, 8, 28, dtype=torch.float64)),
    "state": dict(state=torch.zeros(4, 2, 8, 28)),
    "done": dict(done=torch.zeros(4, 3)),
    "bptt_length": dict(bptt_length=0),
    "x ": dict(x=torch.zeros(4, 3, 2, 8, dtype=torch.int64)),
}.items())
def test_errors_name_the_argument(name, change):
    arguments = dict(x=torch.zeros(4, 3, 2, 8), W=torch.zeros(2, 8, 28), state=torch.zeros(3, 2, 8, 28),
                     done=torch.zeros(4, 3, dtype=torch.bool), bptt_length=None)
    srwm(**arguments)
    with pytest.raises(ValueError, match=rf"^{name.strip()}\b"):
        srwm(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.parametrize("T, B, H, D, Y, dones, tolerance", [
    (51, 32, 8, 16, 16, 0.0, 1e-4), (51, 32, 8, 16, 16, 0.05, 1e-4), (51, 32, 8, 16, 49, 0.05, 1e-4),
    (1000, 4, 2, 16, 16, 0.0, 1e-3), (1000, 4, 2, 16, 16, 0.005, 1e-3), (1000, 4, 2, 16, 49, 0.005, 1e-3),
    (51, 5, 3, 8, 8, 0.05, 1e-4), (51, 5, 3, 32, 32, 0.05, 1e-4), (51, 5, 3, 64, 64, 0.05, 1e-4),
    (51, 5, 3, 64, 193, 0.05, 1e-4), (51, 5, 3, 32, 97, 0.05, 1e-4), (1, 1, 1, 16, 1, 1.0, 1e-4),
    (9, 3, 2, 16, 7, 1.0, 1e-4), (2, 700, 8, 16, 16, 0.5, 1e-4), (51, 5, 3, 8, 400, 0.05, 1e-4),
])
def test_kernels_agree_with_the_plain_version_in_float64(T, B, H, D, Y, dones, tolerance):
    exact = gradients(srwm, *inputs(T, B, H, D, Y, dones))
    ours = gradients(srwm, *inputs(T, B, H, D, Y, dones, dtype=torch.float32, device="cuda"))
    assert_agree(ours, exact, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("bptt_length", [1, 7, 51])
def test_kernels_cut_gradients_at_bptt_length(bptt_length):
    exact = gradients(srwm, *inputs(51, 4, 3, 16, 16, 0.05), bptt_length=bptt_length)
    ours = gradients(srwm, *inputs(51, 4, 3, 16, 16, 0.05, torch.float32, "cuda"), bptt_length=bptt_length)
    assert_agree(ours, exact, 1e-4)


@pytest.mark.gpu
def test_kernels_give_the_same_bits_twice():
    first, second = (gradients(srwm, *inputs(51, 32, 8, 16, 16, 0.05, torch.float32, "cuda")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.gpu
def test_kernels_can_be_captured_into_a_cuda_graph():
    arguments = inputs(51, 8, 8, 16, 16, 0.05, torch.float32, "cuda")
    eager = gradients(srwm, *arguments)
    captured = through_a_cuda_graph(lambda: gradients(srwm, *arguments))
    assert all(torch.equal(a, b) for a, b in zip(captured, eager))


@pytest.mark.gpu
@pytest.mark.parametrize("name, change", {
    "x": dict(x=torch.zeros(4, 3, 2, 7), W=torch.zeros(2, 7, 28), state=torch.zeros(3, 2, 7, 28)),
    "W": dict(W=torch.zeros(2, 8, 600), state=torch.zeros(3, 2, 8, 600)),
    "done": dict(done=torch.zeros(4, 3, dtype=torch.bool)),
}.items())
def test_errors_on_cuda_name_the_argument(name, change):
    arguments = dict(x=torch.zeros(4, 3, 2, 8), W=torch.zeros(2, 8, 28), state=torch.zeros(3, 2, 8, 28),
                     done=torch.zeros(4, 3, dtype=torch.bool)) | change
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        srwm(**{key: value if key == "done" == name else value.cuda() for key, value in arguments.items()})
