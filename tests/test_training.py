"""Training on the real engine: a few updates, the log, checkpoints, resuming, signals, errors."""

import contextlib
import importlib
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import first_fast
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import impala_procgen_srwm as script
import srwm_cuda
from housekeeping import checkpoints
from housekeeping.episodes import each_has_ended

ROOT = Path(__file__).parent.parent


def read(run):
    return checkpoints.load_checkpoint(run / "checkpoint.pt", "impala_procgen_srwm.py")


def log(run):
    accumulator = EventAccumulator(str(run))
    accumulator.Reload()
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def parts(args, games=("maze", "leaper"), script=script):
    """An actor and a learner of the same weights, an empty unroll, and the episodes that the actor records."""
    torch.manual_seed(0)
    agent = script.Agent(args).to("cuda" if args.cuda else "cpu")
    episodes = script.Episodes(games)
    learner = script.Learner(agent, args)
    (actor,) = pool_of(learner, args, episodes, script).actors
    return actor, learner, script.Unroll(agent, args.unroll_length, args.num_envs), episodes


def pool_of(learner, args, episodes, script=script):
    engine = script.Engine(script.make_envs, args, episodes.games, seed=1, frame_shape=script.FRAME_SHAPE)
    return script.ActorPool(args, episodes, learner.weights, engine, seed=1, stop=script.Stop(), num_unrolls=2)


def play(actor, unroll, unrolls=1):
    """Lets the actor play, on this thread."""
    with torch.cuda.stream(actor.stream):
        for _ in range(unrolls):
            actor.play(unroll)


def update(learner, learning_rate):
    """An update, its statistics, and whether they and the gradient are finite."""
    learner.update(learning_rate)
    ((statistics, finite),) = learner.reports.read(0)
    return statistics, finite


ARGS = dict(cuda=False, bf16=False, num_actors=1, num_envs=6, num_servers=1, unroll_length=20, batch_size=4)


@pytest.mark.parametrize("carry_state", [True, False])
def test_the_learner_sees_what_the_actor_saw(carry_state):
    """Frames, rewards, dones, states and logits of an unroll belong together: the same weights give the same logits."""
    actor, learner, unroll, _ = parts(script.Args(carry_state=carry_state, **ARGS))
    play(actor, unroll, unrolls=3)
    assert all((part.abs().max() > 0) == carry_state for part in unroll.state)
    with torch.no_grad():
        logits, _, _ = learner.agent(unroll.obs, unroll.reward, unroll.done, unroll.state)
    torch.testing.assert_close(logits[:-1], unroll.logits, atol=1e-4, rtol=1e-4)


def test_an_unroll_begins_with_the_time_step_that_ended_the_one_before():
    actor, _, unroll, _ = parts(script.Args(**ARGS))
    second = script.Unroll(actor.agent, 20, 6)
    play(actor, unroll)
    play(actor, second)
    for name in ("obs", "reward", "done"):
        assert torch.equal(getattr(second, name)[0], getattr(unroll, name)[-1])
    assert not torch.equal(second.obs[0], unroll.obs[0]) and torch.equal(unroll.done[0], torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize("cuda", [False, pytest.param(True, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("length", first_fast(20, 5, 3))  # a part has five steps: the next unroll is begun, or all of it
def test_an_unroll_that_is_begun_ahead_is_the_same(length, cuda):
    """So are returns; and what is handed on is not written to by what is begun."""
    args = script.Args(**ARGS | dict(unroll_length=length, cuda=cuda))
    kinds = ("obs", "reward", "done", "action", "logits", "version", "of_games")
    unrolls, recorded, others = [], [], queue.Queue()
    others.put("another free one")
    for ahead in (False, True):
        with torch.cuda.stream(torch.cuda.Stream() if cuda else None):  # the learner captures its update on it
            actor, _, unroll, episodes = parts(args, ["starpilot", "fruitbot"])
            srwm_cuda.synchronize()
        actor.captured, number = True, 100 // length
        with torch.cuda.stream(actor.stream):
            for n in range(number):
                actor.play(unroll, others if ahead and n % 3 > 0 and n < number - 1 else None)
                unrolls += [[getattr(unroll, kind).clone() for kind in kinds] + [x.clone() for x in unroll.state]]
            srwm_cuda.synchronize()
        recorded.append((episodes.saved(), actor.totals.tolist()))
    half = len(unrolls) // 2
    assert all(torch.equal(x, y) for pair in zip(unrolls[:half], unrolls[half:]) for x, y in zip(*pair))
    assert recorded[0] == recorded[1] and all(recorded[0][0].values())


@pytest.mark.parametrize("games", first_fast(["starpilot", "fruitbot"], ["fruitbot", "starpilot", "fruitbot", "fruitbot"]))
def test_unrolls_and_recorded_episodes_are_those_of_the_engine(games):
    """The same seed and actions on an engine of our own give the same frames, rewards and episode starts, in the same places;
    and the same returns, lengths and games, of which one may have several environments."""
    args = script.Args(**ARGS | dict(num_envs=4, unroll_length=250))  # episodes of these games are short
    actor, _, unroll, episodes = parts(args, games)
    play(actor, unroll)
    envs = script.make_envs(args, games, 4, seed=1)
    expected, returns, lengths = {game: [] for game in games}, np.zeros(4), np.zeros(4, dtype=int)
    for t in range(251):
        reward, obs, done = envs.observe()
        assert (unroll.obs[t].numpy() == obs["rgb"]).all() and (unroll.reward[t].numpy() == reward).all()
        assert (unroll.done[t].numpy() == done).all()
        returns, lengths = returns + reward, lengths + (t > 0)
        for n in np.flatnonzero(done) if t > 0 else ():
            expected[games[n % len(games)]].append((returns[n], lengths[n]))
            returns[n] = lengths[n] = 0
        if t < 250:
            envs.act(unroll.action[t].int().numpy())
    assert episodes.saved() == expected and all(expected.values()) and unroll.reward.max() > 0


def test_actions_are_samples_of_the_policy():
    args = script.Args(**ARGS | dict(num_envs=96, unroll_length=25))
    agent = script.Agent(args)
    with torch.no_grad():
        agent.policy.weight.zero_()
        agent.policy.bias.copy_(torch.linspace(-2, 2, 15))
    (actor,) = pool_of(script.Learner(agent, args), args, script.Episodes(["maze"])).actors
    unroll = script.Unroll(agent, 25, 96)
    play(actor, unroll)
    counts, p = torch.bincount(unroll.action.flatten(), minlength=15), agent.policy.bias.detach().softmax(0)
    assert ((counts - 2400 * p).square() / (2400 * p)).sum() < 36  # chi-squared, 14 degrees of freedom: one in a thousand


def test_an_actor_that_takes_turns_with_the_learner_is_on_policy(train):
    """The newest weights reach it, and the learner computes what it computed: all importance weights are 1."""
    words = "--deterministic --num-actors 1 --bf16 False --learning-rate 0.01 --unroll-length 10".split()
    scalars = log(train("--total-steps", 400, *words))
    assert [lag for _, lag in scalars["policy_lag"]] == [0] * 10
    assert all(rho > 0.999 for _, rho in scalars["vtrace/mean_rho"])
    entropies = [entropy for _, entropy in scalars["loss/entropy"]]
    assert max(entropies) - min(entropies) > 0.1  # the policy moved


@pytest.mark.parametrize("num_servers, ends", [(3, [2, 4, 6]), (4, [1, 3, 4, 6]), (9, [1, 2, 3, 4, 5, 6])])
def test_environments_play_the_game_of_their_number_and_move_by_their_own_actions_in_whichever_process(num_servers, ends):
    """Each process has a part of the six, up to one of the ends. The second of four begins with the second game."""
    args, begin = script.Args(**ARGS | dict(num_servers=num_servers)), 0
    actor, _, unroll, _ = parts(args)
    play(actor, unroll)
    assert len(actor.block.flags) == len(ends)
    for number, end in enumerate(ends):
        games = [("maze", "leaper")[n % 2] for n in range(begin, end)]
        envs = script.make_envs(args, games, end - begin, seed=1 + number)
        for t in range(21):
            reward, obs, done = envs.observe()
            for seen, now in zip(unroll.inputs, (obs["rgb"], reward, done)):
                assert (seen[t, begin:end].numpy() == now).all()
            if t < 20:
                envs.act(unroll.action[t, begin:end].int().numpy())
        begin = end


def test_in_training_alone_the_environments_of_a_game_with_idle_steps_do_nothing_at_first():
    """With next to endlessly many, a game's environments never move; those of the other play the actor's actions."""
    args = script.Args(**ARGS, noop_max=(("leaper", 2**31 - 1),), valid_num_levels=5)
    actor, _, unroll, _ = parts(args)
    play(actor, unroll)
    envs = script.make_envs(args, ["maze", "leaper"], 6, seed=1)
    for t in range(21):
        assert (unroll.obs[t].numpy() == envs.observe()[1]["rgb"]).all()
        if t < 20:
            actions = unroll.action[t].int().numpy()
            actions[1::2] = 4
            envs.act(actions)
    assert len(unroll.action[:, 1::2].unique()) > 10  # learned from as they were drawn
    assert script.validation_args(args, ["maze", "leaper"]).noop_max == ()


def test_a_wrapper_says_which_of_its_actions_does_nothing(monkeypatch):
    make_envs = script.make_envs

    class Backwards:
        noop = 10  # where the engine has 4

        def __init__(self, envs):
            self.envs, self.observe = envs, envs.observe

        def act(self, action):
            self.envs.act(14 - action)

    monkeypatch.setattr(script, "make_envs", lambda *words, **options: Backwards(make_envs(*words, **options)))
    actor, _, unroll, _ = parts(script.Args(**ARGS, noop_max=(("maze", 2**31 - 1), ("leaper", 2**31 - 1))))
    play(actor, unroll)
    envs = make_envs(script.Args(), ["maze", "leaper"], 6, seed=1)
    for t in range(21):
        assert (unroll.obs[t].numpy() == envs.observe()[1]["rgb"]).all()
        envs.act(np.full(6, 4, np.int32))


def test_a_process_plays_for_several_actors():
    args = script.Args(**ARGS | dict(num_actors=4, num_servers=2))
    engine = script.Engine(script.make_envs, args, ["maze", "leaper"], seed=1, frame_shape=script.FRAME_SHAPE)
    assert [block.flags[:, 2].tolist() for block in engine.blocks] == [[0], [1], [0], [1]] and len(engine.workers.pids) == 2
    assert [len(block.flags) for block in engine.blocks] == [1, 1, 1, 1] and engine.next_seed == 5
    small = script.Args(**ARGS | dict(num_envs=2, num_servers=5))
    one_actor = script.Engine(script.make_envs, small, ["maze", "leaper"], seed=1, frame_shape=script.FRAME_SHAPE)
    assert len(one_actor.workers.pids) == 2  # no process without an environment


@pytest.mark.slow
def test_no_two_vectors_play_the_same_nor_does_a_resumed_run_play_again(train, command, monkeypatch, tmp_path):
    make_envs = script.make_envs

    def noted(args, games, num, seed, *rest, **options):
        if os.getpid() != trainer:
            with open(tmp_path / "seeds", "a") as file:
                file.write(f"{seed}\n")
        return make_envs(args, games, num, seed, *rest, **options)

    monkeypatch.setattr(script, "make_envs", noted)
    trainer = os.getpid()
    words = ("--num-servers", 2, "--valid-num-levels", 5)
    run = train("--total-steps", 20, *words)
    command(script, "--resume", run, "--total-steps", 40)
    seeds = [int(line) for line in (tmp_path / "seeds").read_text().split()]
    assert len(seeds) == 10 == len(set(seeds))  # two vectors of each of two actors, and one of the validation, twice
    envs = [make_envs(script.Args(), ["maze"], 1, seed) for seed in seeds]
    assert len({bytes(env.observe()[1]["rgb"]) for env in envs}) > 7  # of 200 levels, two may be the same


@pytest.mark.slow
def test_validation_plays_with_the_learner_s_weights_and_counts_its_own_episodes(train, monkeypatch):
    """Its one unroll comes after 67 updates, 3 % of their steps."""
    close, seen = script.ActorPool.close, []
    monkeypatch.setattr(script.ActorPool, "close", lambda pool: seen.append(pool) or close(pool))
    words = "--deterministic --multi-env None --env leaper --valid-num-levels 5 --unroll-length 2 --log-interval 60"
    run = train("--total-steps", 544, "--save-extra-checkpoint", 536, *words.split())
    validation, pool = seen
    saved = checkpoints.load_checkpoint(run / "checkpoint_536.pt", None)["model"]
    assert all(torch.equal(weight, saved[name]) for name, weight in validation.actors[0].agent.state_dict().items())
    assert not all(torch.equal(weight, saved[name]) for name, weight in pool.actors[0].agent.state_dict().items())
    assert validation.episodes is not pool.episodes


def test_a_resumed_run_goes_on_with_weights_and_episodes(trained, command):
    episodes = {"bigfish": [(5.0, 10)], "fruitbot": [(7.0, 12)]}
    before = torch.load(trained / "checkpoint.pt") | {"episodes": episodes}
    torch.save(before, trained / "checkpoint.pt")
    command(script, "--resume", trained, "--total-steps", 40, "--learning-rate", 0)
    after = read(trained)
    assert all(torch.equal(before["model"][name], after["model"][name]) for name in before["model"])
    assert all(tuple(after["episodes"][game][0]) == episodes[game][0] for game in episodes)


def test_an_actor_takes_the_newest_weights_at_each_step_and_an_unroll_knows_their_versions(monkeypatch):
    actor, learner, unroll, _ = parts(script.Args(**ARGS))
    policy, observe = learner.agent.policy.requires_grad_(False), script.Actor.observe
    policy.weight.zero_()

    def observe_and_publish(actor, t):
        observe(actor, t)
        policy.bias[0] = t  # newer weights come before each step
        learner.weights.publish()

    monkeypatch.setattr(script.Actor, "observe", observe_and_publish)
    play(actor, unroll)
    assert unroll.logits[:, :, 0].tolist() == [[step] * 6 for step in range(20)]
    assert unroll.version.tolist() == [[step + 2] * 6 for step in range(20)]  # 1: of the initial weights


def test_parameters_and_buffers_of_every_type_travel_with_the_weights_and_keep_their_memory_format():
    def network():
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.LayerNorm(5))
        model.register_buffer("mask", torch.zeros(7, dtype=torch.bool))
        model.register_buffer("narrow", torch.zeros(3, dtype=torch.bfloat16))
        return model.to(memory_format=torch.channels_last)

    source, target = network(), network()
    weights = srwm_cuda.Weights(source)
    weights.attach(target)
    for number in range(1, 20):  # more than the ring has rows
        for x in source.state_dict().values():
            x.copy_(torch.rand(x.shape) * 100 > 50 if x.dtype == torch.bool else torch.rand(x.shape) * 100)
        source[1].num_batches_tracked += 2**53  # no float32 has the numbers beyond
        weights.publish()
        weights.fetch(target)
        assert target.version.tolist() == [number + 1] == weights.version.tolist()
        for name, x in source.state_dict().items():
            assert torch.equal(x, target.state_dict()[name]), name
    assert all(x.stride() == target.state_dict()[name].stride() for name, x in source.state_dict().items())
    assert target[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert target[1].num_batches_tracked.dtype == torch.int64 and target.mask.dtype == torch.bool


def test_weights_that_are_not_valid_become_again_what_was_published_last():
    source, target = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    weights = srwm_cuda.Weights(source)
    weights.attach(target)
    before = {name: x.clone() for name, x in source.state_dict().items()}
    for valid in (False, True):
        with torch.no_grad():
            source.weight += 1
            source.running_mean[0] = 7 if valid else torch.nan
            source.num_batches_tracked += 1
        weights.publish(torch.tensor(valid))
        weights.fetch(target)
        assert target.version.item() == weights.version.item() == 2 + valid
        for name, x in source.state_dict().items():
            assert torch.equal(x, target.state_dict()[name])
            assert torch.equal(x, before[name]) != (valid and name not in ("bias", "running_var"))


def test_reports_come_in_their_order_and_the_newest_is_not_waited_for():
    reports, shares = srwm_cuda.Reports(), []
    for number in range(3):
        time.sleep(0.04)
        begun = srwm_cuda.record_event()
        time.sleep(0.02)
        reports.add(["number", "other"], torch.tensor([number, math.inf if number == 1 else 0]), begun)
        read, before = list(reports.read(1)), reports.idle_and_all
        assert [(row["number"], finite) for row, finite in read] == [(number - 1, number != 2)] * (number > 0)
        shares.append(before)
    (last,) = reports.read(0)
    assert last == ({"number": 2, "other": 0}, True) and not reports.queued
    assert shares[0].tolist() == [0, 0] and shares[1][0] == 0 < shares[1][1]  # before the first, nobody waited
    idle, passed = reports.idle_and_all - shares[1]
    assert 0.08 <= idle < 0.8 * passed and passed >= 0.12


def test_batches_take_every_environment_of_every_unroll_once():
    args = script.Args(**ARGS)
    learner = script.Learner(script.Agent(args), args)
    pool = pool_of(learner, args, script.Episodes(["maze", "leaper"]))
    for first in (0, 6):
        unroll = pool.free.get()
        unroll.reward += torch.arange(first, first + 6)
        unroll.state[0].add_(torch.arange(first, first + 6).view(-1, 1, 1, 1))
        unroll.version += first
        pool.full.put(unroll)
    learner.weights.version.fill_(10)
    seen, lags = [], []
    for _ in range(3):
        assert learner.fill(pool)
        lags.append(learner.loss()[1]["policy_lag"].item())
        seen += learner.batch.reward[3].tolist()
        assert torch.equal(learner.batch.state[0][:, 0, 0, 0], learner.batch.reward[-1])
    assert seen == list(range(12)) and lags == [10, 7, 4] and pool.free.qsize() == 2


def test_episodes_are_counted_over_the_ends_of_unrolls():
    episodes = script.Episodes(["maze", "leaper"])
    rewards, dones = np.zeros((4, 2)), np.zeros((4, 2), dtype=bool)
    rewards[:, 0], rewards[:, 1] = (1, 2, 3, 4), (10, 20, 30, 40)
    dones[1, 0] = dones[2, 0] = dones[3, 1] = True
    totals = episodes.add_unroll(rewards, dones, np.zeros((3, 2)))
    assert totals[2].tolist() == [2, 1]
    assert episodes.saved() == {"maze": [(3.0, 2), (3.0, 1)], "leaper": [(100.0, 4)]}
    episodes.add_unroll(rewards, dones, totals)
    assert episodes.saved() == {"maze": [(3.0, 2), (3.0, 1), (7.0, 3), (3.0, 1)], "leaper": [(100.0, 4), (100.0, 4)]}


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("reward_clipping", ["abs_one", "none", "normalize"])
def test_the_loss_is_that_of_the_paper(reward_clipping, limited):
    """Sums over time and batch of policy gradient, half squared error and entropy, from the batch's shifted rewards. With
    limits, what a step's entropy has beyond that of its environment's game earns nothing."""
    args = script.Args(reward_clipping=reward_clipping, **ARGS | dict(num_envs=4))
    actor, learner, unroll, _ = parts(args)
    play(actor, unroll)
    unroll.reward.copy_(torch.randn(21, 4) * 3)
    scales = [0.5, 2.0, 0.1, 1.0] if reward_clipping == "normalize" else [1.0] * 4
    limits = torch.tensor([math.inf, 0.0, 2.0, 2.7] if limited else [math.inf] * 4)
    unroll.of_games.copy_(torch.stack([torch.tensor(scales), limits]))
    unroll.version.copy_(torch.randint(40, (20, 4)))
    learner.weights.version.fill_(50)
    learner.batch.copy_from(unroll, 0, 4)
    learner.batch.logits += torch.randn(20, 4, 15)
    loss, statistics = learner.loss()

    with torch.no_grad():
        logits, values, _ = learner.agent(unroll.obs, unroll.reward, unroll.done, unroll.state)
    pi, mu = torch.distributions.Categorical(logits=logits[:-1]), torch.distributions.Categorical(logits=learner.batch.logits)
    log_rhos = pi.log_prob(unroll.action) - mu.log_prob(unroll.action)
    rewards = {"abs_one": unroll.reward.clamp(-1, 1), "none": unroll.reward,
               "normalize": unroll.reward * torch.tensor(scales)}[reward_clipping][1:]
    discounts = 0.99 * (1 - unroll.done[1:].float())
    vs, advantages = script.vtrace(log_rhos, discounts, rewards, values[:-1], values[-1])
    policy, baseline = -(pi.log_prob(unroll.action) * advantages).sum(), 0.5 * (vs - values[:-1]).square().sum()
    expected = policy + 0.5 * baseline - 0.01 * pi.entropy().minimum(limits).sum()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-3)
    rho, lag = log_rhos.exp().clamp(max=1).sum(), (50 - unroll.version).sum()
    parts_per_step = torch.stack([policy, baseline, expected, pi.entropy().sum(), rho, lag]) / 80
    torch.testing.assert_close(torch.stack([*statistics.values()]), parts_per_step, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, expected", [("srwm", [0, 2]), ("sr_delta", [0, 2]), ("delta", [2]), ("lstm", [2]), ("ff", [])])
def test_states_that_are_not_finite_or_beyond_the_bound_begin_anew_and_no_others(name, expected):
    module = importlib.import_module(f"impala_procgen_{name}")
    agent = module.Agent(module.Args(**ARGS))
    state = [torch.randn_like(part) for part in agent.initial_state(4)]
    for part in state[-1:]:
        part[0].view(-1)[-1], part[1].view(-1)[-1], part[2].view(-1)[-1] = -100.0, 99.9, float("nan")
    before = [part.clone() for part in state]
    assert srwm_cuda.reset_diverged(state, getattr(agent, "state_bound", math.inf)) == len(expected)
    for part, old in zip(state, before):
        assert all(not part[n].any() if n in expected else torch.equal(part[n], old[n]) for n in range(4))


@pytest.mark.slow
@pytest.mark.parametrize("cuda", [False, pytest.param(True, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_an_update_that_is_not_finite_leaves_no_trace(momentum, cuda):
    """The next one does what it would have done without it, bit for bit."""
    with torch.cuda.stream(torch.cuda.Stream() if cuda else None):
        actor, learner, unroll, _ = parts(script.Args(momentum=momentum, **ARGS | dict(cuda=cuda, bf16=cuda)))
        play(actor, unroll, unrolls=2)
        learner.batch.copy_from(unroll, 0, 4)
        weights = list(learner.agent.parameters())
        averages = [x for state in learner.optimizer.state.values() for name, x in state.items() if name != "step"]
        assert len(averages) == len(weights) * (2 if momentum else 1)
        update(learner, 1e-3)
        first = [x.detach().clone() for x in weights + averages]
        update(learner, 1e-3)
        second = [x.detach().clone() for x in weights + averages]
        assert not any(torch.equal(*pair) for pair in zip(first, second))

        with torch.no_grad():
            for x, old in zip(weights + averages, first):
                x.copy_(old)
        learner.weights.publish()
        learner.batch.state[1][2, 0, 0, 0] = float("inf")
        statistics, finite = update(learner, 1e-3)
        assert not finite and not all(map(math.isfinite, statistics.values()))
        assert all(torch.equal(*pair) for pair in zip(weights + averages, first))
        learner.batch.state[1][2, 0, 0, 0] = unroll.state[1][2, 0, 0, 0]
        update(learner, 1e-3)
        assert all(torch.equal(*pair) for pair in zip(weights + averages, second))


def test_normalized_rewards_are_divided_by_the_spread_of_the_game_s_last_hundred_returns():
    actor, _, unroll, episodes = parts(script.Args(reward_clipping="normalize", **ARGS))
    for value in range(1000):
        episodes.add("maze", 10 * (value % 2), 1)
        episodes.add("leaper", value / 100, 1)  # 9 to 9.99, the last hundred
    play(actor, unroll)
    maze, leaper = unroll.of_games[0, :2].tolist()
    assert maze == pytest.approx(1 / 5, rel=0.1) and leaper == pytest.approx(1 / np.arange(9, 10, 0.01).std(), rel=0.1)
    assert unroll.of_games[0].tolist() == [maze, leaper] * 3  # environments play the games by turns


@pytest.mark.parametrize("reward_clipping, scale", [("normalize", 0.5), ("none", 1)])
def test_environments_of_one_game_have_one_scale_and_one_limit(reward_clipping, scale):
    episodes = script.Episodes(["leaper", "maze", "leaper"])
    for value in range(10):
        episodes.add("maze", 4 * (value % 2), 1)
    args = script.Args(reward_clipping=reward_clipping, entropy_limits=(("leaper", 0.75),), num_envs=6)
    assert episodes.scales_and_limits(args).tolist() == [[1, scale, 1] * 2, [0.75, math.inf, 0.75] * 2]


def test_the_spread_of_few_or_equal_returns_is_one():
    episodes = script.Episodes(["maze"])
    for value in (0, 10, 10, 0, 10, 0, 10, 0, 0):
        episodes.add("maze", value, 1)
        assert episodes.spread("maze") == 1
    episodes.add("maze", 10, 1)
    assert episodes.spread("maze") == 5
    for _ in range(100):
        episodes.add("maze", 10, 1)
    assert episodes.spread("maze") == 1


def test_an_update_is_a_clipped_step_of_rmsprop():
    args = script.Args(**ARGS | dict(num_envs=4, grad_norm_clipping=1e-3))
    actor, learner, unroll, _ = parts(args)
    play(actor, unroll)
    learner.batch.copy_from(unroll, 0, 4)
    learner.loss()[0].backward()
    gradients = [parameter.grad.clone() for parameter in learner.agent.parameters()]
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    before = [parameter.detach().clone() for parameter in learner.agent.parameters()]
    statistics, _ = update(learner, 0.25)
    assert statistics["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)
    for old, new, gradient in zip(before, learner.agent.parameters(), gradients):
        clipped = gradient * 1e-3 / norm
        expected = old - 0.25 * clipped / ((0.01 * clipped**2).sqrt() + 0.01)
        torch.testing.assert_close(new.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind, options", [
    (torch.optim.RMSprop, dict(momentum=0.9)), (torch.optim.Adam, {}), (torch.optim.AdamW, dict(weight_decay=0.1)),
    (torch.optim.SGD, dict(momentum=0.9))])
def test_an_optimizer_whose_averages_were_made_beforehand_steps_like_a_new_one(kind, options):
    """Whichever an ablation takes."""
    results = []
    for beforehand in (False, True):
        parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 5))]
        optimizer = kind(parameters, 0.1, **options)
        if beforehand:
            srwm_cuda.prepare_optimizer(optimizer, None)
            assert torch.equal(parameters[0], torch.linspace(-1, 1, 5)) and optimizer.state
        for _ in range(3):
            parameters[0].grad = parameters[0].detach().cos()
            optimizer.step()
        results.append(parameters[0].detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("kind, kept", [(torch.optim.SGD, 0), (torch.optim.Adam, 2)])
def test_averages_are_kept_where_the_parameters_are(kind, kept):
    """How many steps Adam has made is on the CPU, unless it is capturable, and stays there."""
    parameter = torch.nn.Parameter(torch.zeros(3, device="meta"))  # PyTorch's device without memory
    optimizer = kind([parameter], 0.1)
    averages = srwm_cuda.prepare_optimizer(optimizer)
    assert averages.device.type == "meta" and len(averages) == 64 * kept  # 256 bytes each
    assert sum(x.device.type == "meta" for x in optimizer.state[parameter].values()) == kept


def test_weights_travel_whatever_the_default_type_of_numbers_is():
    source = torch.nn.Linear(3, 3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        weights, target = srwm_cuda.Weights(source), torch.nn.Linear(3, 3, dtype=torch.float32)
        weights.attach(target)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(source.weight, target.weight) and torch.equal(source.bias, target.bias)


def test_frozen_parameters_stay_whatever_the_optimizer_does():
    args = script.Args(**ARGS)
    agent = script.Agent(args)
    agent.encoder.requires_grad_(False)
    learner = script.Learner(agent, args)
    learner.optimizer.param_groups[0]["weight_decay"] = 0.5
    before = [x.clone() for x in agent.parameters()]
    update(learner, 0.1)
    same = [torch.equal(*pair) for pair in zip(before, agent.parameters())]
    frozen = len(list(agent.encoder.parameters()))
    assert sum(same[:frozen]) == frozen and not any(same[frozen:])


def test_a_run_leaves_a_checkpoint_and_a_log(train, capsys):
    run = train("--total-steps", 400)
    checkpoint = read(run)
    assert checkpoint["step"] == 400 and checkpoint["script"] == "impala_procgen_srwm.py"
    assert checkpoint["args"]["unroll_length"] == 5 and checkpoint["args"]["num_envs"] == 4
    assert re.search(r"step 400 of 400 \| [\d,]+ steps/s \| 0:00:00 left \| ", capsys.readouterr().out)
    scalars = log(run)
    expected = {"loss/policy", "loss/baseline", "loss/entropy", "loss/total", "vtrace/mean_rho", "gradient_norm"}
    assert expected | {"SPS", "learning_rate", "policy_lag"} <= set(scalars)
    assert [step for step, _ in scalars["SPS"]] == list(range(20, 401, 20))
    rates = [rate for _, rate in scalars["learning_rate"]]
    np.testing.assert_allclose(rates, 6e-4 * (1 - np.arange(0, 400, 20) / 400), rtol=1e-5)
    assert all(0 < rho <= 1 for _, rho in scalars["vtrace/mean_rho"]) and all(lag >= 0 for _, lag in scalars["policy_lag"])


def shares_and_entropy_costs(run):
    """Of the log's entries: the learning rate's share of its first value, and the entropy cost in the total loss."""
    scalars = {name: np.array(entries)[:, 1] for name, entries in log(run).items()}
    policy, baseline, total, entropy = (scalars[f"loss/{name}"] for name in ("policy", "baseline", "total", "entropy"))
    return scalars["learning_rate"] / 6e-4, (policy + 0.5 * baseline - total) / entropy


@pytest.mark.parametrize("words", [[], ["--anneal-entropy"]])
def test_the_entropy_cost_falls_with_the_learning_rate_if_asked_to(words, train):
    shares, costs = shares_and_entropy_costs(train("--total-steps", 200, *words))
    np.testing.assert_allclose(shares, 1 - np.arange(0, 200, 20) / 200, rtol=1e-4)
    np.testing.assert_allclose(costs, 0.01 * (shares if words else 1), rtol=0.01, atol=1e-5)


def test_games_with_an_entropy_limit_of_0_earn_no_bonus(train, command):
    """The two games have half of the environments each, and next to the same entropy."""
    run = train("--total-steps", 200, "--entropy-limits", "fruitbot", 0)
    np.testing.assert_allclose(shares_and_entropy_costs(run)[1], 0.005, rtol=0.05)
    command(script, "--resume", run, "--total-steps", 300)
    np.testing.assert_allclose(shares_and_entropy_costs(run)[1], 0.005, rtol=0.05)
    command(script, "--resume", run, "--total-steps", 400, "--entropy-limits", "fruitbot", 0, "bigfish", 0)
    np.testing.assert_allclose(shares_and_entropy_costs(run)[1][-5:], 0, atol=1e-4)
    command(script, "--resume", run, "--total-steps", 500, "--entropy-limits")
    np.testing.assert_allclose(shares_and_entropy_costs(run)[1][-5:], 0.01, rtol=0.05)


def test_an_entropy_cost_that_falls_with_a_learning_rate_of_0_is_a_number(train):
    scalars = log(train("--total-steps", 40, "--anneal-entropy", "--learning-rate", 0))
    assert [number for _, number in scalars["skipped_updates"]] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["engine", "learner"])
def test_the_log_says_who_waits_for_whom(slow, train, monkeypatch):
    """As shares of the time: the learner for unrolls, actors for the learner, the engine's processes for actions."""
    make_envs, backward = script.make_envs, script.Learner.backward

    def make_slow_envs(*words, **options):
        envs = make_envs(*words, **options)
        act = envs.act
        envs.act = lambda action: (time.sleep(0.1), act(action))
        return envs

    monkeypatch.setattr(script, "make_envs", make_slow_envs if slow == "engine" else make_envs)
    monkeypatch.setattr(script.Learner, "backward", lambda learner: backward(learner) or time.sleep(
        0.0 if slow == "engine" else 0.5))
    scalars = log(train("--total-steps", 160, "--num-actors", 1, "--num-servers", 1))
    learner, actors, engine = (np.mean([share for _, share in scalars[f"wait/{name}"][3:]])
                               for name in ("learner", "actors", "engine"))
    if slow == "engine":
        assert 2 * actors < learner <= 1 and engine < 0.5
    else:
        assert 2 * learner < actors <= 1 and 0.5 < engine <= 1


@pytest.mark.slow
def test_a_mean_waits_until_each_environment_has_ended_an_episode(train, capsys):
    """The first to end are another kind: in maze, those that were won."""
    train("--total-steps", 20)
    first, *others = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert first.endswith("steps/s | 0 of 8 environments have ended an episode")  # it knows no time left yet
    assert all(" left | " in line for line in others)
    actor, _, unroll, episodes = parts(script.Args(**ARGS), ["fruitbot"])
    pool = SimpleNamespace(actors=[actor], episodes=episodes)
    seen = [(0, False)]
    while seen[-1][0] < 6 or not seen[-1][1]:  # of six environments
        play(actor, unroll)
        seen.append((sum(actor.totals[2] > 0), each_has_ended(pool)))
    assert all(mean == (ended == 6) for ended, mean in seen) and any(0 < ended < 6 for ended, _ in seen)
    assert len(episodes.recent["fruitbot"]) >= 6


@pytest.mark.slow
def test_a_mean_waits_once_more_after_a_resume(train, trained, capsys):
    checkpoint = torch.load(trained / "checkpoint.pt")
    recent = {game: [(10.0, 3)] * 50 for game in checkpoint["episodes"]}
    torch.save(checkpoint | {"episodes": recent}, trained / "checkpoint.pt")
    train("--resume", trained, "--total-steps", 40)
    assert "| 0 of 8 environments have ended an episode\n" in capsys.readouterr().out


def test_a_run_says_at_once_how_many_steps_it_will_learn_from(train, trained, capsys):
    """One with the weights of another too: they do not bring their number along."""
    train("--init-from", trained, "--total-steps", 40, "--exp-name", "other")
    begin = f": bigfish, fruitbot (easy), 40 steps with the weights of {trained}, 2 actors x 4 environments, "
    assert begin in capsys.readouterr().out


def test_returns_and_lengths_of_each_game_are_logged(trained, command, capsys):
    """Here of episodes that a checkpoint brings along; in the few steps that follow none ends."""
    episodes = {"bigfish": [(5.0, 10), (3.0, 20)], "fruitbot": [(15.45, 12)]}
    torch.save(torch.load(trained / "checkpoint.pt") | {"episodes": episodes}, trained / "checkpoint.pt")
    command(script, "--resume", trained, "--total-steps", 40, "--deterministic")
    logged = {tag: value for tag, values in log(trained).items() for step, value in values if step == 40}
    for kind, bigfish, fruitbot in (("return", 4, 15.45), ("length", 15, 12), ("normalized_return", 3 / 39, 0.5)):
        assert logged[f"{kind}/bigfish"] == pytest.approx(bigfish, rel=1e-5)
        assert logged[f"{kind}/fruitbot"] == pytest.approx(fruitbot, rel=1e-5)
        assert logged[f"{kind}/mean"] == pytest.approx((bigfish + fruitbot) / 2, rel=1e-5)
    assert "| 0 of 8 environments have ended an episode" in capsys.readouterr().out


@pytest.mark.slow
def test_validation_is_logged_and_the_best_checkpoint_kept_and_an_extra_one(train, monkeypatch):
    begin = script.Validation.start

    def begin_and_wait(validation):
        begin(validation)
        while not validation.full.qsize():  # its first unroll comes before the first update
            time.sleep(0.01)

    monkeypatch.setattr(script.Validation, "start", begin_and_wait)
    monkeypatch.setattr(script.Episodes, "full", lambda episodes: True)  # which takes long
    words = "--multi-env None --env fruitbot --unroll-length 100 --valid-num-levels 5 --valid-start-level 700"
    run = train(*words.split(), "--total-steps", 1200, "--save-extra-checkpoint", 500)
    scalars = log(run)
    valid = dict(scalars["valid_normalized_return/mean"])
    assert {"valid_return/fruitbot", "valid_length/fruitbot"} <= set(scalars)
    for step, gap in scalars["generalization_gap"]:
        assert gap == pytest.approx(dict(scalars["normalized_return/mean"])[step] - valid[step], abs=1e-5)
    best = checkpoints.load_checkpoint(run / "best.pt", None)
    assert best["best"] == pytest.approx(max(valid.values()), abs=1e-5)
    assert best["best"] == pytest.approx(valid[best["step"]], abs=1e-5)
    assert checkpoints.load_checkpoint(run / "checkpoint_800.pt", None)["step"] == 800  # the first update to reach 500
    assert len(read(run)["valid_episodes"]["fruitbot"]) > 0


@pytest.fixture
def validated(trained):
    """The folder of a run whose checkpoint knows episodes of its validation."""
    checkpoint = torch.load(trained / "checkpoint.pt")
    assert checkpoint["valid_episodes"] == {"bigfish": [], "fruitbot": []}
    checkpoint["args"]["valid_num_levels"] = 5
    checkpoint["valid_episodes"] = {"bigfish": [(5.0, 10)] * 3, "fruitbot": [(7.0, 12)]}
    torch.save(checkpoint, trained / "checkpoint.pt")
    return trained


def test_a_resumed_run_goes_on_with_the_episodes_of_its_validation(validated, command):
    command(script, "--resume", validated, "--total-steps", 40)
    episodes = read(validated)["valid_episodes"]
    assert episodes["bigfish"][:3] == [(5.0, 10)] * 3 and episodes["fruitbot"][0] == (7.0, 12)
    assert [step for step, _ in log(validated)["valid_return/mean"]] == [40]


@pytest.mark.slow
def test_validation_on_other_levels_begins_without_the_episodes_before(validated, command):
    command(script, "--resume", validated, "--total-steps", 40, "--valid-start-level", 800)
    assert (7.0, 12) not in read(validated)["valid_episodes"]["fruitbot"]


@pytest.mark.slow
def test_a_checkpoint_of_a_time_when_validation_s_episodes_were_not_kept_is_resumed(validated, command):
    checkpoint = torch.load(validated / "checkpoint.pt")
    del checkpoint["valid_episodes"]
    torch.save(checkpoint, validated / "checkpoint.pt")
    command(script, "--resume", validated, "--total-steps", 40)
    assert read(validated)["step"] == 40


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    """Also where none has made runs/ yet: 30 races for it, in each of which all begin at once."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns between almost any two steps
    barrier = threading.Barrier(4)

    def make(name):
        barrier.wait()
        return checkpoints.make_folder(name)

    try:
        with ThreadPoolExecutor(4) as pool:
            for race in range(30):
                (tmp_path / str(race)).mkdir()
                monkeypatch.chdir(tmp_path / str(race))
                assert len(set(pool.map(make, ["name"] * 4))) == 4 == len(list(Path("runs").iterdir()))
    finally:
        sys.setswitchinterval(interval)


def test_the_best_checkpoint_is_chosen_by_a_hundred_episodes_of_each_game():
    """The first episodes to end are short ones: in maze, those that were won."""
    episodes = script.Episodes(["maze", "leaper"])
    for _ in range(100):
        assert not episodes.full()
        for game in ("maze", "leaper"):
            episodes.add(game, 10, 1)
    assert episodes.full()


def test_validation_plays_its_own_levels_and_nothing_is_learned_from_it():
    args, games = script.Args(valid_num_levels=5, valid_start_level=700, **ARGS), ["maze", "leaper"]
    valid_args = script.validation_args(args, games)
    assert (valid_args.num_levels, valid_args.start_level, valid_args.num_actors, valid_args.num_envs) == (5, 700, 1, 16)
    learner = script.Learner(script.Agent(args), args)
    before = [parameter.clone() for parameter in learner.agent.parameters()]
    engine = script.Engine(script.make_envs, valid_args, games, seed=1, frame_shape=script.FRAME_SHAPE)
    validation = script.Validation(args, script.Episodes(games), learner.weights, engine, 1, script.Stop())
    validation.start()
    unroll = validation.get()
    validation.close()
    envs = script.make_envs(valid_args, games, 16, seed=1)
    assert (unroll.obs[0].numpy() == envs.observe()[1]["rgb"]).all() and unroll.done[0].all()
    assert {info["level_seed"] for info in envs.get_info()} <= set(range(700, 705))
    assert all(torch.equal(old, new) for old, new in zip(before, learner.agent.parameters()))


@pytest.mark.parametrize("levels, how", [(200, ""), (1, " --splits train --no-greedy --episodes 20")])
def test_a_run_ends_with_the_commands_that_come_next(levels, how, train, capsys):
    run = Path("runs", train("--total-steps", 20, "--num-levels", levels).name)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"next: python evaluate.py {run}{how}", f"  or: python impala_procgen_srwm.py --resume {run} --total-steps 40"]


def test_a_run_that_was_stopped_names_how_it_goes_on(train, capsys, monkeypatch):
    monkeypatch.setattr(script.Stop, "now", lambda stop: True)
    run = Path("runs", train().name)
    assert capsys.readouterr().out.endswith(f"impala_procgen_srwm.py --resume {run}\n")


def test_a_resumed_run_goes_on(train, command):
    run = train("--total-steps", 200)
    before = read(run)
    command(script, "--resume", run, "--total-steps", 300, "--no-cuda")
    after = read(run)
    assert after["step"] == 300 and after["args"]["num_envs"] == 4
    scalars = log(run)
    assert [step for step, _ in scalars["learning_rate"]] == list(range(20, 301, 20))
    assert dict(scalars["learning_rate"])[220] == pytest.approx(6e-4 * (1 - 200 / 300), rel=1e-4)
    changed = [not torch.equal(before["model"][name], after["model"][name]) for name in before["model"]]
    assert all(changed)
    averages = [checkpoint["optimizer"]["state"][0]["square_avg"] for checkpoint in (before, after)]
    assert before["optimizer"]["state"][0]["step"] == 10 and after["optimizer"]["state"][0]["step"] == 15
    assert averages[0].abs().max() > 0 and not torch.equal(*averages)


def save_with(path, **arguments):
    checkpoint = torch.load(path)
    torch.save(checkpoint | {"args": checkpoint["args"] | arguments}, path)


@pytest.mark.parametrize("damage, expected", [
    (lambda path: path.write_bytes(path.read_bytes()[:5000]), "is not a whole checkpoint"),
    (lambda path: path.write_bytes(b""), "is not a whole checkpoint"),
    (lambda path: torch.save({"model": {}}, path), "is not a checkpoint of this project"),
    (lambda path: torch.save(torch.load(path) | {"script": "other.py"}, path), "belongs to other.py"),
    (lambda path: save_with(path, reward_clipping="sometimes"),
     "--reward-clipping must be one of abs_one, normalize, none, got sometimes"),
    (lambda path: save_with(path, distribution_mode="exploration"),
     "--distribution-mode must be one of easy, hard, extreme, memory, got exploration"),
])
def test_a_damaged_or_foreign_checkpoint_is_refused(damage, expected, trained, command, refused, capsys):
    damage(trained / "checkpoint.pt")
    capsys.readouterr()
    refused(lambda: command(script, "--resume", trained, "--total-steps", 40), expected)


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path, command, refused):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "run").mkdir()
    torch.save({"script": Bomb()}, tmp_path / "run" / "checkpoint.pt")
    refused(lambda: command(script, "--resume", tmp_path / "run"), "is not a whole checkpoint")
    assert not (tmp_path / "exploded").exists()


def real_stderr():
    """Lets sys.stderr be standard error, as it is without pytest, whose own file the engine's processes close."""
    return contextlib.redirect_stderr(open(2, "w", buffering=1, closefd=False))


def test_an_exception_in_an_environment_is_shown_and_ends_the_run(train, monkeypatch, capfd):
    make_envs, calls = script.make_envs, []

    def make_breaking_envs(*arguments, **options):
        envs = make_envs(*arguments, **options)
        act = envs.act

        def break_later(action):
            calls.append(1)
            if len(calls) > 30:
                raise ValueError("the environment is on fire")
            act(action)

        envs.act = break_later
        return envs

    monkeypatch.setattr(script, "make_envs", make_breaking_envs)
    expected = r"the last checkpoint is kept: process \d of the engine ended with status 1"
    with real_stderr(), pytest.raises(SystemExit, match=expected):
        train("--total-steps", 100_000)
    assert "ValueError: the environment is on fire" in capfd.readouterr().err
    assert not [thread for thread in threading.enumerate() if "(run)" in thread.name]


def test_an_exception_in_an_actor_ends_the_run_with_it(train, monkeypatch):
    infer = script.Actor.infer

    def break_later(actor, t, state):
        if actor.totals[1].any():  # in its second unroll
            raise ValueError("the policy is on fire")  # which is not taken for an argument's
        return infer(actor, t, state)

    monkeypatch.setattr(script.Actor, "infer", break_later)
    with pytest.raises(ValueError, match="the policy is on fire"):
        train("--total-steps", 100_000)
    assert not [thread for thread in threading.enumerate() if "(run)" in thread.name]


def wrap(monkeypatch, change):
    """Lets make_envs return an engine in a wrapper whose frames are changed ones."""
    make_envs = script.make_envs

    class Wrapper:
        def __init__(self, envs):
            self.act, self.envs = envs.act, envs

        def observe(self):
            reward, obs, done = self.envs.observe()
            return reward + 1, dict(rgb=change(obs["rgb"])), done

    monkeypatch.setattr(script, "make_envs", lambda *words, **options: Wrapper(make_envs(*words, **options)))
    return make_envs


def test_what_a_wrapper_around_the_environments_returns_is_what_the_agent_sees(monkeypatch):
    make_envs = wrap(monkeypatch, lambda frames: 255 - frames)
    args = script.Args(**ARGS)
    actor, _, unroll, _ = parts(args)
    play(actor, unroll)
    envs = make_envs(args, ["maze", "leaper"], 6, seed=1)
    for t in range(21):
        reward, obs, _ = envs.observe()
        assert (unroll.obs[t].numpy() == 255 - obs["rgb"]).all() and (unroll.reward[t].numpy() == reward + 1).all()
        if t < 20:
            envs.act(unroll.action[t].int().numpy())


@pytest.mark.parametrize("change, expected", [
    (lambda frames: frames / 255, "Cannot cast"), (lambda frames: frames[..., :1], "wrong shape")], ids=["type", "shape"])
def test_frames_of_another_type_or_shape_end_the_run(change, expected, train, monkeypatch, capfd):
    wrap(monkeypatch, change)
    with real_stderr(), pytest.raises(SystemExit, match=r"process \d of the engine ended with status 1"):
        train("--total-steps", 100)
    assert expected in capfd.readouterr().err


@pytest.mark.slow
def test_a_signal_saves_and_leaves(tmp_path):
    words = "--no-cuda --env maze --num-actors 2 --num-envs 8 --batch-size 8 --log-interval 0.1".split()

    def stop(number):
        name = signal.Signals(number).name
        process = subprocess.Popen([sys.executable, ROOT / "impala_procgen_srwm.py", *words, "--exp-name", name], cwd=tmp_path,
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for line in process.stdout:
            if line.startswith("step"):
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0 and err == "", err
        (run,) = (tmp_path / "runs").glob(f"{name}__*")
        step = read(run)["step"]
        assert step > 0 and f"saved runs/{run.name}/checkpoint.pt at step {step:,}" in out
        assert log(run)["SPS"][-1][0] == step

    with ThreadPoolExecutor() as pool:
        list(pool.map(stop, [signal.SIGINT, signal.SIGTERM]))


@pytest.mark.slow
def test_a_signal_stops_a_run_whose_learner_still_waits_for_its_first_batch(tmp_path):
    words = "--no-cuda --env maze --num-actors 1 --num-envs 1 --batch-size 1 --unroll-length 20000".split()
    process = subprocess.Popen([sys.executable, ROOT / "impala_procgen_srwm.py", *words], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith("runs/")
    while not list(tmp_path.glob("runs/*/events*")):
        time.sleep(0.1)
    time.sleep(3)  # the first unroll alone takes much longer
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and "checkpoint.pt at step 0" in out, err


def test_a_signal_ends_the_wait_for_an_unroll_even_if_its_handler_outlasts_the_wait():
    args = script.Args(**ARGS)
    pool = pool_of(script.Learner(script.Agent(args), args), args, script.Episodes(["maze", "leaper"]))

    def hear(number, frame):
        time.sleep(0.6)
        pool.stop.set()

    before = signal.signal(signal.SIGALRM, hear)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    later = threading.Timer(5, pool.full.put, ["an unroll, too late"])
    later.start()
    assert pool.get() is None
    later.cancel()
    signal.signal(signal.SIGALRM, before)


def test_momentum_can_be_new_in_a_resumed_run(trained, command):
    command(script, "--resume", trained, "--total-steps", 60, "--momentum", 0.9)
    checkpoint = read(trained)
    assert checkpoint["step"] == 60 and checkpoint["optimizer"]["state"][0]["momentum_buffer"].abs().max() > 0


@pytest.mark.parametrize("words", first_fast(
    "--distribution-mode memory --num-levels 500 --multi-env 4 --num-envs 4",
    "--distribution-mode extreme --multi-env 4",
    "--distribution-mode hard --num-levels 0",
    "--no-carry-state",
    "--bptt-length 2 --num-layers 1 --hidden-size 64 --num-head 4",
    "--reward-clipping none --momentum 0.9 --bf16 False",
    "--reward-clipping normalize",
))
def test_modes_and_options_train(words, train):
    run = train("--total-steps", 60, *words.split())
    assert read(run)["step"] == 60


@pytest.mark.gpu
@pytest.mark.parametrize("carry_state", [True, False])
def test_the_learner_sees_what_the_actor_saw_through_cuda_graphs(carry_state):
    with torch.cuda.stream(torch.cuda.Stream()):
        actor, learner, unroll, _ = parts(script.Args(carry_state=carry_state, **ARGS | dict(cuda=True)))
        play(actor, unroll, unrolls=3)
        learner.batch.copy_from(unroll, 0, 4)
        exact = [parameter.detach().clone() for parameter in learner.agent.parameters()]
        statistics, finite = update(learner, 6e-4)
    assert all((part.abs().max() > 0) == carry_state for part in unroll.state)
    assert unroll.action.unique().numel() == 15
    assert finite and statistics["vtrace/mean_rho"] > 0.99 and statistics["loss/entropy"] > 2.5
    assert all(not torch.equal(old, new) for old, new in zip(exact, learner.agent.parameters()))


@pytest.mark.gpu
def test_without_cuda_graphs_values_can_be_looked_at_in_act_and_loss(command, monkeypatch, tmp_path):
    infer, loss, seen = script.Actor.infer, script.Learner.loss, []

    def watched_infer(actor, t, state):
        state = infer(actor, t, state)
        seen.append(actor.unroll.action[t].sum().item())
        return state

    def watched_loss(learner):
        result = loss(learner)
        seen.append(result[0].item())
        return result

    monkeypatch.setattr(script.Actor, "infer", watched_infer)
    monkeypatch.setattr(script.Learner, "loss", watched_loss)
    command(script, *"--cuda --no-cuda-graphs --multi-env 2 --num-actors 2 --num-envs 16 --batch-size 8".split(),
            "--total-steps", 4000)
    (run,) = (tmp_path / "runs").iterdir()
    assert read(run)["step"] == 4000 and len(seen) > 10 + 100  # ten updates, and the steps of at least two unrolls


@pytest.mark.gpu
def test_an_actor_waits_for_the_first_values_of_its_tensors(monkeypatch):
    """Or else, on a GPU with much else to do, they come after what its first step has written."""
    class Slow(script.Unroll):
        def __init__(self, *sizes):
            torch.cuda._sleep(10**9)  # clock ticks
            super().__init__(*sizes)

    args = script.Args(**ARGS | dict(cuda=True, cuda_graphs=False))
    with torch.cuda.stream(torch.cuda.Stream()):
        parts(args)  # what it allocates is there for the next
        monkeypatch.setattr(script, "Unroll", Slow)
        monkeypatch.setattr(srwm_cuda, "Flags", lambda *words: None)  # which may wait for the GPU
        actor, *_ = parts(args)
    torch.cuda.synchronize()
    assert actor.unroll.logits[0].any()


@pytest.mark.gpu
def test_a_gpu_without_stream_memory_operations_trains_too(command, monkeypatch, tmp_path):
    monkeypatch.setattr(srwm_cuda.flags, "can_wait_on_stream", lambda device: False)
    command(script, *"--cuda --multi-env 2 --num-actors 2 --num-envs 16 --batch-size 8 --total-steps 4000".split())
    (run,) = (tmp_path / "runs").iterdir()
    assert read(run)["step"] == 4000


@pytest.mark.gpu
@pytest.mark.parametrize("words, cost", [([], 0.01), (["--entropy-limits", "fruitbot", 0], 0.005)])
def test_the_entropy_cost_falls_through_cuda_graphs(words, cost, command, tmp_path):
    command(script, *"--cuda --multi-env 2 --num-actors 2 --num-envs 16 --batch-size 8 --total-steps 8000".split(),
            "--anneal-entropy", "--log-interval", 0, *words)
    shares, costs = shares_and_entropy_costs(next((tmp_path / "runs").iterdir()))
    assert shares[0] > 0.9 and shares[-1] < 0.2
    np.testing.assert_allclose(costs, cost * shares, rtol=0.1 if words else 0.02, atol=2e-5)


@pytest.mark.gpu
def test_a_run_on_the_gpu_can_be_resumed_there_and_on_the_cpu(command, tmp_path):
    command(script, *"--cuda --multi-env 2 --num-actors 2 --num-envs 16 --batch-size 8 --total-steps 4000".split())
    (run,) = (tmp_path / "runs").iterdir()
    assert read(run)["step"] == 4000
    command(script, "--resume", run, "--total-steps", 8000)
    assert read(run)["step"] == 8000
    command(script, "--resume", run, "--total-steps", 8400, "--no-cuda")
    assert read(run)["step"] == 8400
