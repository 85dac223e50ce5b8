"""IMPALA on ProcGen with an LSTM, the recurrent baseline.

Paper: A Modern Self-Referential Weight Matrix That Learns to Modify Itself (Irie et al., ICML 2022,
arXiv 2202.05780). Learning: IMPALA with V-trace (Espeholt et al. 2018, arXiv 1802.01561).

    python impala_procgen_lstm.py --multi-env 6           learns six games
    python impala_procgen_lstm.py --env maze leaper       or these two
    python impala_procgen_lstm.py --resume runs/NAME      continues a run
    python evaluate.py --start-level 1000                 tests it on new levels
    torchrun --nproc-per-node 2 impala_procgen_lstm.py    on two GPUs

    Engine -- frame, reward, done --> Actor -- full Unroll --> Learner
       ^                              |   ^                       |
       '----------- action -----------'   '------- Weights -------'

Learner and actors are threads, the engine has processes. The story comes first, then housekeeping.
For an ablation, copy this file; the other scripts differ in the model section. In shapes, T is time
steps, B environments, H heads of size D; "the reference" is the paper's code, IDSIA/modern-srwm.
"""

import contextlib
import functools
import hashlib
import math
import os
import queue
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parent))  # where these are, also with PYTHONSAFEPATH
import housekeeping
import srwm_cuda
from housekeeping import arguments, checkpoints, processes, say
from housekeeping.arguments import Amount, Amounts, Count, Fraction, Positive, PositiveAmount, Steps
from housekeeping.engine import RETURN_RANGE, Engine, Game, Mode, ProcgenGym3Env, check_games
from housekeeping.episodes import Episodes, each_has_ended, have_ended
from housekeeping.launch import LOCAL_RANK, NUM_LOCAL, NUM_PROCESSES, RANK, Launch, num_cores
from housekeeping.log import Log
from housekeeping.signals import Stop, answer_signals

FRAME_SHAPE, NUM_ACTIONS, FEATURES = (64, 64, 3), 15, 256  # the last: what Encoder makes of a frame


@dataclass
class EnvironmentArgs:
    multi_env: Positive | None = None  # train on the first N games (None: 6, or those of --env)
    env: Game = None  # or on these; one named twice has twice the environments
    distribution_mode: Mode = "easy"  # each has its own list of games
    num_levels: Count = 200  # levels of each game to train on; 0: all
    start_level: Count = 0  # the first of these levels
    noop_max: arguments.Counts = ()  # training episodes begin with idle steps: 0 to these
    num_actors: Positive | None = None  # actor threads (None: by the number of cores)
    num_envs: Positive | None = None  # of each (None: by cores and batch, often 90; on a CPU 36)
    num_servers: Positive | None = None  # processes of the engine (None: one for each core)


@dataclass
class LearningArgs:
    total_steps: Steps = 300_000_000  # environment steps, over which the learning rate falls to 0
    unroll_length: Positive = 50  # steps T of an unroll
    batch_size: Positive = 32  # unrolls B in an update
    learning_rate: Amount = 6e-4  # of RMSprop, at the start
    alpha: Fraction = 0.99  # RMSprop's smoothing constant
    epsilon: PositiveAmount = 0.01  # RMSprop's epsilon
    momentum: Fraction = 0.0  # RMSprop's momentum
    grad_norm_clipping: PositiveAmount = 40.0  # largest norm of the gradient
    discounting: Fraction = 0.99  # discount factor
    baseline_cost: Amount = 0.5  # weight of the value loss
    entropy_cost: Amount = 0.01  # weight of the entropy bonus
    anneal_entropy: bool = False  # entropy_cost falls with the learning rate
    entropy_limits: Amounts = ()  # largest entropy (nats) that a game's step earns a bonus for
    # rewards to learn from (the agent sees them clamped): clamped to [-1, 1], divided by the spread
    # of a game's returns, or raw
    reward_clipping: Literal["abs_one", "normalize", "none"] = "abs_one"
    carry_state: bool = True  # from unroll to unroll; without, the state-reset ablation


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv0, self.conv1 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.conv1(F.relu(self.conv0(F.relu(x))))


class Encoder(nn.Module):
    """IMPALA's residual CNN (Espeholt et al. 2018, figure 3): frames (N, 64, 64, 3) uint8 to
    features (N, 256). In bfloat16 on a GPU, kernels compute it; a changed one, torch.compile."""

    def __init__(self, args):
        super().__init__()
        layers, channels = [], FRAME_SHAPE[-1]
        for out in (16, 32, 32):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.MaxPool2d(3, 2, 1)]
            layers += [Residual(out), Residual(out)]
            channels = out
        self.cnn = nn.Sequential(*layers)
        self.fc = nn.Linear(channels * 8 * 8, FEATURES)  # 64 is halved three times
        self.dtype = torch.bfloat16 if args.bf16 else torch.float32
        self.kernels, self.built, self.compiled = args.cuda and args.bf16, str(self.cnn), None
        if not self.fused():
            self.to(memory_format=torch.channels_last)
            if self.kernels and args.cuda_graphs:
                self.compiled = srwm_cuda.compile(self.conv)

    def fused(self):
        """Whether kernels compute the CNN: not if this class, Residual or a layer was changed."""
        same = self.kernels and str(self.cnn) == self.built
        return same and srwm_cuda.is_impala_cnn(self.cnn, SOURCE, type(self), Residual)

    def forward(self, frames):
        if not frames.is_cuda and len(frames) > 240 and not [*self.buffers()]:
            return torch.cat([self.forward(part) for part in frames.split(240)])  # fits caches
        with torch.autocast(frames.device.type, torch.bfloat16, self.dtype == torch.bfloat16):
            if self.fused():
                x = srwm_cuda.impala_cnn(frames, *self.cnn.parameters())
            else:
                x = (self.compiled or self.conv)(frames)
            return F.relu(self.fc(F.relu(x))).float()

    def conv(self, frames):
        return self.cnn(frames.permute(0, 3, 1, 2).to(self.dtype) / 255.0).flatten(1)


# ======================== model: all that differs between the six scripts ========================


@dataclass
class ModelArgs:
    hidden_size: Positive = 256  # width of the LSTM


def lstm_cell(gates, c):
    i, f, g, o = gates.chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


class Agent(nn.Module):
    """The LSTM baseline (Hochreiter and Schmidhuber 1997, with forget gates). The loop over time,
    which must reset the state where an episode ends, holds only what depends on it; on a GPU it is
    compiled and part of a CUDA graph."""

    def __init__(self, args):
        super().__init__()
        self.encoder = Encoder(args)
        size = args.hidden_size
        self.input = nn.Linear(FEATURES + 1, 4 * size)  # and the last reward
        self.recurrent = nn.Linear(size, 4 * size)
        self.cell = torch.compile(lstm_cell, dynamic=False) if args.cuda else lstm_cell
        self.policy, self.baseline = nn.Linear(size, NUM_ACTIONS), nn.Linear(size, 1)

    def initial_state(self, batch_size):
        size = self.policy.in_features
        return tuple(self.policy.weight.new_zeros(batch_size, size) for _ in ("h", "c"))

    def forward(self, obs, reward, done, state):
        # obs (T, B, 64, 64, 3) uint8; reward (T, B), of the action before; done (T, B)
        features = self.encoder(obs.flatten(0, 1)).unflatten(0, obs.shape[:2])  # (T, B, 256)
        last_reward = reward.masked_fill(done, 0).clamp(-1, 1).unsqueeze(-1)  # none at the start
        gates = self.input(torch.cat([features, last_reward], dim=-1))  # (T, B, 4 * hidden_size)
        (h, c), hs = state, []
        for gates_t, keep in zip(gates, (~done).unsqueeze(-1)):
            h, c = self.cell(gates_t + self.recurrent(h * keep), c * keep)
            hs.append(h)
        hs = torch.stack(hs)
        return self.policy(hs), self.baseline(hs).squeeze(-1), (h, c)  # (T, B, 15), (T, B)


# ======================================== end of the model ========================================


@torch.no_grad()
def vtrace(log_rhos, discounts, rewards, values, bootstrap_value):
    """V-trace targets vs and policy-gradient advantages, (T, B) each (Espeholt et al. 2018, section
    4.1), with all weights clipped at 1. log_rhos (log(pi / mu) of the actions taken), discounts,
    rewards and values are (T, B), bootstrap_value (V at step T) is (B,)."""
    rhos = log_rhos.exp().clamp(max=1.0)
    next_values = torch.cat([values[1:], bootstrap_value.unsqueeze(0)])
    deltas, factors = rhos * (rewards + discounts * next_values - values), discounts * rhos
    correction, corrections = torch.zeros_like(bootstrap_value), []  # vs - V, from the end back
    for delta, factor in zip(deltas.flip(0), factors.flip(0)):
        correction = torch.addcmul(delta, factor, correction)  # delta + factor * correction
        corrections.append(correction)
    vs = values + torch.stack(corrections[::-1])
    next_vs = torch.cat([vs[1:], bootstrap_value.unsqueeze(0)])
    return vs, rhos * (rewards + discounts * next_vs - values)


def make_envs(args, games, num, seed, num_threads=0, **options):
    """`num` environments in one vector; number n plays games[n % len(games)]. Whoever calls them
    steps them, or num_threads do. A wrapper around it needs `act(action)` and `observe()`, which
    returns reward (num,), {"rgb": frames (num, *FRAME_SHAPE) uint8}, first (num,): what the agent
    sees, here and in evaluation. Returns are sums of its rewards."""
    options |= dict(distribution_mode=args.distribution_mode, num_levels=args.num_levels,
                    start_level=args.start_level)
    return ProcgenGym3Env(num, ",".join(games), rand_seed=seed % 2**31, num_threads=num_threads,
                          **options)


class Unroll:
    """T + 1 time steps of B environments, in fixed memory on the learner's device; the last is the
    next unroll's first. Actors fill unrolls. The learner's batch is one too, of several actors."""

    def __init__(self, agent, T, B):
        zeros = functools.partial(torch.zeros, device=next(agent.parameters()).device)
        self.obs = zeros(T + 1, B, *FRAME_SHAPE, dtype=torch.uint8)
        self.reward = zeros(T + 1, B)  # of the action before
        self.done = zeros(T + 1, B, dtype=torch.bool)  # the frame at t is an episode's first
        self.inputs = (self.obs, self.reward, self.done)  # of the agent
        self.action = zeros(T, B, dtype=torch.int64)
        self.logits = zeros(T, B, NUM_ACTIONS)  # of the policy that acted
        self.version = zeros(T, B, dtype=torch.int32)  # of the weights that acted
        self.of_games = torch.stack([zeros(B) + 1, zeros(B) + math.inf])  # scales and limits
        self.state = agent.initial_state(B)  # before the first step
        self.read = srwm_cuda.record_event()  # the learner has: it may be filled again

    def copy_from(self, unroll, begin, count, at=0):
        """Copies `count` environments of another unroll, from number `begin` on, to `at`."""
        def views(x, begin):
            steps = (*x.inputs, x.action, x.logits, x.version, x.of_games)
            steps = [each.narrow(1, begin, count) for each in steps]
            return steps + [each.narrow(0, begin, count) for each in x.state]
        torch._foreach_copy_(views(self, at), views(unroll, begin))


class Actor:
    """Plays a block of environments with the newest weights, and fills unrolls with it. On a GPU
    its thread only queues graphs of a few steps: its stream and the engine wait for each other."""

    def __init__(self, args, block, weights, episodes, seed):
        T, B, device = args.unroll_length, args.num_envs, "cuda" if args.cuda else "cpu"
        self.args, self.block, self.weights, self.episodes = args, block, weights, episodes
        self.totals = np.zeros((3, B))  # of each environment: see Episodes.add_unroll
        self.agent = Agent(args).to(device).requires_grad_(False).eval()  # without dropout
        weights.attach(self.agent)  # gives it a `version`
        self.bound = getattr(self.agent, "state_bound", math.inf)
        self.unroll, self.state = Unroll(self.agent, T, B), self.agent.initial_state(B)
        self.noise = torch.zeros_like(self.unroll.logits)  # n = log Exp(1): argmax(log p - n) ~ p
        self.generator = torch.Generator(device).manual_seed(seed)
        self.num_diverged, self.waited = torch.zeros((), device=device), 0.0  # for free unrolls
        self.of_games = torch.ones(2, B, pin_memory=args.cuda)  # for steps(), set by play()
        self.flags = srwm_cuda.Flags(block.flags, device, block.tensors)
        self.parts = [functools.partial(self.steps, t, min(t + 5, T)) for t in range(0, T, 5)]
        self.captured = args.cuda and args.cuda_graphs and self.flags.on_stream
        self.stream = self.make_stream() if args.cuda else None
        self.begun, self.events = 0, []  # queued parts of the next unroll; after each part

    def make_stream(self):
        """A CUDA stream for the actor, whose parts become CUDA graphs."""
        stream = torch.cuda.Stream(priority=-1)  # inference is short, and environments wait for it
        stream.wait_stream(torch.cuda.current_stream())  # on which the tensors above were made
        with torch.cuda.stream(stream):
            self.infer(0, self.state)  # compiles kernels
        if self.captured:
            memory = torch.cuda.graph_pool_handle()
            self.parts = [srwm_cuda.capture(part, stream, self.generator, memory)
                          for part in self.parts]
        return stream

    def steps(self, begin, end):
        """Plays time steps `begin` to `end` of the unroll."""
        if begin == 0:
            self.num_diverged += srwm_cuda.reset_diverged(self.state, self.bound)
            self.noise.exponential_(generator=self.generator).log_()
            self.unroll.of_games.copy_(self.of_games, non_blocking=True)
            for first, now in zip(self.unroll.state, self.state):
                first.copy_(now if self.args.carry_state else now.zero_())
        state = self.state
        for t in range(begin, end):
            self.observe(t)
            state = self.infer(t, state)
            self.flags.set(1)  # now the processes play
        for old, new in zip(self.state, state):
            old.copy_(new)
        if end == self.args.unroll_length:
            self.observe(end)  # which the next unroll does again, as its first step

    def observe(self, t):
        """Waits until all flags are 0, the environments' answer, and uploads it to the unroll."""
        self.flags.wait(0)
        for x, new in zip(self.unroll.inputs, self.block.tensors[:3]):
            x[t].copy_(new, non_blocking=True)

    @torch.no_grad()
    def infer(self, t, state):
        """The newest policy's actions at time step t. Returns the state after it."""
        self.weights.fetch(self.agent)
        logits, _, state = self.agent(*(x[t : t + 1] for x in self.unroll.inputs), state)
        self.unroll.logits[t], self.unroll.version[t] = logits[0], self.agent.version
        torch.argmax(logits[0] - self.noise[t], -1, out=self.unroll.action[t])
        self.block.action.copy_(self.unroll.action[t], non_blocking=True)
        return state

    def play(self, unroll, free=None):
        """Fills the unroll with T steps. A GPU then begins the next, if `free` has more."""
        self.of_games.copy_(self.episodes.scales_and_limits(self.args))
        self.queue(self.parts[self.begun :])
        if self.block.closed:
            return  # nobody reads it
        # A CUDA graph always writes to the same addresses: to self.unroll, and from there to this.
        unroll.read.wait()
        unroll.copy_from(self.unroll, 0, self.args.num_envs)
        ended = [x[1:].to("cpu", non_blocking=True) for x in (unroll.reward, unroll.done)]
        full = srwm_cuda.record_event()
        self.begun = min(1, free.qsize()) if self.captured and free else 0
        self.queue(self.parts[: self.begun])
        full.synchronize()
        self.totals = self.episodes.add_unroll(*map(np.asarray, ended), self.totals)

    def queue(self, parts):
        """Queues parts, or plays them. At most two wait: with more, starting them is slow."""
        for part in parts:
            if len(self.events) > 1:
                self.events.pop(0).synchronize()
            if self.block.closed:
                return
            part()
            self.events.append(srwm_cuda.record_event())


class ActorPool:
    """Threads in which actors fill unrolls, and the queues in which unrolls pass from the learner
    (free) and to it (full). With --deterministic, actors play by turns, while the learner waits."""

    def __init__(self, args, episodes, weights, engine, seed, stop, num_unrolls):
        self.args, self.episodes, self.engine, self.stop = args, episodes, engine, stop
        self.actors = [Actor(args, block, weights, episodes, seed + number)
                       for number, block in enumerate(engine.blocks)]
        self.free, self.full = queue.Queue(), queue.Queue()
        # From which each actor takes: all from one, but for --deterministic.
        self.queues = [queue.Queue() if args.deterministic else self.free for _ in self.actors]
        for _ in range(num_unrolls):
            self.free.put(Unroll(self.actors[0].agent, args.unroll_length, args.num_envs))
        self.threads = [threading.Thread(target=self.run, args=pair, daemon=True)
                        for pair in zip(self.actors, self.queues)]
        self.turn, self.error = 0, None

    def start(self):
        srwm_cuda.synchronize()  # with the stream on which the actors' tensors were made
        for thread in self.threads:
            thread.start()

    def run(self, actor, free):
        with torch.cuda.stream(actor.stream):  # None, on a CPU, does nothing
            try:
                begin = time.monotonic()
                while (unroll := free.get()) is not None:
                    actor.waited += time.monotonic() - begin
                    actor.play(unroll, free)
                    self.full.put(unroll)
                    begin = time.monotonic()
            except BaseException as error:
                self.error = error  # for check() to raise
            srwm_cuda.synchronize()  # what is still queued

    def get(self):
        """The next full unroll, for which a deterministic actor plays now; None: see Stop.now()."""
        if self.args.deterministic:
            srwm_cuda.synchronize()  # with the stream that publishes weights
            self.queues[self.turn % len(self.actors)].put(self.free.get())
            self.turn += 1
        while not self.stop.now():
            self.check()
            with contextlib.suppress(queue.Empty):
                return self.full.get(timeout=0.5)

    def check(self):
        """Raises what an actor died of, and an error if a process of the engine died or hangs."""
        if self.error is not None:
            raise self.error
        self.engine.workers.check()

    def close(self):
        self.engine.close()
        for free in self.queues:
            free.put(None)
        self.engine.workers.release(self.threads)


class Learner:
    """Agent, optimizer and the update: forward, V-trace, backward, clipping and RMSprop. On a GPU,
    an update is two CUDA graphs, which this thread queues without waiting for their end."""

    def __init__(self, agent, args, optimizer_state=None):
        self.agent, self.args, self.weights = agent, args, srwm_cuda.Weights(agent)
        self.parameters = [x for x in agent.parameters() if x.requires_grad]
        self.learning_rate, self.told = self.parameters[0].new_tensor([args.learning_rate, 0])
        self.optimizer = torch.optim.RMSprop(
            self.parameters, self.learning_rate, args.alpha, args.epsilon, momentum=args.momentum,
            foreach=args.cuda, capturable=args.cuda)
        self.averages = srwm_cuda.prepare_optimizer(self.optimizer, optimizer_state)
        self.batch = Unroll(agent, args.unroll_length, args.batch_size)
        self.unroll, self.column = None, 0  # in use, and its first environment not learned from
        self.names, self.reports = (), srwm_cuda.Reports()
        # Whether train() is another policy than eval(): BatchNorm. Trying changes the weights.
        self.modes_differ = srwm_cuda.try_both_modes(agent, *self.batch.inputs, self.batch.state)
        self.backward_graph = self.step_graph = None
        if args.cuda:
            for _ in range(3):  # compilation, and cuDNN's choice of algorithms
                self.backward()
            if args.cuda_graphs:
                stream = torch.cuda.current_stream()
                self.backward_graph = srwm_cuda.capture(self.backward, stream)
                self.step_graph = srwm_cuda.capture(self.step, stream)
        self.weights.restore()

    def fill(self, pool):
        """Fills the batch with the next environments of unrolls. Returns False after a signal."""
        filled = 0
        while filled < self.args.batch_size:
            if self.unroll is None:
                self.unroll, self.column = pool.get(), 0
                if self.unroll is None:
                    return False
            count = min(self.args.batch_size - filled, self.args.num_envs - self.column)
            self.batch.copy_from(self.unroll, self.column, count, at=filled)
            filled, self.column = filled + count, self.column + count
            if self.column == self.args.num_envs:
                self.unroll.read = srwm_cuda.record_event()
                pool.free.put(self.unroll)
                self.unroll = None
        return True

    def loss(self):
        """The loss, a sum over time and batch as in the paper, and statistics, means over both."""
        batch, args = self.batch, self.args
        if self.modes_differ:  # what is compared with mu is the policy as actors would act now
            acting_logits = srwm_cuda.acting_logits(self.agent, *batch.inputs, batch.state)
        logits, values, _ = self.agent(*batch.inputs, batch.state)
        values, bootstrap_value = values[:-1], values[-1].detach()
        log_pi, log_mu = logits[:-1].log_softmax(-1), batch.logits.log_softmax(-1)
        log_acting = acting_logits[:-1].log_softmax(-1) if self.modes_differ else log_pi.detach()
        log_pi_action, log_acting_action, log_mu_action = (  # (T, B) each
            x.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
            for x in (log_pi, log_acting, log_mu))
        log_rhos = log_acting_action - log_mu_action
        # The engine answers action t with reward, done and frame of time step t + 1: whether that
        # action ended its episode is done[t + 1], and what it earned is reward[t + 1].
        rewards, discounts = batch.reward[1:], args.discounting * (~batch.done[1:]).float()
        scale, limit = batch.of_games  # (B,): of rewards, 1 but for "normalize"; of entropy
        rewards = rewards.clamp(-1, 1) if args.reward_clipping == "abs_one" else rewards * scale
        vs, pg_advantages = vtrace(log_rhos, discounts, rewards, values.detach(), bootstrap_value)

        policy_loss = -(log_pi_action * pg_advantages).sum()
        baseline_loss = 0.5 * (vs - values).square().sum()
        entropy = -(log_pi.exp() * log_pi).sum(-1)
        bonus = args.entropy_cost * entropy.minimum(limit).sum()
        left = self.learning_rate / (args.learning_rate or 1) if args.anneal_entropy else 1
        loss = policy_loss + args.baseline_cost * baseline_loss - left * bonus
        sums = {"loss/policy": policy_loss, "loss/baseline": baseline_loss, "loss/total": loss,
                "loss/entropy": entropy.sum(), "vtrace/mean_rho": log_rhos.clamp(max=0).exp().sum(),
                "policy_lag": (self.weights.version - batch.version).sum()}  # in updates
        means = torch.stack([*sums.values()]).detach() / log_rhos.numel()
        return loss, dict(zip(sums, means.unbind()))

    def backward(self):
        """Computes gradient and statistics into one flat tensor, which one transfer averages. A
        graph that is replayed writes to the same one."""
        self.optimizer.zero_grad()
        loss, statistics = self.loss()
        loss.backward()
        statistics |= dict(learning_rate=self.learning_rate, told=self.told)
        unused = [name for name, x in self.agent.named_parameters() if x.grad is None]
        if unused and not self.names:  # the first time
            say(f"no gradient reaches {', '.join(unused)}")
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in self.parameters]
        self.joint = torch.cat([x.flatten() for x in (*gradients, *statistics.values())])
        self.names, number = [*statistics, "gradient_norm"], len(statistics)
        self.gradient, self.statistics = self.joint[:-number], self.joint[-number:]

    @torch.no_grad()
    def step(self):
        """One step of RMSprop with the clipped gradient. If not all is finite, it is undone."""
        norm, averages = self.gradient.norm(), self.averages.clone()
        self.report = torch.cat([self.statistics, norm.view(1)])
        self.gradient *= (self.args.grad_norm_clipping / (norm + 1e-6)).clamp(max=1)
        parts = self.gradient.split([x.numel() for x in self.parameters])
        for parameter, part in zip(self.parameters, parts):
            parameter.grad = part.view_as(parameter)
        self.optimizer.step()
        finite = self.report.isfinite().all()
        self.averages.copy_(torch.where(finite, self.averages, averages))
        self.weights.publish(finite)  # or else the old ones again

    def update(self, learning_rate, told=False):
        """Queues an update on all processes' batches, and tells all if one is `told` to stop."""
        self.learning_rate.fill_(learning_rate)
        self.told.fill_(told)
        begun = srwm_cuda.record_event()
        (self.backward_graph or self.backward)()
        if dist.is_initialized():
            dist.all_reduce(self.joint)
            self.joint /= dist.get_world_size()  # each process has a batch of batch_size
            for buffer in self.agent.buffers():  # averages of BatchNorm
                dist.broadcast(buffer, src=0)
        (self.step_graph or self.step)()
        self.reports.add(self.names, self.report, begun)


def train(run, stop):
    """Trains until total_steps, or a signal to stop. Leaves a checkpoint in either case."""
    args = run.args
    with run.parts:  # closed in the end, the last first
        learner = run.learner = Learner(run.agent, args, run.optimizer_state)
        pool = run.pool = ActorPool(args, run.episodes, learner.weights, run.engine, run.seed, stop,
                                    num_unrolls=args.num_actors + 2)  # spare: 2; more: more lag
        run.parts.callback(pool.close)
        run.open(stop)  # log, validation, and the connection of processes
        stop.training = True  # from now on, signals save
        pool.start()  # after the last capture, beside which no thread may use CUDA
        step = run.step  # of queued updates; run.step: of those whose report has been read
        while step < run.end and learner.fill(pool):
            learner.update(args.learning_rate * (1 - step / args.total_steps), stop.is_set())
            step += run.step_size
            run.count(left=int(args.cuda))  # on a GPU, the newest is not done
            run.validate()
            run.log()
            run.save()
        run.finish()


# ============ housekeeping: what a run needs, and a reader of the paper does not ============
# In order: arguments, resuming, a run with its checkpoints and its log, main. The package of this
# name has the engine, and what any run of hours needs. "Processes" are torchrun's here.

SCRIPT = Path(__file__).name
SOURCE = Path(__file__).read_text(encoding="utf-8")  # as it runs, whatever becomes of the file
MAX_SKIPPED = 50  # updates in a row that are not finite, and so left out, before the run ends


@dataclass
class RunArgs:
    exp_name: str = Path(__file__).stem  # first part of the run's name; its folder is runs/NAME
    # of weights, levels and actions (asynchronous threads still differ, see --deterministic)
    seed: Count = 1
    # actors and learner take turns: slower, but equal seeds give equal runs, bit for bit
    deterministic: bool = False
    cuda: bool = torch.cuda.is_available()  # train on the GPU
    # run act and loss as CUDA graphs; without, print, .item() and breakpoints work there
    cuda_graphs: bool = True
    bf16: bool | None = None  # run the CNN in bfloat16 (None: where the hardware computes in it)
    # continue the run in this folder, or from this checkpoint file of it, with its own arguments
    # as defaults; auto: the newest unfinished run of the same arguments, or a new one
    resume: Path | None = None
    # begin a new run with weights and model arguments of this run or checkpoint file
    init_from: Path | None = None
    valid_num_levels: Count = 0  # levels of each game to validate on while training (0: none)
    valid_start_level: Count = 500  # the first of these levels
    valid_distribution_mode: Mode | None = None  # their mode (None: that of the training)
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline: without a network)
    wandb_project_name: str = "srwm-procgen"  # project to log to
    wandb_entity: str | None = None  # user or team to log to
    log_interval: Amount = 5.0  # seconds between status lines and entries in TensorBoard
    save_interval: Amount = 300.0  # seconds between checkpoints
    save_extra_checkpoint: Steps | None = None  # keep the checkpoint at this step too


@dataclass
class Args(ModelArgs, LearningArgs, EnvironmentArgs, RunArgs):
    """All arguments; --help shows them from the last group to the first."""


def validation_args(args, games):
    """Arguments of the actor that plays held-out levels, from their first step on."""
    mode = args.valid_distribution_mode or args.distribution_mode
    return replace(args, env=tuple(games), multi_env=None, distribution_mode=mode, noop_max=(),
                   num_levels=args.valid_num_levels, start_level=args.valid_start_level,
                   num_actors=1, num_envs=8 * len(games), num_servers=1)


def check_args(args):
    """Raises ValueError for what is not allowed. Returns the games to play."""
    arguments.check_values(args)
    if args.cuda and not torch.cuda.is_available():
        raise ValueError("--cuda needs a GPU that PyTorch can use, and there is none; --no-cuda "
                         "computes on the CPU")
    if args.cuda and NUM_LOCAL > torch.cuda.device_count():
        raise ValueError(f"--cuda needs a GPU for each process: {NUM_LOCAL}, not "
                         f"{torch.cuda.device_count()}")
    checkpoints.check_name(args.exp_name)
    if (args.save_extra_checkpoint or 0) > args.total_steps:
        raise ValueError(f"--save-extra-checkpoint must be at most --total-steps "
                         f"{args.total_steps}, got {args.save_extra_checkpoint}")
    games = check_games(args)
    arguments.check_named_games(args, games)
    if args.valid_num_levels:
        check_games(validation_args(args, games), "valid-", args)
    return games


def resolve_args(given):
    """Checked arguments without None, which a checkpoint keeps, and the games, or ValueError."""
    args, games = replace(given), check_args(given)
    if args.bf16 is None:
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        args.bf16 = (torch.cuda.is_bf16_supported(including_emulation=False) if args.cuda
                     else any(map(cpu.get, ("avx512_bf16", "amx_bf16"))))
    cores = num_cores()
    args.num_servers = args.num_servers or cores
    args.num_actors = args.num_actors or max(2, min(8, cores if args.cuda else cores // 2))
    if args.num_envs is None:
        usual = min(90, 45 * max(4, cores) // args.num_actors) if args.cuda else 36
        least = max(usual, math.ceil(args.batch_size / args.num_actors))
        args.num_envs = math.ceil(least / len(games)) * len(games)
    if args.num_envs % len(games):
        raise ValueError(f"--num-envs must be a multiple of {len(games)}, the length of the "
                         f"list of games, got {args.num_envs}")
    if args.batch_size > (most := args.num_actors * args.num_envs):
        raise ValueError(f"--batch-size must be at most {most}, the number of all environments "
                         f"(--num-actors times --num-envs), got {args.batch_size}")
    return args, games


def command_line(default):
    return arguments.command_line(Args, default, __doc__)


def from_plain(plain):
    return arguments.from_plain(plain, Args)


def parse_args(launch):
    """The arguments as given, and a checkpoint to begin with: of a run, of weights alone, or {}."""
    given, checkpoint = command_line(Args()), {}
    auto, model_names = given.resume == Path("auto"), [field.name for field in fields(ModelArgs)]
    if given.resume is not None and given.init_from is not None and not auto:
        raise ValueError("--resume and --init-from exclude each other")
    if given.init_from is not None:
        checkpoint = checkpoints.load_checkpoint(given.init_from, None)
        saved = from_plain(checkpoint["args"])
        given = command_line(Args(**{name: getattr(saved, name) for name in model_names}))
        before = [checkpoint["history"], *checkpoint["before"]]  # what the weights learned from
        checkpoint = dict(model=checkpoint["model"], before=before)
    # All take the first process's answer; after a crash, that is the run that crashed.
    given.resume = path = launch.agree(lambda: unfinished_run(given) if auto else given.resume)
    if path is not None:
        checkpoint = checkpoints.load_checkpoint(path, SCRIPT)
        if not checkpoint["optimizer"]:
            raise ValueError(f"--resume needs a run, but {path} has only weights: --init-from "
                             "begins one with them")
        saved = replace(from_plain(checkpoint["args"]), resume=None)
        given = replace(command_line(saved), resume=path.parent if path.is_file() else path)
        for name in ["exp_name", "seed", "env", "multi_env", "distribution_mode", "num_levels",
                     "start_level", "reward_clipping", "carry_state", *model_names]:
            old, new = (arguments.as_typed(getattr(x, name)) for x in (saved, given))
            if old != new and not (name == "multi_env" and {old, new} == {None, 6}):
                raise ValueError(
                    f"{arguments.flag(name)} cannot become {new} in {given.resume}, which began "
                    f"with {old}; --init-from begins a new run with its weights")
        if RANK == 0 and checkpoint["step"] < given.total_steps:
            checkpoints.lock(given.resume)
            checkpoint = checkpoints.load_checkpoint(path, SCRIPT)  # whoever had it may have saved
    return given, checkpoint


def unfinished_run(given):
    """The newest run with these arguments that has steps left and is not in use, now locked."""
    def wanted(checkpoint):
        saved = replace(from_plain(checkpoint["args"]), resume=None)
        return saved == replace(given, resume=None) and checkpoint["step"] < given.total_steps
    return checkpoints.find_and_lock(f"{given.exp_name}__{given.seed}__", SCRIPT, wanted)


def make_agent(args, checkpoint):
    """The agent, new or with the checkpoint's weights, on its device. Raises ValueError for sizes
    that do not fit."""
    if args.cuda:
        torch.cuda.set_device(LOCAL_RANK)
        torch.cuda.set_stream(torch.cuda.Stream())  # the learner's: the default cannot capture
        torch.use_deterministic_algorithms(args.deterministic, warn_only=True)  # a CPU's always are
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as cuBLAS needs for that
    torch.manual_seed(args.seed)
    agent = Agent(args).to("cuda" if args.cuda else "cpu")
    if checkpoint:
        checkpoints.load_weights(agent, checkpoint)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = not args.deterministic
    return agent


class Run:
    """What a run carries from one start to the next, and its folder."""

    def __init__(self, launch, given, checkpoint):
        self.launch, (self.args, games) = launch, resolve_args(given)
        make_envs(self.args, games, len(games), self.args.seed)  # fails early if procgen does
        self.step, self.before = checkpoint.get("step", 0), checkpoint.get("before", [])
        self.history = [*checkpoint.get("history", ()), self.new_part(given)]
        # A resumed run plays on, not again; each process has its range.
        self.seed = (self.args.seed + self.step) * 1000 + RANK * 2**16
        self.parts = contextlib.ExitStack()  # to close in the end
        self.engine = Engine(make_envs, self.args, games, self.seed, FRAME_SHAPE)
        self.parts.callback(self.engine.close)
        if self.args.valid_num_levels and RANK == 0:
            valid_args = validation_args(self.args, games)
            seed = self.engine.next_seed
            self.valid_engine = Engine(make_envs, valid_args, games, seed, FRAME_SHAPE)
            self.parts.callback(self.valid_engine.close)
        self.agent = make_agent(self.args, checkpoint)  # after the forks, which bar CUDA before
        self.optimizer_state = checkpoint.get("optimizer")
        self.episodes = Episodes(games, checkpoint.get("episodes"))
        now, then = self.history[-1]["args"], checkpoint.get("args", {})
        same = all(then.get(name) == now[name] for name in now if name.startswith("valid_"))
        self.valid_episodes = Episodes(games, checkpoint.get("valid_episodes") if same else None)
        self.step_size = self.args.unroll_length * self.args.batch_size * NUM_PROCESSES
        self.end, self.failed = self.args.total_steps, None  # when to stop, and why
        self.updates = self.skipped = self.skipped_in_a_row = 0  # skipped: not finite
        self.folder = given.resume
        if RANK == 0:
            name = f"{self.args.exp_name}__{self.args.seed}"
            self.folder = self.folder or checkpoints.make_folder(name)
            checkpoints.lock(self.folder)
            checkpoints.keep_script(self.folder, SCRIPT, SOURCE)
            say(self.describe(games))

    def new_part(self, given):
        """What trains from this step on: one for the beginning, and one for each resume."""
        args = arguments.to_plain(replace(given, resume=None))
        if from_plain(args) != replace(given, resume=None):
            raise ValueError("a checkpoint cannot hold these arguments: one of them would come "
                             "back as something else")
        return dict(step=self.step, args=args, sha256=hashlib.sha256(SOURCE.encode()).hexdigest(),
                    srwm_cuda=srwm_cuda.SHA256, housekeeping=housekeeping.SHA256,
                    processes=NUM_PROCESSES)

    def describe(self, games):
        """The first line."""
        args, encoder = self.args, getattr(self.agent, "encoder", None)
        numbers = sum(parameter.numel() for parameter in self.agent.parameters())
        device = torch.cuda.get_device_name() if args.cuda else "the CPU"
        cnn = "PyTorch, since Encoder was changed" if args.cuda and args.bf16 else "PyTorch"
        if isinstance(encoder, Encoder) and encoder.fused():
            cnn = "kernels"
        begin = f" with the weights of {args.init_from}" if args.init_from else ""
        begin = f" from {self.step:,} on" if self.step else begin
        games = [f"{n} x {game}" if n > 1 else game for game, n in Counter(games).items()]
        line = (f"{self.folder}: {', '.join(games)} ({args.distribution_mode}), "
                f"{args.total_steps:,} steps{begin}, {args.num_actors} actors x {args.num_envs} "
                f"environments, {numbers:,} parameters on {device}, the CNN: {cnn}, processes: "
                f"{NUM_PROCESSES}")
        if self.step and (old := self.history[-2]["args"]["total_steps"]) != args.total_steps:
            then, now = (max(0, 1 - self.step / total) for total in (old, args.total_steps))
            line += (f"\nwith --total-steps {args.total_steps:,} instead of {old:,}, the learning "
                     f"rate goes on at {now:.0%} of its start, not at {then:.0%}")
        return line

    def open(self, stop):
        """Begins log and validation, and connects the processes."""
        args, weights, self.validation = self.args, self.learner.weights, None
        if RANK == 0:
            track = dict(project=args.wandb_project_name, entity=args.wandb_entity)
            entries = Log(self.folder, self.step, arguments.to_plain(args), args.track and track)
            self.entries = self.parts.enter_context(contextlib.closing(entries))
            if args.valid_num_levels:
                self.validation = Validation(args, self.valid_episodes, weights, self.valid_engine,
                                             self.seed + args.num_actors, stop)
                self.parts.callback(self.validation.close)
                self.validation.start()
            self.look_at_checkpoints()
        if NUM_PROCESSES > 1:
            self.launch.join("nccl" if args.cuda else "gloo", self.step)
            for tensor in self.agent.state_dict().values():  # other processors round differently
                dist.broadcast(tensor, src=0)
            weights.publish()
        self.logged = self.saved = time.monotonic()
        self.sums, self.waits, self.step_logged = Counter(), self.total_waits(), self.step

    def look_at_checkpoints(self):
        """Which returns best.pt has, and whether the extra checkpoint is still to be written."""
        self.best, self.lost_best, self.lost_extra = -math.inf, False, False  # lost: not written
        with contextlib.suppress(ValueError):  # it may be newer than the checkpoint, or not there
            best = checkpoints.load_checkpoint(self.folder / "best.pt", SCRIPT)
            now = self.history[-1]["args"]
            if all(best["args"].get(x) == now[x] for x in now if x.startswith("valid_")):
                self.best = best["best"]
        files = self.folder.glob("checkpoint_*.pt")
        steps = [path.stem.removeprefix("checkpoint_") for path in files]
        kept = max([int(step) for step in steps if step.isdecimal()], default=0)
        wanted = self.args.save_extra_checkpoint or math.inf
        self.extra = math.inf if wanted <= min(self.step, kept) else wanted  # from which step on

    def count(self, left):
        """Counts updates, all but the last `left`."""
        self.save_due = RANK == 0 and time.monotonic() - self.saved >= self.args.save_interval
        for statistics, finite in self.learner.reports.read(0 if self.save_due else left):
            told = statistics.pop("told")
            self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
            if self.skipped_in_a_row == MAX_SKIPPED:
                self.failed = (f"{MAX_SKIPPED} updates in a row, the last after step "
                               f"{self.step:,}, are not finite: {statistics}")
            if told or self.failed:  # all stop after the next one: some have queued it by now
                self.end = min(self.end, self.step + 2 * self.step_size)
            self.step += self.step_size
            self.updates, self.skipped = self.updates + 1, self.skipped + (not finite)
            if finite:
                self.sums.update(statistics | dict(updates=1))

    def validate(self):
        """Lets the validation's actor play on, if it is time to."""
        if self.validation:
            self.validation.after_update(self.updates + len(self.learner.reports.queued))

    def log(self, at_once=False):
        """Logs the updates since the last entry, and saves the best checkpoint, when it is due."""
        due = time.monotonic() - self.logged >= self.args.log_interval
        if RANK > 0 or not self.sums or not (due or at_once):
            return
        now, counts, waits = time.monotonic(), self.sums, self.total_waits()
        passed, updates = now - self.logged, counts.pop("updates")
        sps = (self.step - self.step_logged) / passed
        scalars = {name: value / updates for name, value in counts.items()} | dict(SPS=sps)
        scalars |= {name: np.divide(*(waits[name] - self.waits[name])) for name in waits}
        diverged = sum(int(actor.num_diverged) for actor in self.pool.actors)
        scalars |= (unusual := dict(skipped_updates=self.skipped, reset_states=diverged))
        mode, valid_mode = self.args.distribution_mode, self.args.valid_distribution_mode
        scalars |= (means := self.episodes.scalars(mode, RETURN_RANGE))
        valid = self.valid_episodes.scalars(valid_mode or mode, RETURN_RANGE)
        scalars |= {f"valid_{name}": value for name, value in valid.items()}
        kinds = ("normalized_return/mean", "return/mean")
        mean, valid_mean = (next((name for name in kinds if name in found), None)
                            for found in (means, valid))
        if mean in valid:
            scalars["generalization_gap"] = means[mean] - valid[mean]
        self.entries.write(scalars, self.step)
        first = self.step_logged == self.history[-1]["step"]  # with what the start took
        self.logged, self.step_logged, self.waits, self.sums = now, self.step, waits, Counter()
        total = self.args.total_steps
        left = timedelta(seconds=round(max(0, total - self.step) / max(sps, 1e-9)))
        parts = [f"step {self.step:,} of {total:,}", f"{sps:,.0f} steps/s"]
        parts += [f"{left} left"] * (not first)
        returns = "{} of {} environments have ended an episode".format(*have_ended(self.pool))
        if mean and each_has_ended(self.pool):
            kind = mean.split("/")[0].replace("_", " ")
            number = sum(map(len, self.episodes.recent.values()))
            returns = f"mean {kind} {means[mean]:.3f} of {number} episodes"
        if valid_mean and each_has_ended(self.validation):
            returns += f", validation {valid[valid_mean]:.3f}"
        parts.append(returns)
        parts += [f"{name.replace('_', ' ')}: {count}" for name, count in unusual.items() if count]
        say(" | ".join(parts))
        if valid_mean and self.valid_episodes.full() and valid[valid_mean] > self.best:
            self.lost_best = not self.write("best.pt", valid[valid_mean])
            self.best = self.best if self.lost_best else valid[valid_mean]

    def total_waits(self):
        """Seconds waited so far, and in all, as means of each kind: by the learner for unrolls, by
        actors for unrolls that it is done with, and by the engine's processes for actions."""
        now, actors = time.monotonic(), self.pool.actors
        return {"wait/learner": self.learner.reports.idle_and_all,
                "wait/actors": np.array([sum(each.waited for each in actors) / len(actors), now]),
                "wait/engine": np.array([now - self.engine.seconds_played(), now])}

    def save(self):
        """Writes the checkpoints that are due."""
        if RANK > 0:
            return
        newest = self.step + self.step_size * len(self.learner.reports.queued)
        if newest >= self.extra and (self.save_due or not self.lost_extra):
            self.lost_extra = not self.write("checkpoint_{step}.pt")
            self.extra = self.extra if self.lost_extra else math.inf
        if self.save_due:
            if self.write("checkpoint.pt"):
                self.launch.remember(self.folder)
            self.saved = time.monotonic()

    def finish(self):
        """Logs and saves what training ends with."""
        written = True
        self.count(left=0)
        if self.failed:
            raise FloatingPointError(self.failed)
        if RANK == 0:
            self.log(at_once=True)
            written = all([self.write("checkpoint.pt"),  # at first: a scheduler may kill soon
                           self.step < self.extra or self.write("checkpoint_{step}.pt"),
                           not self.lost_best])
        if NUM_PROCESSES > 1:
            dist.destroy_process_group()
        if not written:
            sys.exit(1)
        if RANK == 0:
            args, ended = self.args, self.step >= self.args.total_steps
            few = " --splits train --no-greedy --episodes 20" * (0 < args.num_levels < 20)
            more = f" --total-steps {2 * args.total_steps}" * ended
            say(f"saved {self.folder / 'checkpoint.pt'} at step {self.step:,}\n"
                f"next: python evaluate.py {self.folder}{few}\n"
                f"  or: python {SCRIPT} --resume {self.folder}{more}")

    def write(self, name, best=-math.inf):
        """Writes a checkpoint of this name. Returns whether it could."""
        self.count(left=0)  # what has changed the weights
        checkpoint = dict(script=SCRIPT, args=self.history[-1]["args"], history=self.history,
                          before=self.before, step=self.step, best=best,
                          model=self.agent.state_dict(),
                          optimizer=self.learner.optimizer.state_dict(),
                          episodes=self.episodes.saved(),
                          valid_episodes=self.valid_episodes.saved())
        return checkpoints.save_checkpoint(checkpoint, self.folder / name.format(step=self.step))


class Validation(ActorPool):
    """An actor that plays held-out levels with the newest weights. Nothing is learned from it."""

    def __init__(self, args, episodes, weights, engine, seed, stop):
        super().__init__(engine.args, episodes, weights, engine, seed, stop, num_unrolls=1)
        self.interval = math.ceil(self.args.num_envs / (0.03 * args.batch_size))  # 3 % of steps

    def after_update(self, number):
        self.check()
        if number % self.interval == 0 and (self.args.deterministic or self.full.qsize()):
            self.free.put(self.get())


def main():
    stop = Stop()
    before = answer_signals([stop.hear, stop.hear])
    processes.keep_freed_memory()
    torch.set_num_threads(min(torch.get_num_threads(), num_cores()))  # a container may have fewer
    try:
        try:
            launch = Launch()
            given, checkpoint = parse_args(launch)
            step, total = checkpoint.get("step", 0), given.total_steps
            if (folder := given.resume) is not None and step >= total:
                return say(f"{folder} is finished, at step {step:,} of {total:,}: nothing to do")
            run = Run(launch, given, checkpoint)
        except BrokenPipeError:  # of --help | head
            os._exit(0)
        except (ValueError, OSError) as error:  # not from training, where these would be bugs
            print(f"{SCRIPT}: error: {error}", file=sys.stderr)
            sys.exit(2)
        train(run, stop)
    except (ChildProcessError, FloatingPointError, TimeoutError) as error:
        sys.exit(f"{SCRIPT}: stopped, the last checkpoint is kept: {error}")
    except RuntimeError as error:
        if type(error) is not torch.OutOfMemoryError and "can't allocate memory" not in str(error):
            raise
        sys.exit(f"{SCRIPT}: too little memory; lower --num-envs or --num-actors (unrolls, "
                 f"inference) or --batch-size (learner): {str(error).splitlines()[0]}")
    finally:  # for programs that call this, or a notebook
        checkpoints.unlock_all()
        answer_signals(before)


if __name__ == "__main__":
    main()
