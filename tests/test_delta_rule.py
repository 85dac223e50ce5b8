"""The delta rule against its equations, written out once more in NumPy, one number at a time."""

import numpy as np
import pytest
import torch
from helpers import assert_agree, fixed_weights, gradients, sr_delta, through_a_cuda_graph

import srwm_cuda
from srwm_cuda import delta_rule


def delta_rule_numpy(q, k, v, beta, state, done):
    """Schlag, Irie and Schmidhuber 2021, for every environment, head and column on its own. Returns out, new_state."""
    T, B, H, D = q.shape
    outs, new_state = np.zeros_like(v), np.zeros_like(state)
    for b, h, j in np.ndindex(B, H, v.shape[-1]):
        column = state[b, h, :, j].copy()
        for t in range(T):
            if done[t, b]:
                column[:] = 0
            error = v[t, b, h, j] - sum(k[t, b, h, i] * column[i] for i in range(D))
            for i in range(D):
                column[i] += beta[t, b, h] * k[t, b, h, i] * error
            outs[t, b, h, j] = sum(q[t, b, h, i] * column[i] for i in range(D))
        new_state[b, h, :, j] = column
    return outs, new_state


def inputs(T, B, H, D, V, dones=0.0, dtype=torch.float64, device="cpu", seed=0, any_sign=False):
    """q and k after a softmax, beta after a sigmoid or of any sign, and episode ends with the given probability per step."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, beta, state = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (
        (T, B, H, D), (T, B, H, D), (T, B, H, V), (T, B, H), (B, H, D, V)))
    q, k, beta = (q / D**0.5, k / D**0.5, beta) if any_sign else (q.softmax(-1), k.softmax(-1), beta.sigmoid())
    done = torch.rand(T, B, generator=generator) < dones
    return *(tensor.to(device, dtype) for tensor in (q, k, v, beta, state)), done.to(device)


@pytest.mark.parametrize("V", [8, 3])
@pytest.mark.parametrize("any_sign", [False, True])
def test_plain_version_follows_the_equations(V, any_sign):
    *tensors, done = inputs(T=12, B=3, H=2, D=8, V=V, dones=0.2, any_sign=any_sign)
    assert done.any()
    out, new_state = delta_rule(*tensors, done)
    expected_out, expected_state = delta_rule_numpy(*(tensor.numpy() for tensor in tensors), done.numpy())
    np.testing.assert_allclose(out.numpy(), expected_out, rtol=0, atol=1e-12)
    np.testing.assert_allclose(new_state.numpy(), expected_state, rtol=0, atol=1e-12)


def test_plain_version_passes_gradcheck():
    *tensors, done = inputs(T=4, B=2, H=1, D=3, V=2, dones=0.3, any_sign=True)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *leaves: delta_rule(*leaves, done), leaves)


def test_the_last_output_trains_every_step_but_only_its_own_with_bptt_length_1():
    *tensors, done = inputs(T=5, B=2, H=1, D=8, V=8)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    for bptt_length in (None, 1):
        out, _ = delta_rule(*leaves, done, bptt_length)
        for grad in torch.autograd.grad((out[-1] * fixed_weights(out[-1])).sum(), leaves[1:4]):  # of k, v, beta
            trained = grad.flatten(1).abs().amax(1) > 0
            assert trained.tolist() == [bptt_length is None] * 4 + [True]


def test_bptt_length_equals_unrolls_of_that_length_with_a_detached_state():
    *tensors, done = inputs(T=7, B=2, H=2, D=8, V=8, dones=0.2)
    _, _, *grads = gradients(delta_rule, *tensors, done, bptt_length=3, weight_state=0.0)
    *leaves, state = (tensor.detach().clone().requires_grad_() for tensor in tensors)
    carried, outs = state, []
    for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
        out, carried = delta_rule(*(leaf[part] for leaf in leaves), carried, done[part])
        carried = carried.detach()
        outs.append(out)
    out = torch.cat(outs)
    for ours, expected in zip(grads, torch.autograd.grad((out * fixed_weights(out)).sum(), (*leaves, state))):
        torch.testing.assert_close(ours, expected)


def test_an_unroll_of_2T_equals_two_unrolls_of_T():
    *tensors, state, done = inputs(T=10, B=3, H=2, D=8, V=8, dones=0.15)
    out, end = delta_rule(*tensors, state, done)
    out1, middle = delta_rule(*(tensor[:5] for tensor in tensors), state, done[:5])
    out2, end2 = delta_rule(*(tensor[5:] for tensor in tensors), middle, done[5:])
    torch.testing.assert_close(torch.cat([out1, out2]), out, rtol=0, atol=1e-14)
    torch.testing.assert_close(end2, end, rtol=0, atol=1e-14)


def test_an_episode_end_forgets_everything_before_it():
    *tensors, state, done = inputs(T=8, B=2, H=2, D=8, V=8)
    done[5] = True
    out, end = delta_rule(*tensors, state, done)
    fresh_out, fresh_end = delta_rule(*(tensor[5:] for tensor in tensors), torch.zeros_like(state), torch.zeros_like(done[5:]))
    torch.testing.assert_close(out[5:], fresh_out, rtol=0, atol=0)
    torch.testing.assert_close(end, fresh_end, rtol=0, atol=0)


def valid_arguments():
    return dict(q=torch.zeros(4, 3, 2, 8), k=torch.zeros(4, 3, 2, 8), v=torch.zeros(4, 3, 2, 5), beta=torch.zeros(4, 3, 2),
                state=torch.zeros(3, 2, 8, 5), done=torch.zeros(4, 3, dtype=torch.bool))


@pytest.mark.parametrize("name, change", {
    "q": dict(q=torch.zeros(4, 3, 8)),
    "q ": dict(q=torch.zeros(4, 3, 2, 8, dtype=torch.int64)),
    "q  ": dict(q=torch.zeros(0, 3, 2, 8)),
    "k": dict(k=torch.zeros(4, 3, 2, 7)),
    "v": dict(v=torch.zeros(4, 3, 2)),
    "v ": dict(v=torch.zeros(4, 2, 2, 5)),
    "v  ": dict(v=torch.zeros(4, 3, 2, 5, dtype=torch.float64)),
    "beta": dict(beta=torch.zeros(4, 3, 2, 1)),
    "state": dict(state=torch.zeros(3, 2, 5, 8)),
    "state ": dict(state=None),
    "done": dict(done=torch.zeros(4, 3)),
    "bptt_length": dict(bptt_length=0),
}.items())
def test_errors_name_the_argument(name, change):
    delta_rule(**valid_arguments())
    with pytest.raises(ValueError, match=rf"^{name.strip()}\b"):
        delta_rule(**(valid_arguments() | change))


@pytest.mark.gpu
@pytest.mark.parametrize("T, B, H, D, V, dones, tolerance", [
    (51, 32, 8, 16, 16, 0.0, 1e-4), (51, 32, 8, 16, 16, 0.05, 1e-4), (51, 32, 8, 16, 16, 1.0, 1e-4),
    (1000, 4, 2, 16, 16, 0.0, 1e-3), (1000, 4, 2, 16, 16, 0.005, 1e-3),
    (51, 5, 3, 8, 8, 0.05, 1e-4), (51, 5, 3, 32, 32, 0.05, 1e-4), (51, 5, 3, 64, 64, 0.05, 1e-4),
    (51, 5, 3, 8, 1, 0.05, 1e-4), (51, 5, 3, 16, 33, 0.05, 1e-4), (51, 5, 3, 64, 7, 0.05, 1e-4), (9, 2, 2, 8, 512, 0.2, 1e-4),
    (9, 2, 2, 32, 300, 0.2, 1e-4), (9, 2, 2, 64, 400, 0.2, 1e-4), (1, 1, 1, 16, 1, 1.0, 1e-4), (2, 700, 8, 16, 16, 0.5, 1e-4),
])
def test_kernels_agree_with_the_plain_version_in_float64(T, B, H, D, V, dones, tolerance):
    exact = gradients(delta_rule, *inputs(T, B, H, D, V, dones))
    ours = gradients(delta_rule, *inputs(T, B, H, D, V, dones, dtype=torch.float32, device="cuda"))
    assert_agree(ours, exact, tolerance)


@pytest.mark.gpu
def test_kernels_take_rates_and_keys_of_any_sign():
    exact = gradients(delta_rule, *inputs(20, 4, 3, 16, 16, 0.05, any_sign=True))
    ours = gradients(delta_rule, *inputs(20, 4, 3, 16, 16, 0.05, torch.float32, "cuda", any_sign=True))
    assert_agree(ours, exact, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("bptt_length", [1, 7, 51])
def test_kernels_cut_gradients_at_bptt_length(bptt_length):
    exact = gradients(delta_rule, *inputs(51, 4, 3, 16, 16, 0.05), bptt_length=bptt_length)
    ours = gradients(delta_rule, *inputs(51, 4, 3, 16, 16, 0.05, torch.float32, "cuda"), bptt_length=bptt_length)
    assert_agree(ours, exact, 1e-4)


@pytest.mark.gpu
def test_kernels_agree_when_a_self_referential_matrix_programs_the_memory():
    def run(dtype, device):
        generator = torch.Generator().manual_seed(0)
        x, W, srwm_state, state = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (
            (51, 4, 2, 16), (2, 16, 85), (4, 2, 16, 85), (4, 2, 16, 16)))
        done = torch.rand(51, 4, generator=generator) < 0.05
        tensors = (tensor.to(device, dtype) for tensor in (x.softmax(-1), W / 4, 0.1 * srwm_state, state))
        return gradients(lambda *arguments: sr_delta(srwm_cuda, *arguments), *tensors, done.to(device))

    assert_agree(run(torch.float32, "cuda"), run(torch.float64, "cpu"), 1e-4)


@pytest.mark.gpu
def test_kernels_give_the_same_bits_twice():
    first, second = (gradients(delta_rule, *inputs(51, 32, 8, 16, 16, 0.05, torch.float32, "cuda")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.gpu
def test_kernels_can_be_captured_into_a_cuda_graph():
    arguments = inputs(51, 8, 8, 16, 16, 0.05, torch.float32, "cuda")
    eager = gradients(delta_rule, *arguments)
    captured = through_a_cuda_graph(lambda: gradients(delta_rule, *arguments))
    assert all(torch.equal(a, b) for a, b in zip(captured, eager))


@pytest.mark.gpu
@pytest.mark.parametrize("name, change", {
    "q": dict(q=torch.zeros(4, 3, 2, 7), k=torch.zeros(4, 3, 2, 7), state=torch.zeros(3, 2, 7, 5)),
    "v": dict(v=torch.zeros(4, 3, 2, 513), state=torch.zeros(3, 2, 8, 513)),
}.items())
def test_errors_on_cuda_name_the_argument(name, change):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        delta_rule(**{key: value.cuda() for key, value in (valid_arguments() | change).items()})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["k", "v", "beta", "state", "done"])
def test_tensors_on_another_device_are_errors_that_name_the_argument(name):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        delta_rule(**{key: value if key == name else value.cuda() for key, value in valid_arguments().items()})
