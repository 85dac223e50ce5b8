"""IMPALA on ProcGen with a self-referential weight matrix (SRWM): a network that modifies its own weights as it plays.

Paper: A Modern Self-Referential Weight Matrix That Learns to Modify Itself (Irie et al., ICML 2022, arXiv 2202.05780).
Learning: IMPALA (Espeholt et al. 2018, arXiv 1802.01561), asynchronous actors and V-trace, in one process.

    python impala_procgen_srwm.py --multi-env 6        learns six games
    python impala_procgen_srwm.py --env maze           or a single one
    python impala_procgen_srwm.py --resume runs/NAME   continues a run
    python evaluate.py --start-level 1000              scores it on new levels

    Engine -- frame, reward, done --> Actor -- full Unroll --> Learner
       ^                              |   ^                       |
       '----------- action -----------'   '------- Weights -------'

The story comes first, then housekeeping. For an ablation, copy this file. In shapes, T is time steps, B environments,
H heads of size D. Expect about 275,000 steps a second on one H200 with 16 cores, and 300 to 1,000 on two CPU cores.
"""

import contextlib
import hashlib
import math
import os
import queue
import re
import signal
import sys
import threading
import time
import weakref
import zipfile
from collections import Counter, deque
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta
from enum import Enum
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard import SummaryWriter

sys.path.append(str(Path(__file__).parent))  # where srwm_cuda is, also with PYTHONSAFEPATH
import srwm_cuda
from srwm_cuda import processes
from srwm_cuda.engine import ProcgenGym3Env

Mode = Literal["easy", "hard", "extreme", "memory"]
FRAME_SHAPE, NUM_ACTIONS, FEATURES = (64, 64, 3), 15, 256  # FEATURES: what the encoder makes of a frame
Steps = Annotated[int, tyro.constructors.PrimitiveConstructorSpec(1, "INT", lambda word: int(min(float(word[0]), 1e16)),
                  lambda value: isinstance(value, int), lambda value: [str(value)])]  # may be written as 1e6


@dataclass
class EnvironmentArgs:
    multi_env: int | None = None  # train on the first N games at once (None: 6, unless --env names one)
    env: str | None = None  # train on this game alone
    distribution_mode: Mode = "easy"  # each has its own list of games
    num_levels: int = 200  # levels of each game to train on; 0: all
    start_level: int = 0  # the first of these levels
    num_actors: int | None = None  # actors, each with a vector of environments (None: by the number of cores)
    num_envs: int | None = None  # environments of each, a multiple of the games (None: at least 90, on a CPU 36)
    num_servers: int | None = None  # processes that play the environments (None: one for each core)
    valid_num_levels: int = 0  # levels of each game to validate on while training (0: no validation)
    valid_start_level: int = 500  # the first of these levels
    valid_distribution_mode: Mode | None = None  # their distribution mode (None: that of the training)


@dataclass
class LearningArgs:
    total_steps: Steps = 300_000_000  # environment steps to learn from, over which the learning rate falls to zero
    unroll_length: int = 50  # steps T of an unroll
    batch_size: int = 32  # unrolls B in an update
    learning_rate: float = 6e-4  # of RMSprop, at the start
    alpha: float = 0.99  # RMSprop's smoothing constant
    epsilon: float = 0.01  # RMSprop's epsilon
    momentum: float = 0.0  # RMSprop's momentum
    grad_norm_clipping: float = 40.0  # largest norm of the gradient
    discounting: float = 0.99  # discount factor
    baseline_cost: float = 0.5  # weight of the value loss
    entropy_cost: float = 0.01  # weight of the entropy bonus
    # abs_one: clamp rewards to [-1, 1] for learning; normalize: divide by the spread of a game's returns; none: neither
    reward_clipping: Literal["abs_one", "normalize", "none"] = "abs_one"
    carry_state: bool = True  # keep the recurrent state from unroll to unroll; without, the state-reset ablation


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv0, self.conv1 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.conv1(F.relu(self.conv0(F.relu(x))))


class Encoder(nn.Module):
    """IMPALA's residual CNN (Espeholt et al. 2018, figure 3): frames (N, 64, 64, 3) uint8 to features (N, 256)."""

    def __init__(self, args):
        super().__init__()
        layers, channels = [], FRAME_SHAPE[-1]
        for out in (16, 32, 32):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.MaxPool2d(3, 2, 1), Residual(out), Residual(out)]
            channels = out
        self.cnn, self.fc = nn.Sequential(*layers), nn.Linear(channels * 8 * 8, FEATURES)  # 64 is halved three times
        self.dtype = torch.bfloat16 if args.bf16 else torch.float32
        self.kernels, self.built, self.compiled = args.cuda and args.bf16, str(self.cnn), None
        if not self.fused():
            self.to(memory_format=torch.channels_last)
            if self.kernels and args.cuda_graphs:
                torch._dynamo.config.suppress_errors = True  # what does not compile runs as it is, with a warning
                self.compiled = torch.compile(self.conv, dynamic=False)

    def fused(self):
        """Whether the kernels compute the CNN: where they can run, and only as this text says and makes it."""
        same = str(self.cnn) == self.built if self.kernels else False
        return same and srwm_cuda.is_impala_cnn(self.cnn, SOURCE, type(self), Residual)

    def forward(self, frames):
        if not frames.is_cuda and len(frames) > 240 and not [*self.buffers()]:  # a CPU's caches hold a piece
            return torch.cat([self.forward(piece) for piece in frames.split(240)])
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            if self.fused():
                x = srwm_cuda.impala_cnn(frames, *self.cnn.parameters())
            else:
                x = (self.compiled or self.conv)(frames)
            return F.relu(self.fc(F.relu(x))).float()

    def conv(self, frames):
        return self.cnn(frames.permute(0, 3, 1, 2).to(self.dtype) / 255.0).flatten(1)


# ================================== model: all that differs between the six scripts ==================================


@dataclass
class ModelArgs:
    num_layers: int = 2  # SRWM layers, each with a feed-forward block
    hidden_size: int = 128  # width of the recurrent core
    # heads of an SRWM layer; on a GPU hidden_size / num_head must be 8, 16, 32 or 64 (with 8, matrices may diverge)
    num_head: int = 8
    bptt_length: int | None = None  # cut the state's gradient every N steps (None: whole unrolls; 1: as the reference)


class SRWM(nn.Module):
    """Self-referential weight matrices (Irie et al. 2022, section 3), one for each head. A step, with W = W_0 + state:
    y, q, k, b = split(x W); q, k = softmax(q), softmax(k); state += sigmoid(b) * outer(k, (q - k) W), where each of the
    four groups of columns, y, q, k and b, has a b of its own."""

    def __init__(self, args):
        super().__init__()
        H, D = args.num_head, args.hidden_size // args.num_head
        self.W = nn.Parameter(torch.randn(H, D, 3 * D + 4) / D**0.5)  # initial matrix, columns [y | q | k | beta]
        self.out = nn.Linear(H * D, H * D, bias=False)
        self.bptt_length = args.bptt_length

    def initial_state(self, batch_size):
        return self.W.new_zeros(batch_size, *self.W.shape)  # the change of W since the episode began

    def forward(self, h, state, done):  # h (T, B, H * D); done (T, B): the state is zero before that step
        x = h.unflatten(-1, self.W.shape[:2]).softmax(-1)
        y, state = srwm_cuda.srwm(x, self.W, state, done, self.bptt_length)
        return h + self.out(y.flatten(-2)), state


def feed_forward_block(size):
    return nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 4 * size), nn.ReLU(), nn.Linear(4 * size, size))


class Agent(nn.Module):
    state_bound = 100.0  # reset_diverged() zeroes a state that reaches it: it would only grow (in healthy runs: 1.5)

    def __init__(self, args):
        super().__init__()
        if args.hidden_size % args.num_head:
            raise ValueError(f"--num-head must divide --hidden-size {args.hidden_size}, got {args.num_head}")
        if args.cuda and args.hidden_size // args.num_head not in srwm_cuda.KERNEL_HEAD_SIZES:
            raise ValueError(f"--hidden-size / --num-head must be one of {srwm_cuda.KERNEL_HEAD_SIZES} on a GPU, "
                             f"got {args.hidden_size} / {args.num_head}")
        self.encoder = Encoder(args)
        self.input = nn.Linear(FEATURES + 1, args.hidden_size)  # and the last reward
        self.layers = nn.ModuleList(SRWM(args) for _ in range(args.num_layers))
        self.feed_forward = nn.ModuleList(feed_forward_block(args.hidden_size) for _ in range(args.num_layers))
        self.policy, self.baseline = nn.Linear(args.hidden_size, NUM_ACTIONS), nn.Linear(args.hidden_size, 1)

    def initial_state(self, batch_size):  # zeros (B, ...), as at the start of an episode
        return tuple(layer.initial_state(batch_size) for layer in self.layers)

    def forward(self, obs, reward, done, state):  # obs (T, B, 64, 64, 3) uint8; reward, done (T, B)
        features = self.encoder(obs.flatten(0, 1)).unflatten(0, obs.shape[:2])  # (T, B, 256)
        last_reward = reward.masked_fill(done, 0).clamp(-1, 1).unsqueeze(-1)  # an episode begins with none
        h = self.input(torch.cat([features, last_reward], dim=-1))
        new_state = []
        for layer, feed_forward, layer_state in zip(self.layers, self.feed_forward, state):
            h, layer_state = layer(h, layer_state, done)
            h = h + feed_forward(h)
            new_state.append(layer_state)
        return self.policy(h), self.baseline(h).squeeze(-1), tuple(new_state)  # (T, B, 15), (T, B), state


# ================================================= end of the model ================================================


@torch.no_grad()
def vtrace(log_rhos, discounts, rewards, values, bootstrap_value):
    """V-trace targets and policy-gradient advantages (Espeholt et al. 2018, section 4.1) with all weights clipped at 1.

    log_rhos (log(pi / mu) of the actions taken), discounts, rewards and values: (T, B). bootstrap_value (V at step T):
    (B,). Returns vs and pg_advantages, (T, B) each, without gradient.
    """
    rhos = log_rhos.exp().clamp(max=1.0)
    next_values = torch.cat([values[1:], bootstrap_value.unsqueeze(0)])
    deltas = rhos * (rewards + discounts * next_values - values)
    # vs - V at step s is the sum over t >= s of deltas[t], times the product of discounts * rhos from s to t - 1. All s
    # and t at once: a loop over time would be a hundred small kernels.
    steps = torch.arange(len(values), device=values.device)
    s, t = steps.view(-1, 1, 1), steps.view(1, -1, 1)
    factors = torch.cat([torch.ones_like(values[:1]), (discounts * rhos)[:-1]])  # of step t - 1
    products = torch.where(t > s, factors, 1.0).cumprod(dim=1)  # (T, T, B), by s and t
    vs = values + torch.where(t >= s, products * deltas, 0.0).sum(dim=1)
    next_vs = torch.cat([vs[1:], bootstrap_value.unsqueeze(0)])
    return vs, rhos * (rewards + discounts * next_vs - values)


def make_envs(args, games, num, seed, num_threads=0, **options):
    """`num` environments in one vector; number n plays games[n % len(games)]. num_threads 0: the caller steps them.
    What `observe` of the vector, or of a wrapper around it, returns is what the agent sees, here and in evaluation."""
    options |= dict(distribution_mode=args.distribution_mode, num_levels=args.num_levels, start_level=args.start_level)
    return ProcgenGym3Env(num, ",".join(games), rand_seed=seed % 2**31, num_threads=num_threads, **options)


class Engine:
    """Processes that play the environments of all actors. Each has a part of those of two actors or more, and plays for
    one while the policy of another computes. What passes between it and an actor lies in memory that they share: a
    block for each actor. Each of its processes has a flag there: 1 while it is its turn, 0 while it is the policy's."""

    def __init__(self, args, games, seed):
        self.args, self.games, B = args, games, args.num_envs
        groups = max(1, min(args.num_actors // 2, args.num_servers))  # of actors that share processes
        vectors, self.blocks, self.next_seed = [[] for _ in range(min(args.num_servers, groups * B))], [], seed
        for actor in range(args.num_actors):
            owners = range(len(vectors))[actor % groups :: groups]
            self.blocks.append(block := make_block(B, owners))
            for n, owner in enumerate(owners):
                part = slice(B * n // len(owners), B * (n + 1) // len(owners))
                vectors[owner].append((block, part, block.flags[n].numpy(), self.next_seed))
                self.next_seed += 1
        self.processes = []
        self.close, self.watch = weakref.finalize(self, processes.end, self.processes), Watch(self)
        self.processes.extend(processes.fork(self.serve, each) for each in vectors)

    def serve(self, vectors):
        """What a process does: it plays a step of each vector whose flag is 1."""
        vectors = [(flag, self.play(*vector, flag, seed)) for *vector, flag, seed in vectors]
        idle_since = time.monotonic()
        while True:
            for flag, steps in vectors:
                if flag[0]:
                    next(steps)
                    idle_since = time.monotonic()
            idle = time.monotonic() - idle_since
            os.sched_yield() if idle < 2e-4 else time.sleep(min(2e-3, idle / 10))

    def play(self, block, part, flag, seed):
        """A generator that plays a step whenever it goes on."""
        games = [self.games[n % len(self.games)] for n in range(part.start, part.stop)]
        *inputs, action = (x.numpy()[part] for x in (block.obs, block.reward, block.done, block.action))
        envs = make_envs(self.args, games, len(games), seed, frames=inputs[0])  # which the engine draws to
        while True:
            reward, obs, done = envs.observe()
            for shared, new in zip(inputs, (obs["rgb"], reward, done)):
                if new is not shared:
                    np.concatenate([new], out=shared)  # a copy; an error if it is of another shape or kind of numbers
            flag[1] += 1  # for Watch
            flag[0] = 0
            yield
            envs.act(action.astype(np.int32))


class Unroll:
    """T + 1 time steps of B environments, in fixed memory on the learner's device; the last is the next unroll's first.
    Actors fill unrolls. The learner's batch is one too, of environments of one or more actors."""

    def __init__(self, agent, T, B):
        device = next(agent.parameters()).device
        self.obs = torch.zeros(T + 1, B, *FRAME_SHAPE, dtype=torch.uint8, device=device)
        self.reward = torch.zeros(T + 1, B, device=device)  # of the action before
        self.done = torch.zeros(T + 1, B, dtype=torch.bool, device=device)  # the frame at t is the first of an episode
        self.inputs = (self.obs, self.reward, self.done)  # of the agent
        self.action = torch.zeros(T, B, dtype=torch.int64, device=device)
        self.logits = torch.zeros(T, B, NUM_ACTIONS, device=device)  # of the policy that acted
        self.version = torch.zeros(T, B, dtype=torch.int32, device=device)  # of the weights that acted
        self.reward_scale = torch.ones(1, B, device=device)  # what to multiply rewards by, to learn from them
        self.state = agent.initial_state(B)  # before the first step
        self.read = record_event()  # to wait for before it is filled again

    def columns(self, begin, count):
        """Views of `count` environments from number `begin` on."""
        steps = (*self.inputs, self.action, self.logits, self.version, self.reward_scale)
        return [x.narrow(1, begin, count) for x in steps] + [x.narrow(0, begin, count) for x in self.state]


class Weights:
    """The newest parameters and buffers on their way from the learner to the actors, in a ring of rows on their device.
    A row is whole, and is overwritten only eight updates later: so nobody waits, and no actor sees half an update."""

    def __init__(self, agent):
        self.tensors = [*agent.parameters(), *agent.buffers()]
        self.sizes = [-(-x.nbytes // 256) * 64 for x in self.tensors] + [64]  # in float32; the last is for the version
        self.ring = self.tensors[0].new_zeros(8, sum(self.sizes), dtype=torch.float32)
        self.rows = [row_views(row, self.sizes, self.tensors) for row in self.ring]
        self.version, (self.newest, self.row) = 0, self.ring.new_zeros(2, 1, dtype=torch.int64)  # version, its row
        self.publish()

    @torch.no_grad()
    def publish(self):
        self.version += 1
        views, version = self.rows[self.version % 8]
        torch._foreach_copy_(views, self.tensors)
        version.fill_(self.version)
        self.newest.fill_(self.version)
        self.row.fill_(self.version % 8)

    @torch.no_grad()
    def restore(self):
        """Gives the learner's agent what was published last."""
        torch._foreach_copy_(self.tensors, self.rows[self.version % 8][0])

    def attach(self, agent):
        """Gives an agent a row of its own, `agent.row`, where its tensors are from now on, and `agent.version`."""
        agent.row, tensors = self.ring[0].clone(), [*agent.parameters(), *agent.buffers()]
        views, agent.version = row_views(agent.row, self.sizes, tensors)
        for tensor, view in zip(tensors, views):
            tensor.data = view

    def fetch(self, agent):
        """Gives the agent what is the newest when its device comes to it."""
        if agent.row.is_cuda or agent.version.item() != self.version:
            torch.index_select(self.ring, 0, self.row, out=agent.row.unsqueeze(0))


class Actor:
    """A vector of environments and the agent that plays it: fills unrolls, in a thread of its own. On a GPU the thread
    only queues work on a CUDA stream, a few steps in one CUDA graph: stream and engine wait for each other directly."""

    def __init__(self, index, pool):
        args, B, device = pool.args, pool.args.num_envs, torch.device("cuda" if pool.args.cuda else "cpu")
        self.args, self.pool, self.block = args, pool, pool.engine.blocks[index]
        self.free = queue.Queue() if args.deterministic else pool.free  # unrolls to fill
        self.totals = np.zeros((3, B))  # of each environment: see Episodes.add_unroll
        self.agent = Agent(args).to(device).requires_grad_(False).eval()  # no dropout, and BatchNorm's averages
        pool.weights.attach(self.agent)
        self.unroll, self.state = Unroll(self.agent, args.unroll_length, B), self.agent.initial_state(B)
        self.noise = torch.zeros_like(self.unroll.logits)
        self.generator = torch.Generator(device).manual_seed(pool.seed + index)
        self.num_diverged, self.flags = torch.zeros((), device=device), srwm_cuda.Flags(self.block.flags, device)
        self.parts = [lambda begin=begin: self.steps(begin, min(begin + 5, args.unroll_length))  # 5: steps in a graph
                      for begin in range(0, args.unroll_length, 5)]
        self.stream = prepare_stream(self) if args.cuda else None

    def steps(self, begin, end):
        """Plays time steps `begin` to `end` of the unroll."""
        if begin == 0:
            self.num_diverged += reset_diverged(self.agent, self.state)
            self.noise.exponential_(generator=self.generator).log_()  # argmax(p / Exp(1)) is a sample of p
            for first, now in zip(self.unroll.state, self.state):
                first.copy_(now if self.args.carry_state else now.zero_())
        state = self.state
        for t in range(begin, end):
            self.observe(t)
            state = self.infer(t, state)
            self.flags.set(1)
        for old, new in zip(self.state, state):
            old.copy_(new)
        if end == self.args.unroll_length:
            self.observe(end)

    def observe(self, t):
        """Waits for the environments, and uploads what they answer: once, to its place in the unroll."""
        self.flags.wait(0)
        for x, new in zip(self.unroll.inputs, (self.block.obs, self.block.reward, self.block.done)):
            x[t].copy_(new, non_blocking=True)

    @torch.no_grad()
    def infer(self, t, state):
        """The newest policy's actions at time step t. Returns the state after it."""
        self.pool.weights.fetch(self.agent)
        logits, _, state = self.agent(*(x[t : t + 1] for x in self.unroll.inputs), state)
        self.unroll.logits[t], self.unroll.version[t] = logits[0], self.agent.version
        torch.argmax(logits[0] - self.noise[t], -1, out=self.unroll.action[t])
        self.block.action.copy_(self.unroll.action[t], non_blocking=True)
        return state

    def play(self, unroll):
        """Fills the unroll with T steps."""
        if self.args.reward_clipping == "normalize":
            self.unroll.reward_scale.copy_(self.pool.episodes.reward_scale(self.args.num_envs))
        events = []
        for part in self.parts:
            for event in events[-2:-1]:  # at most two are queued: with more, starting them takes longer
                event.synchronize()
            if self.pool.closed:
                return
            part()
            events.append(record_event())
        # A CUDA graph always writes to the same addresses: so the actor fills self.unroll, and copies it to this one.
        unroll.read.wait()
        torch._foreach_copy_(unroll.columns(0, self.args.num_envs), self.unroll.columns(0, self.args.num_envs))
        synchronize()
        ended = self.unroll.reward[1:].cpu().numpy(), self.unroll.done[1:].cpu().numpy()
        self.totals = self.pool.episodes.add_unroll(*ended, self.totals)


class ActorPool:
    """Actors, and the unrolls that pass between them and the learner. With --deterministic, an actor plays only while
    the learner waits for its unroll."""

    def __init__(self, args, episodes, weights, engine, seed, stop, num_unrolls):
        self.args, self.episodes, self.weights, self.engine, self.stop = args, episodes, weights, engine, stop
        self.seed, self.games, self.closed, self.error, self.turn = seed, engine.games, False, None, 0  # turn: whose
        self.free, self.full = queue.Queue(), queue.Queue()  # a SimpleQueue may never time out after a signal
        self.actors = [Actor(i, self) for i in range(args.num_actors)]
        for _ in range(num_unrolls):
            self.free.put(Unroll(self.actors[0].agent, args.unroll_length, args.num_envs))
        self.threads = [threading.Thread(target=self.run, args=(actor,), daemon=True) for actor in self.actors]

    def start(self):
        synchronize()  # with the stream on which the actors' tensors were made
        for thread in self.threads:
            thread.start()

    def run(self, actor):
        try:
            with torch.cuda.stream(actor.stream):  # None on a CPU, where it does nothing
                while (unroll := actor.free.get()) is not None:
                    actor.play(unroll)
                    self.full.put(unroll)
                synchronize()  # what is still queued
        except BaseException as error:
            self.error = error  # for get() to raise

    def get(self):
        """The next full unroll, or None after a signal to stop. Raises what an actor died of."""
        if self.args.deterministic:
            synchronize()  # with the stream that publishes weights
            self.actors[self.turn].free.put(self.free.get())
            self.turn = (self.turn + 1) % len(self.actors)
        while not self.stop.now():
            check_actors(self)
            with contextlib.suppress(queue.Empty):
                return self.full.get(timeout=0.5)
        return None

    def close(self):
        self.closed = True
        self.engine.close()
        end_threads(self)


class Learner:
    """Agent, optimizer and the update: forward, V-trace, backward, clipping and RMSprop; on a GPU, two CUDA graphs."""

    def __init__(self, agent, args, optimizer_state=None):
        self.agent, self.args, self.weights, self.parameters = agent, args, Weights(agent), list(agent.parameters())
        self.learning_rate = next(agent.parameters()).new_tensor(args.learning_rate)  # a tensor, for a graph to read
        self.optimizer = torch.optim.RMSprop(self.parameters, self.learning_rate, args.alpha, args.epsilon,
                                             momentum=args.momentum, foreach=args.cuda, capturable=args.cuda)
        prepare_optimizer(self.optimizer, optimizer_state)
        self.batch = Unroll(agent, args.unroll_length, args.batch_size)
        self.unroll, self.column, self.names = None, 0, ()  # in use, its first column not learned from; of statistics
        self.backward_graph = self.step_graph = None
        self.batch.obs.random_(0, 256)
        torch._foreach_add_([x.data for x in self.parameters], 1e-3)  # or what starts at zero would hide a difference
        begin = [x[:2] for x in self.batch.inputs] + [self.batch.state]  # 2: BatchNorm needs more than one row
        self.modes_differ = not torch.allclose(*(self.logits(mode, *begin) for mode in (False, True)), 1e-3, 1e-4)
        if args.cuda:
            for _ in range(3):  # compilation, and cuDNN's choice of algorithms
                self.backward()
            if args.cuda_graphs:
                self.backward_graph = capture(self.backward, torch.cuda.current_stream())
                self.step_graph = capture(self.step, torch.cuda.current_stream())
        self.weights.restore()  # averages of BatchNorm that this has changed

    @torch.no_grad()
    def logits(self, training, *inputs):
        """The policy as it is in training, or as actors compute it, without dropout and with BatchNorm's averages."""
        logits, _, _ = self.agent.train(training)(*inputs)
        self.agent.train()
        return logits

    def fill(self, pool):
        """Fills the batch with the next environments of unrolls. Returns whether it did: not after a signal to stop."""
        filled = 0
        while filled < self.args.batch_size:
            if self.unroll is None:
                self.unroll, self.column = pool.get(), 0
                if self.unroll is None:
                    return False
            count = min(self.args.batch_size - filled, self.args.num_envs - self.column)
            torch._foreach_copy_(self.batch.columns(filled, count), self.unroll.columns(self.column, count))
            filled, self.column = filled + count, self.column + count
            if self.column == self.args.num_envs:
                self.unroll.read = record_event()
                pool.free.put(self.unroll)
                self.unroll = None
        return True

    def loss(self):
        """The loss, a sum over time and batch as in the paper, and statistics, means over both."""
        batch, args = self.batch, self.args
        acting_logits = self.logits(False, *batch.inputs, batch.state)[:-1] if self.modes_differ else None
        logits, values, _ = self.agent(*batch.inputs, batch.state)
        values, bootstrap_value = values[:-1], values[-1].detach()
        log_pi = logits[:-1].log_softmax(-1)
        log_acting = acting_logits.log_softmax(-1) if self.modes_differ else log_pi.detach()  # pi as actors would act
        policies, action = (log_pi, log_acting, batch.logits.log_softmax(-1)), batch.action[..., None]
        log_pi_action, log_acting_action, log_mu_action = (x.gather(-1, action)[..., 0] for x in policies)
        log_rhos = log_acting_action - log_mu_action  # (T, B)
        rewards = batch.reward[1:]  # after each action
        rewards = rewards.clamp(-1, 1) if args.reward_clipping == "abs_one" else rewards * batch.reward_scale
        discounts = args.discounting * (~batch.done[1:]).float()
        vs, pg_advantages = vtrace(log_rhos, discounts, rewards, values.detach(), bootstrap_value)

        policy_loss = -(log_pi_action * pg_advantages).sum()
        baseline_loss = 0.5 * (vs - values).square().sum()
        entropy = -(log_pi.exp() * log_pi).sum()
        loss = policy_loss + args.baseline_cost * baseline_loss - args.entropy_cost * entropy
        lag = self.weights.newest - batch.version  # (T, B), in updates
        sums = {"loss/policy": policy_loss, "loss/baseline": baseline_loss, "loss/entropy": entropy, "loss/total": loss,
                "vtrace/mean_rho": log_rhos.exp().clamp(max=1.0).sum(), "policy_lag": lag.sum()}
        means = torch.stack([*sums.values()]).detach() / log_rhos.numel()
        return loss, dict(zip(sums, means.unbind()))

    def backward(self):
        """Computes the gradient of the loss and the statistics, as one flat tensor that one transfer averages."""
        self.optimizer.zero_grad()
        loss, statistics = self.loss()
        loss.backward()
        if missing := [name for name, x in self.agent.named_parameters() if x.grad is None and not self.names]:
            say(f"no gradient reaches {', '.join(missing)}")
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in self.parameters]
        self.joint = torch.cat([x.flatten() for x in (*gradients, *statistics.values())])
        self.names, number = list(statistics), len(statistics)
        self.gradient, self.statistics = self.joint[:-number], self.joint[-number:]

    @torch.no_grad()
    def step(self):
        """One step of RMSprop with the clipped gradient."""
        self.gradient *= (self.args.grad_norm_clipping / (self.gradient.norm() + 1e-6)).clamp(max=1.0)
        for parameter, part in zip(self.parameters, self.gradient.split([x.numel() for x in self.parameters])):
            parameter.grad = part.view_as(parameter)
        self.optimizer.step()

    def update(self, learning_rate):
        """One update on all processes' batches, if all is finite. Returns statistics, and whether it is."""
        self.learning_rate.fill_(learning_rate)
        (self.backward_graph or self.backward)()
        if dist.is_initialized():
            dist.all_reduce(self.joint)
            self.joint /= dist.get_world_size()
            for buffer in self.agent.buffers():  # averages of BatchNorm
                dist.broadcast(buffer, src=0)
        values = torch.cat([self.statistics, self.gradient.norm().view(1)])
        synchronize()  # sleeps until the GPU is done: tolist() alone would keep a core busy
        statistics = dict(zip([*self.names, "gradient_norm"], values.tolist()))
        if finite := all(map(math.isfinite, statistics.values())):
            (self.step_graph or self.step)()
        else:
            self.weights.restore()  # averages of BatchNorm, which may not be finite either
        self.weights.publish()
        return statistics, finite


def train(run, stop):
    """Trains until total_steps, or until a signal says stop. Leaves a checkpoint in either case."""
    args = run.args
    with run.parts:  # which are closed in the end, the last first
        learner = run.learner = Learner(run.agent, args, run.optimizer_state)
        num_unrolls = args.num_actors + 1  # weights that acted are at most this x environments / batch updates old
        pool = ActorPool(args, run.episodes, learner.weights, run.engine, run.seed, stop, num_unrolls)
        run.parts.callback(pool.close)
        run.open(pool, stop)
        stop.training = True  # from now on, Ctrl-C saves
        pool.start()
        while run.step < args.total_steps and not stop.agreed(learner.learning_rate.device):
            if not learner.fill(pool):
                break
            learning_rate = args.learning_rate * (1 - run.step / args.total_steps)
            run.after_update(*learner.update(learning_rate))
        run.finish()


# ====================== housekeeping: what a run needs, and a reader of the paper does not ======================
# In order: arguments, command line, a run with its checkpoints and its log, engine, CUDA, processes, signals, main.

# The games in the order of --multi-env, and the ranges that normalize their returns (Cobbe et al. 2020, appendix C).
RETURN_RANGE = {
    "bigfish": {"easy": (1, 40), "hard": (0, 40)}, "fruitbot": {"easy": (-1.5, 32.4), "hard": (-0.5, 27.2)},
    "maze": {"easy": (5, 10), "hard": (4, 10)}, "leaper": {"easy": (3, 10), "hard": (1.5, 10)},
    "plunder": {"easy": (4.5, 30), "hard": (3, 30)}, "starpilot": {"easy": (2.5, 64), "hard": (1.5, 35)},
    "miner": {"easy": (1.5, 13), "hard": (1.5, 20)}, "bossfight": {"easy": (0.5, 13), "hard": (0.5, 13)},
    "caveflyer": {"easy": (3.5, 12), "hard": (2, 13.4)}, "chaser": {"easy": (0.5, 13), "hard": (0.5, 14.2)},
    "climber": {"easy": (2, 12.6), "hard": (1, 12.6)}, "coinrun": {"easy": (5, 10), "hard": (5, 10)},
    "dodgeball": {"easy": (1.5, 19), "hard": (1.5, 19)}, "heist": {"easy": (3.5, 10), "hard": (2, 10)},
    "jumper": {"easy": (3, 10), "hard": (1, 10)}, "ninja": {"easy": (3.5, 10), "hard": (2, 10)},
}
GAMES = {"easy": list(RETURN_RANGE), "hard": list(RETURN_RANGE),
         "extreme": ["leaper", "starpilot", "chaser", "dodgeball"],
         "memory": ["dodgeball", "heist", "maze", "miner", "caveflyer", "jumper"]}
NUMBERS = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}  # which torchrun sets
RANK, LOCAL_RANK, NUM_PROCESSES, NUM_PROCESSES_HERE = (
    int(os.environ[name]) if os.environ.get(name, "").isdecimal() else default for name, default in NUMBERS.items())
SCRIPT = Path(__file__).name
SOURCE = Path(__file__).read_text(encoding="utf-8")  # as it runs, whatever becomes of the file
STUCK_AFTER = 20  # seconds without an answer from environments
MAX_SKIPPED = 50  # updates in a row that are not finite, and so left out, before the run ends
locks = {}  # open files by a run's folder: the system unlocks them when this process ends


@dataclass
class RunArgs:
    exp_name: str = Path(__file__).stem  # first part of the run's name; the run's folder is runs/NAME
    seed: int = 1  # of weights, levels and actions (asynchronous threads still make runs differ, see --deterministic)
    deterministic: bool = False  # actors and learner take turns: slower, but equal seeds give equal runs, bit for bit
    cuda: bool = torch.cuda.is_available()  # train on the GPU
    cuda_graphs: bool = True  # run act and loss as CUDA graphs; without, print, .item() and breakpoints work there
    bf16: bool | None = None  # run the CNN in bfloat16 (None: where the hardware computes in it)
    # continue the run in this folder, or from this checkpoint file of it, with its own arguments as defaults;
    # auto: continue the newest unfinished run of the same arguments, or begin a new one
    resume: Path | None = None
    init_from: Path | None = None  # begin a new run with weights and model arguments of this run or checkpoint file
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline works without a network)
    wandb_project_name: str = "srwm-procgen"  # project to log to
    wandb_entity: str | None = None  # user or team to log to
    log_interval: float = 5.0  # seconds between two status lines and entries in TensorBoard
    save_interval: float = 300.0  # seconds between two checkpoints
    save_extra_checkpoint: int | None = None  # keep the checkpoint at this step too


@dataclass
class Args(ModelArgs, LearningArgs, EnvironmentArgs, RunArgs):
    """All arguments; --help shows them from the last group to the first."""


def check_values(args):
    """Raises ValueError for a number or a choice that is not allowed, also where it comes from a checkpoint."""
    may_be_zero = ("seed", "num_levels", "start_level", "valid_num_levels", "valid_start_level")
    always_positive = ("epsilon", "grad_norm_clipping")
    at_most_one = ("discounting", "alpha", "momentum")
    for field in fields(args):
        name, value = field.name, getattr(args, field.name)
        if get_origin(field.type) is Literal and value not in get_args(field.type):
            allowed = ", ".join(get_args(field.type))
            raise ValueError(f"--{name.replace('_', '-')} must be one of {allowed}, got {value}")
        if type(value) in (int, float):
            positive = type(value) is int and name not in may_be_zero or name in always_positive
            most = 1 if name in at_most_one else 1e15 if "step" in name or "checkpoint" in name else 2**31 - 1
            if not 0 <= value <= most or positive and value == 0:
                least = "positive" if positive else "at least 0"
                raise ValueError(f"--{name.replace('_', '-')} must be {least} and at most {most:.0f}, got {value}")


def check_games(games, args, valid=""):
    """Raises ValueError unless the engine, which would abort the process, can play these levels of these games."""
    mode = args.distribution_mode
    if mode not in GAMES:
        raise ValueError(f"--{valid}distribution-mode must be one of {', '.join(GAMES)}, got {mode}")
    if unknown := [game for game in games if game not in GAMES[mode]]:
        allowed = ", ".join(GAMES[mode])
        raise ValueError(f"--env must be one of {allowed} in {valid}distribution mode {mode}, got {unknown[0]}")
    if args.start_level > 0 and args.num_levels == 0:
        raise ValueError("--start-level needs --num-levels: with 0, all levels, procgen ignores it")
    if args.start_level + args.num_levels >= 2**31:
        raise ValueError(f"--{valid}start-level plus --{valid}num-levels must be less than {2**31}")


def validation_args(args, games):
    """The arguments of the actor that plays held-out levels."""
    return replace(args, num_levels=args.valid_num_levels, start_level=args.valid_start_level, num_actors=1,
                   num_envs=8 * len(games), num_servers=1,
                   distribution_mode=args.valid_distribution_mode or args.distribution_mode)


def resolve_args(given):
    """Checks the arguments and fills in what is None, which a checkpoint keeps: it is decided anew on the machine that
    continues. Returns them, and the games to play. Raises ValueError."""
    args = replace(given)
    check_values(args)
    if args.cuda and not torch.cuda.is_available():
        raise ValueError("--cuda needs a GPU that PyTorch can use, and there is none; --no-cuda computes on the CPU")
    if args.cuda and NUM_PROCESSES_HERE > torch.cuda.device_count():
        raise ValueError(f"--cuda needs a GPU for each process: {NUM_PROCESSES_HERE}, not {torch.cuda.device_count()}")
    if Path(args.exp_name).name != args.exp_name or not args.exp_name.isprintable() or len(args.exp_name) > 200:
        raise ValueError(f"--exp-name must be a folder's name, got '{args.exp_name}'")
    if (args.save_extra_checkpoint or 0) > args.total_steps:
        raise ValueError(f"--save-extra-checkpoint must be at most --total-steps {args.total_steps}, "
                         f"got {args.save_extra_checkpoint}")
    if args.env is not None and args.multi_env is not None:
        raise ValueError("--env and --multi-env exclude each other")
    mode, games = args.distribution_mode, GAMES[args.distribution_mode]
    if (args.multi_env or 0) > len(games):
        raise ValueError(f"--multi-env must be at most {len(games)} in distribution mode {mode}, got {args.multi_env}")
    games = [args.env] if args.env is not None else games[: args.multi_env or 6]
    check_games(games, args)
    if args.valid_num_levels:
        valid_args = validation_args(args, games)
        check_games(games, valid_args, "valid-")
        first, last = valid_args.start_level, valid_args.start_level + valid_args.num_levels - 1
        end = args.start_level + (args.num_levels or 2**31)
        if valid_args.distribution_mode == mode and first < end and args.start_level <= last:
            raise ValueError(f"--valid-start-level must begin levels that are not trained on, got {first} to {last}")

    if args.bf16 is None:
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        args.bf16 = (torch.cuda.is_bf16_supported(including_emulation=False) if args.cuda
                     else any(map(cpu.get, ("avx512_bf16", "amx_bf16"))))
    if args.num_servers is None:
        args.num_servers = num_cores()
    if args.num_actors is None:
        args.num_actors = max(2, min(8, num_cores() // 2))
    if args.num_envs is None:
        lowest = max(90 if args.cuda else 36, math.ceil(args.batch_size / args.num_actors))
        args.num_envs = math.ceil(lowest / len(games)) * len(games)
    if args.num_envs % len(games):
        raise ValueError(f"--num-envs must be a multiple of {len(games)}, the number of games, got {args.num_envs}")
    if args.batch_size > args.num_actors * args.num_envs:
        raise ValueError(f"--batch-size must be at most {args.num_actors * args.num_envs}, the number of all "
                         f"environments (--num-actors times --num-envs), got {args.batch_size}")
    return args, games


def command_line(default):
    switches = "|".join(field.name.replace("_", "[-_]") for field in fields(Args) if field.type is bool)
    text = "\0".join(sys.argv[1:])  # --cuda False and --cuda=False, as sweeps write them, are --no-cuda
    for value, prefix in (("true", ""), ("false", "no-")):
        text = re.sub(rf"(?<![^\0])--({switches})[=\0]{value}(?![^\0])", rf"--{prefix}\1", text, flags=re.I)
    return tyro.cli(Args, default=default, args=text.split("\0") if text else [], description=__doc__)


def parse_args(launch):
    """The arguments as given, and what to begin with: the checkpoint of a run that continues, weights, or nothing."""
    given, checkpoint = command_line(Args()), {}
    auto = given.resume == Path("auto")
    if given.resume is not None and given.init_from is not None and not auto:
        raise ValueError("--resume and --init-from exclude each other")
    if given.init_from is not None:
        checkpoint = load_checkpoint(given.init_from, None)
        saved = from_plain(checkpoint["args"])
        given = command_line(Args(**{field.name: getattr(saved, field.name) for field in fields(ModelArgs)}))
        before = [checkpoint["history"], *checkpoint["before"]]  # what the weights have learned from
        checkpoint = dict(model=checkpoint["model"], before=before)
    given.resume = path = launch.agree(lambda: unfinished_run(given) if auto else given.resume)
    if path is not None:
        checkpoint = load_checkpoint(path, SCRIPT)
        if not checkpoint["optimizer"]:
            raise ValueError(f"--resume needs a run, but {path} has only weights: --init-from begins one with them")
        saved = replace(from_plain(checkpoint["args"]), resume=None)
        given = replace(command_line(saved), resume=path.parent if path.is_file() else path)
        for name in ["exp_name", "seed", "env", "multi_env", "distribution_mode", "num_levels", "start_level",
                     "reward_clipping", "carry_state", *(field.name for field in fields(ModelArgs))]:
            old, new = getattr(saved, name), getattr(given, name)
            if old != new and not (name == "multi_env" and {old, new} == {None, 6}):
                raise ValueError(f"--{name.replace('_', '-')} cannot become {new} in {given.resume}, which began with "
                                 f"{old}; --init-from begins a new run with its weights")
        if RANK == 0 and checkpoint["step"] < given.total_steps:
            lock(given.resume)
            checkpoint = load_checkpoint(path, SCRIPT)  # again: whoever had the run may have saved it last
    return given, checkpoint


def unfinished_run(given):
    """The newest run with these arguments that has steps left and is not in use, now locked, or None."""
    for path in sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime, reverse=True):
        if path.parent.name.startswith(f"{given.exp_name}__{given.seed}__"):
            with contextlib.suppress(ValueError, OSError):
                checkpoint = load_checkpoint(path, SCRIPT)
                saved = replace(from_plain(checkpoint["args"]), resume=None)
                if saved == replace(given, resume=None) and checkpoint["step"] < given.total_steps:
                    lock(path.parent)
                    return path.parent
    return None


def lock(folder):
    """Keeps other processes off a run. Raises ValueError if it is another's, OSError if it cannot be written to."""
    if folder in locks:
        return
    locks[folder] = open(folder / "lock", "a")
    try:
        import fcntl
        fcntl.flock(locks[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        locks.pop(folder).close()
        raise ValueError(f"{folder} is in use: another process trains there") from None
    except (ImportError, OSError):
        pass  # Windows or a file system without locks


class Run:
    """What a run carries and saves, and what it leaves in its folder."""

    def __init__(self, launch, given, checkpoint):
        self.launch, (self.args, games) = launch, resolve_args(given)
        make_envs(self.args, games, len(games), self.args.seed)  # fail early if procgen cannot start
        self.step, self.before = checkpoint.get("step", 0), checkpoint.get("before", [])
        # What trained from which step on: a part for the beginning, and one for each resume.
        begun_with = replace(given, resume=None)
        if from_plain(to_plain(begun_with)) != begun_with:
            raise ValueError("a checkpoint cannot hold these arguments: one of them would come back as something else")
        part = dict(step=self.step, args=to_plain(begun_with),
                    sha256=hashlib.sha256(SOURCE.encode()).hexdigest(), srwm_cuda=srwm_cuda.SHA256,
                    processes=NUM_PROCESSES)
        self.history = [*checkpoint.get("history", ()), part]
        old, new = (part["args"]["total_steps"] for part in self.history[-2:]) if self.step else (1, 1)
        if old != new and RANK == 0:
            say(f"with --total-steps {new:,} instead of {old:,}, the learning rate goes on at "
                f"{1 - self.step / new:.0%} of its start, not at {max(0, 1 - self.step / old):.0%}")
        # A resumed run plays on, not again; each process has its range.
        self.seed = (self.args.seed + self.step) * 1000 + RANK * 2**16
        self.parts = contextlib.ExitStack()  # to close in the end
        self.engine = Engine(self.args, games, self.seed)
        self.parts.callback(self.engine.close)
        if self.args.valid_num_levels and RANK == 0:
            self.valid_engine = Engine(validation_args(self.args, games), games, self.engine.next_seed)
            self.parts.callback(self.valid_engine.close)
        self.agent = make_agent(self.args, checkpoint)  # after the engine's processes, which know no GPU
        self.optimizer_state, self.episodes = checkpoint.get("optimizer"), Episodes(games, checkpoint.get("episodes"))
        valid = ("valid_num_levels", "valid_start_level", "valid_distribution_mode")
        same = all(checkpoint.get("args", {}).get(name) == getattr(given, name) for name in valid)
        self.valid_episodes = Episodes(games, checkpoint.get("valid_episodes") if same else None)
        self.updates = self.skipped = self.skipped_in_a_row = 0  # the last two: of updates that are not finite
        self.validation = None
        self.folder = make_folder(self.args)
        if RANK == 0:
            parameters = sum(parameter.numel() for parameter in self.agent.parameters())
            device = torch.cuda.get_device_name() if self.args.cuda else "the CPU"
            say(f"{self.folder}: {', '.join(games)} ({self.args.distribution_mode}), "
                f"{self.args.total_steps:,} steps, {self.args.num_actors} actors x "
                f"{self.args.num_envs} environments, {parameters:,} parameters on {device}, the CNN: "
                f"{cnn_runs_in(self.agent, self.args)}, processes: {NUM_PROCESSES}")

    def open(self, pool, stop):
        """Begins the log and the validation, and connects the processes."""
        self.pool, weights = pool, pool.weights
        if RANK == 0:
            self.logger = self.parts.enter_context(contextlib.closing(Logger(self)))
            if self.args.valid_num_levels:
                validation = Validation(self.args, self.valid_episodes, weights, self.valid_engine,
                                        self.seed + self.args.num_actors, stop)
                self.validation = self.parts.enter_context(contextlib.closing(validation))
                self.validation.start()
            self.best, self.lost_best = -math.inf, False  # of the validation; whether best.pt could not be written
            with contextlib.suppress(ValueError):  # best.pt may be newer than the checkpoint, or not there
                best, now = load_checkpoint(self.folder / "best.pt", SCRIPT), self.history[-1]["args"]
                if all(best["args"].get(name) == now[name] for name in now if name.startswith("valid_")):
                    self.best = best["best"]
            names = [path.stem.removeprefix("checkpoint_") for path in self.folder.glob("checkpoint_*.pt")]
            kept = max([int(name) for name in names if name.isdecimal()], default=0)
            wanted = self.args.save_extra_checkpoint or math.inf
            self.extra = math.inf if wanted <= min(self.step, kept) else wanted  # from which step on
        if NUM_PROCESSES > 1:
            self.launch.join(self.args, self.step)
            for tensor in self.agent.state_dict().values():  # other processors may round initial weights differently
                dist.broadcast(tensor, src=0)
            weights.publish()
        self.saved_at = time.monotonic()

    def after_update(self, statistics, finite):
        """Counts, validates, logs and saves, whatever is due."""
        self.skipped, self.skipped_in_a_row = self.skipped + (not finite), 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise FloatingPointError(f"{MAX_SKIPPED} updates in a row, the last after step {self.step:,}, are not "
                                     f"finite: {statistics}")
        before, self.step = self.step, self.step + self.args.unroll_length * self.args.batch_size * NUM_PROCESSES
        self.updates += 1
        if RANK > 0:
            return
        if finite:
            self.logger.sums.update(statistics | dict(updates=1))
        if self.validation:
            self.validation.after_update(self.updates)
        if self.logger.sums and time.monotonic() - self.logger.time >= self.args.log_interval:
            self.log()
        due = time.monotonic() - self.saved_at >= self.args.save_interval
        if self.step >= self.extra and (before < self.extra or due) and self.save(f"checkpoint_{self.step}.pt"):
            self.extra = math.inf
        if due:
            if self.save("checkpoint.pt"):
                self.launch.store.set("run", os.fsencode(self.folder))  # where an attempt after a crash goes on
            self.saved_at = time.monotonic()

    def log(self):
        """Logs the updates since the last entry, and saves the best checkpoint."""
        valid_return = self.logger.write(self)
        if valid_return > self.best:
            self.lost_best = not self.save("best.pt", valid_return)
            self.best = self.best if self.lost_best else valid_return

    def finish(self):
        """Logs and saves what training ends with."""
        saved = True
        if RANK == 0:
            if self.logger.sums:
                self.log()
            saved = all([self.save("checkpoint.pt"),  # before closing: a scheduler may kill soon
                         self.step < self.extra or self.save(f"checkpoint_{self.step}.pt"), not self.lost_best])
        if NUM_PROCESSES > 1:
            dist.destroy_process_group()
        if not saved:
            sys.exit(1)
        if RANK == 0:
            say(f"saved {self.folder / 'checkpoint.pt'} at step {self.step:,}")
            say(f"next: python evaluate.py {self.folder}, or python {SCRIPT} --resume {self.folder}")

    def save(self, name, best=-math.inf):
        """Writes to a temporary file first, so that there is always a whole one. Returns whether it was written."""
        path = self.folder / name
        checkpoint = dict(script=SCRIPT, args=self.history[-1]["args"], history=self.history,
                          before=self.before, step=self.step, best=best,
                          model=self.agent.state_dict(), optimizer=self.learner.optimizer.state_dict(),
                          episodes=self.episodes.saved(), valid_episodes=self.valid_episodes.saved())
        try:
            with open(path.with_suffix(".tmp"), "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())  # or else a power failure may leave the new name without its contents
            os.replace(path.with_suffix(".tmp"), path)
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # some systems cannot
                folder = os.open(self.folder, os.O_RDONLY)
                stack.callback(os.close, folder)
                os.fsync(folder)
        except (OSError, RuntimeError) as error:  # torch.save turns some of the first into the second
            with contextlib.suppress(OSError):
                path.with_suffix(".tmp").unlink()  # or it may fill the disk
            say(f"{path} could not be written: {str(error).splitlines()[0]}", sys.stderr)
            return False
        return True


class Episodes:
    """The last 100 returns and lengths of each game."""

    def __init__(self, games, saved=None):
        self.recent = {game: deque((saved or {}).get(game, ()), maxlen=100) for game in games}
        self.continued = any(self.recent.values())

    def add(self, game, episode_return, length):
        self.recent[game].append((float(episode_return), int(length)))

    def add_unroll(self, rewards, dones, totals):
        """Adds the episodes that ended in an unroll, rewards and dones (T, B), whose environment n plays game n modulo
        their number. Totals (3, B): return and length before it, and how many episodes have ended;
        returns those after it."""
        games, ends = list(self.recent), np.zeros_like(totals[:2])  # when the last one ended
        sums = np.stack([rewards, np.ones_like(rewards)], axis=1).cumsum(0, dtype=float)
        sums += totals[:2]  # (T, 2, B)
        for t, n in np.argwhere(dones):
            self.add(games[n % len(games)], *(sums[t, :, n] - ends[:, n]))
            ends[:, n] = sums[t, :, n]
        return np.concatenate([sums[-1] - ends, totals[2:] + dones.sum(0)])

    def reward_scale(self, B):
        """(1, B): one over the spread of each environment's game."""
        return 1 / torch.tensor([[self.spread(game) for game in self.recent] * (B // len(self.recent))])

    def full(self):
        return all(len(episodes) == episodes.maxlen for episodes in self.recent.values())

    def saved(self):
        return {game: list(episodes) for game, episodes in self.recent.items()}

    def spread(self, game):
        """Standard deviation of the game's returns; 1 while fewer than ten are known, or all are the same."""
        returns = [episode_return for episode_return, _ in list(self.recent[game])]  # a copy: actors append
        return (np.std(returns) or 1.0) if len(returns) >= 10 else 1.0


class Validation(ActorPool):
    """An actor that plays held-out levels with the newest weights. Nothing is learned from it."""

    def __init__(self, args, episodes, weights, engine, seed, stop):
        super().__init__(engine.args, episodes, weights, engine, seed, stop, num_unrolls=1)
        self.interval = math.ceil(self.args.num_envs / (0.03 * args.batch_size))  # in updates: 3 % of all steps

    def after_update(self, number):
        check_actors(self)
        if number % self.interval == 0 and (self.args.deterministic or self.full.qsize()):
            self.free.put(self.get())


def load_checkpoint(path, script):
    """Reads what `Run.save` wrote to this file or folder, executing nothing of it; with script None, any script's."""
    path = path if path.is_file() else path / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if (damaged := zipfile.ZipFile(path).testzip()) is not None:  # checksums, which torch.load does not look at
            raise zipfile.BadZipFile(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own for a damaged file
        raise ValueError(f"{path} is not a whole checkpoint ({type(error).__name__})") from None
    parts = dict(script=str, args=dict, step=int, model=dict, optimizer=dict, episodes=dict)
    if not (isinstance(checkpoint, dict) and all(isinstance(checkpoint.get(name), parts[name]) for name in parts)):
        raise ValueError(f"{path} is not a checkpoint of this project")
    if script not in (None, checkpoint["script"]):
        raise ValueError(f"{path} belongs to {checkpoint['script']}, not to {script}")
    if "history" not in checkpoint:  # of an older version, which kept only the newest part
        part = dict(step=0, args=checkpoint["args"], sha256=checkpoint.get("sha256", ""))
        before = [[dict(step=0, args=args)] for args in checkpoint.get("before", ())]
        checkpoint |= dict(history=[part], before=before)
    return checkpoint


def load_weights(agent, checkpoint):
    try:
        agent.load_state_dict(checkpoint["model"])
    except (RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"the checkpoint holds a model of other sizes than the arguments say: {reason}") from None


def to_plain(value):
    """Arguments, or the value of one, as what a checkpoint may hold. Raises ValueError for a type of no such form."""
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_plain(each) for each in value]
    if not isinstance(value, (bool, int, float, str, Path, Enum, NoneType)):
        raise ValueError(f"a checkpoint cannot hold an argument of type {type(value).__name__}")
    return value.name if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value


def from_plain(plain, kind=None):
    """What `to_plain` made plain, again of its type, by default Args. What is no argument any more is left out."""
    kind = kind or Args
    if is_dataclass(kind):
        kinds = {field.name: get_type_hints(kind)[field.name] for field in fields(kind) if field.init}
        try:
            return kind(**{name: from_plain(plain[name], kinds[name]) for name in plain.keys() & kinds.keys()})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the checkpoint has an argument that {SCRIPT} cannot have: {error}") from None
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if plain is None else from_plain(plain, next(part for part in parts if part is not NoneType))
    if origin in (tuple, list):
        one_kind = origin is list or ... in parts
        return origin(map(from_plain, plain, parts[:1] * len(plain) if one_kind else parts))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind[plain]
    return Path(plain) if kind is Path else plain


def make_agent(args, checkpoint):
    """The agent, new or with the checkpoint's weights, on its device. Raises ValueError for sizes that do not fit."""
    if args.cuda:
        torch.cuda.set_device(LOCAL_RANK)
        torch.cuda.set_stream(torch.cuda.Stream())  # the learner's, since the default stream cannot be captured
        torch.use_deterministic_algorithms(args.deterministic, warn_only=True)  # those of a CPU always are
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as cuBLAS needs for that
    torch.manual_seed(args.seed)
    agent = Agent(args).to("cuda" if args.cuda else "cpu")
    if checkpoint:
        load_weights(agent, checkpoint)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = not args.deterministic
    return agent


def cnn_runs_in(agent, args):
    """What computes the CNN, in words."""
    if isinstance(getattr(agent, "encoder", None), Encoder) and agent.encoder.fused():
        return "kernels"
    return "PyTorch, since Encoder was changed" if args.cuda and args.bf16 else "PyTorch"


def prepare_optimizer(optimizer, saved):
    """Lets the optimizer make its averages, by a step at learning rate zero: a CUDA graph cannot make them. They become
    the saved ones, or else zeros. Hyperparameters come from the arguments."""
    groups = optimizer.param_groups
    parameters, rates = [x for group in groups for x in group["params"]], [group["lr"] for group in groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in groups:
        group["lr"] = 0 * group["lr"]
    optimizer.step()
    for group, rate in zip(groups, rates):
        group["lr"] = rate
    for index, parameter in enumerate(parameters):
        before = saved["state"].get(index, {}) if saved else {}
        for name, average in optimizer.state[parameter].items():
            average.copy_(before.get(name, torch.zeros_like(average)))


def make_folder(args):
    """The folder of the run that continues, or of a new one, locked; of several processes, only the first makes one."""
    folder = args.resume
    if folder is None and RANK == 0:
        if not Path("runs").is_dir() and os.path.lexists("runs"):
            raise ValueError("runs must be a folder, or a link to one: it is where runs go")
        Path("runs").mkdir(exist_ok=True)
        folder = Path("runs") / f"{args.exp_name}__{args.seed}__{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        while True:
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
            folder = folder.with_name(folder.name + "+")  # of a run that began in the same second as another
    if RANK == 0:
        lock(folder)
        copy = folder / SCRIPT  # of this script as it trains; after a change, of the newest
        try:
            if copy.is_file() and copy.read_text(encoding="utf-8") != SOURCE:
                say(f"{copy.name} has changed since it trained {folder}; the run continues with it as it is now")
            copy.write_text(SOURCE, encoding="utf-8")
        except (OSError, UnicodeError) as error:
            say(f"{copy} could not be written: {error}", sys.stderr)
    return folder


def each_has_ended(pool):
    """Whether each environment has ended an episode: a mean before that is one of those that end
    first, which are another kind, such as won mazes."""
    return pool.episodes.continued or all((actor.totals[2] > 0).all() for actor in pool.actors)


def mean_scalars(pool):
    """Mean return, length and normalized return of each game, and their means over games once all have ended one."""
    scalars, mode, episodes = {}, pool.args.distribution_mode, pool.episodes
    for game, recent in episodes.saved().items():
        if recent:
            value, scalars[f"length/{game}"] = np.mean(recent, axis=0).tolist()
            scalars[f"return/{game}"] = value
            if mode in RETURN_RANGE[game]:
                low, high = RETURN_RANGE[game][mode]
                scalars[f"normalized_return/{game}"] = (value - low) / (high - low)
    for kind in ("return", "normalized_return", "length"):
        values = [value for name, value in scalars.items() if name.startswith(f"{kind}/")]
        if len(values) == len(episodes.recent):
            scalars[f"{kind}/mean"] = np.mean(values).item()
    return scalars


def cut_log(folder, step):
    """Cuts TensorBoard's files off after a checkpoint's step: what followed was lost. Returns the
    step of the last entry that is left, or the step after the checkpoint, and its events."""
    last = {}  # event of each tag
    for path in sorted(folder.glob("*tfevents*")):
        size = 0
        for record in RawEventFileLoader(str(path)).Load():  # ends before one that was cut in half
            event = Event.FromString(record)
            if event.step > step:
                os.truncate(path, size)
                break
            size += len(record) + 16  # in the file: with its length and two checksums
            last |= {value.tag: event for value in event.summary.value}
    newest = max([event.step for event in last.values()], default=step + 1)
    return newest, [event for event in last.values() if event.step == newest]


class Logger:
    """Prints the status line; writes scalars to TensorBoard and, with --track, to Weights & Biases."""

    def __init__(self, run):
        self.wandb = None
        if run.args.track:
            name = run.folder.resolve().name
            try:
                import wandb
                self.wandb = wandb.init(project=run.args.wandb_project_name, entity=run.args.wandb_entity, name=name,
                                        id=name, resume="allow", config=to_plain(run.args), allow_val_change=True)
            except Exception as error:  # no network, no account: no reason to stop
                say(f"training goes on without Weights & Biases: {str(error).splitlines()[0]}")
        self.writer = None
        try:
            step, entry = cut_log(run.folder, run.step)
            self.writer = SummaryWriter(run.folder, purge_step=step)  # makes open readers forget
            for event in entry:  # also TensorBoard's default server, which ignores purge_step
                self.writer.file_writer.add_event(event, walltime=event.wall_time)
            text = "".join(f"- {name}: {value}\n" for name, value in vars(run.args).items())
            self.writer.add_text("arguments", text, run.step)  # after a resume, the new ones
        except OSError as error:
            self.fail(error)
        self.time, self.step, self.sums = time.monotonic(), run.step, Counter()  # sums over updates since then

    def write(self, run):
        """Logs the updates since the last entry. Returns the mean return of the validation, normalized where it can be,
        over the last 100 episodes of each game; minus infinity if there are not as many."""
        now, updates = time.monotonic(), self.sums.pop("updates")
        sps = (run.step - self.step) / (now - self.time)
        scalars = {name: value / updates for name, value in self.sums.items()}
        self.time, self.step, self.sums = now, run.step, Counter()
        diverged = sum(int(actor.num_diverged) for actor in run.pool.actors)
        counts = dict(skipped_updates=run.skipped, reset_states=diverged)
        scalars |= counts | dict(learning_rate=run.learner.learning_rate.item(), SPS=sps) | mean_scalars(run.pool)
        valid = mean_scalars(run.validation) if run.validation else {}
        kinds = ("normalized_return/mean", "return/mean")
        mean_name, valid_name = (next((name for name in kinds if name in found), None) for found in (scalars, valid))
        scalars |= {f"valid_{name}": value for name, value in valid.items()}
        if mean_name in valid:
            scalars["generalization_gap"] = scalars[mean_name] - valid[mean_name]
        try:
            self.writer = self.writer or SummaryWriter(run.folder)
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, run.step)
            self.writer.flush()
        except OSError as error:
            self.fail(error)
        if self.wandb:
            self.track(scalars, run.step)
        total, kind = run.args.total_steps, (mean_name or "").split("/")[0].replace("_", " ")
        left = timedelta(seconds=round(max(0, total - run.step) / max(sps, 1e-9)))
        count = sum(map(len, run.pool.episodes.recent.values()))
        returns = f"{count} episodes, not yet one of each environment"
        if mean_name and each_has_ended(run.pool):
            returns = f"mean {kind} {scalars[mean_name]:.3f} of {count} episodes"
        if valid_name and each_has_ended(run.validation):
            returns += f", validation {valid[valid_name]:.3f}"
        returns += "".join(f" | {name.replace('_', ' ')}: {count}" for name, count in counts.items() if count)
        say(f"step {run.step:,} of {total:,} | {sps:,.0f} steps/s | {left} left | {returns}")
        return valid[valid_name] if valid_name and run.validation.episodes.full() else -math.inf

    def fail(self, error):
        say(f"the log could not be written, training goes on: {error}")
        self.writer = None  # it would not go on after an error: the next entry opens another

    def track(self, scalars, step):
        try:
            self.wandb.log(scalars, step=step, commit=True)  # now, and not with the next
        except Exception as error:  # its process has died: no reason to stop
            say(f"training goes on without Weights & Biases: {error}")
            self.wandb = None

    def close(self):
        if self.writer:
            with contextlib.suppress(OSError):
                self.writer.close()
        if self.wandb:
            with contextlib.suppress(Exception):
                self.wandb.finish()


def say(text, file=None):
    """Prints a line; if it cannot be printed (a broken pipe, a full disk), training goes on."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # the second: a signal interrupted a print
        print(text, file=file, flush=True)


def num_cores():
    """Cores for this process: of those that it may use, its share, where torchrun started several on this machine."""
    return max(1, processes.num_cores() // NUM_PROCESSES_HERE)


def record_event():
    """An event on the calling thread's CUDA stream, waiting for which takes no core; without a GPU, nobody waits."""
    event = torch.cuda.Event(blocking=True) if torch.cuda.is_initialized() else torch.cpu.Event()
    event.record()
    return event


def synchronize():
    """Waits for the calling thread's CUDA stream, if there is one."""
    record_event().synchronize()


def prepare_stream(actor):
    """A CUDA stream for an actor, whose parts become CUDA graphs. Returns it."""
    for x in (actor.block.obs, actor.block.reward, actor.block.done, actor.block.action):
        srwm_cuda.lock_pages(actor, x)
    stream = torch.cuda.Stream(priority=-1)  # inference is short, and environments wait for it
    stream.wait_stream(torch.cuda.current_stream())  # on which the actor's tensors get their first values
    with torch.cuda.stream(stream):
        actor.infer(0, actor.state)  # compiles kernels
    if actor.args.cuda_graphs and actor.flags.on_stream:
        memory = torch.cuda.graph_pool_handle()
        actor.parts = [capture(part, stream, actor.generator, memory) for part in actor.parts]
    return stream


def capture(function, stream, generator=None, memory=None):
    """Captures a function without arguments, whose results are what it writes, into a CUDA graph. Returns a function
    that replays it. Graphs that are replayed one after another can share a pool of memory."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, memory, stream):  # which first waits for the GPU
        function()
    return graph.replay


def row_views(row, sizes, tensors):
    """Views of a row of Weights in the shapes of the tensors, and of its version, (1,) int32."""
    *parts, version = row.split(sizes)
    views = [part.view(x.dtype).as_strided(x.shape, torch.empty_like(x).stride())  # dense, also of a slice
             for part, x in zip(parts, tensors)]
    return views, version.view(torch.int32)[:1]


@torch.no_grad()
def reset_diverged(agent, state):
    """Zeroes the state, whose parts are (B, ...), of environments in which it is not finite or reaches
    agent.state_bound, if there is one: a number, or a tuple of one for each part (math.inf: none).
    Returns their number, a tensor: nobody waits for it."""
    bounds = getattr(agent, "state_bound", math.inf)
    bounds = bounds if isinstance(bounds, tuple) else [bounds] * len(state)
    diverged = [~(part.abs().reshape(len(part), -1).amax(1) < bound)  # (B,) each; nan is not less either
                for part, bound in zip(state, bounds) if part.is_floating_point() or part.is_complex()]
    diverged = torch.stack(diverged).any(0) if diverged else torch.zeros(0)
    for part in state:
        if len(diverged):
            part.masked_fill_(diverged.view(-1, *[1] * (part.ndim - 1)), 0)
    return diverged.sum()


class Launch:
    """A store for processes that torchrun started together, and for those that it starts after one of them has died."""

    def __init__(self):
        self.store, of_torchrun = dist.HashStore(), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        given = os.environ.keys() & NUMBERS
        for name in sorted(given | {"RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"} if given else ()):
            value = os.environ.get(name, "")
            if not value or name != "MASTER_ADDR" and not value.isdecimal():
                raise ValueError(f"{name} is '{value}' in the environment, where torchrun sets it beside others: start "
                                 f"with torchrun, or with none of {', '.join(NUMBERS)}")
        if not (RANK < NUM_PROCESSES and LOCAL_RANK < NUM_PROCESSES_HERE):
            raise ValueError(f"RANK {RANK} must be less than WORLD_SIZE {NUM_PROCESSES}, and LOCAL_RANK {LOCAL_RANK} "
                             f"less than LOCAL_WORLD_SIZE {NUM_PROCESSES_HERE}")
        if NUM_PROCESSES > 1 or of_torchrun:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.store = dist.TCPStore(address, port, is_master=RANK == 0 and not of_torchrun)

    def agree(self, find):
        """The path, or None, that the first process finds, for all. The store may still hold keys of an attempt before
        a crash. So each process asks under a new random name, and the first answers until all have heard. The answer
        names this attempt too, since machines may count restarts differently."""
        me = os.urandom(16).hex()
        if RANK == 0:
            saved = os.fsdecode(self.store.get("run")) if self.store.check(["run"]) else ""  # by an attempt before
            answer = f"{me} {saved or find() or ''}"
            while not all(self.store.check([f"{answer} heard by {rank}"]) for rank in range(1, NUM_PROCESSES)):
                for rank in range(1, NUM_PROCESSES):
                    if self.store.check([f"{rank} asks"]):  # maybe one that died
                        self.store.set(f"to {self.store.get(f'{rank} asks').decode()}", answer)
                time.sleep(0.05)
        else:
            self.store.set(f"{RANK} asks", me)
            while not self.store.check([f"to {me}"]):  # unlike a wait for it, open to signals
                time.sleep(0.05)
            answer = self.store.get(f"to {me}").decode()
            self.store.set(f"{answer} heard by {RANK}", "")
        self.attempt, _, path = answer.partition(" ")
        return Path(path) if path else None

    def join(self, args, step):
        """Connects the processes, whose gradients are averaged."""
        store = dist.PrefixStore(self.attempt, self.store)
        dist.init_process_group("nccl" if args.cuda else "gloo", store=store, rank=RANK, world_size=NUM_PROCESSES,
                                timeout=timedelta(minutes=30))
        steps = [None] * NUM_PROCESSES
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            dist.destroy_process_group()
            raise RuntimeError(f"the processes do not go on from the same checkpoint, but from steps {steps}")


class Stop(threading.Event):
    """Set by SIGINT or SIGTERM in training: the run is saved. Before, or if it comes again, it ends the process."""

    training = False

    def hear(self, number, frame):
        if not self.training:
            say("stopped before training began: there is nothing to save")
            os._exit(0)
        answer_signals([signal.SIG_IGN, signal.SIG_IGN])
        self.set()
        say(f"{signal.Signals(number).name}: saving and stopping (once more: stop at once)")
        time.sleep(0.1)  # a signal may arrive twice: at the process, and at its group
        answer_signals([signal.SIG_DFL, signal.SIG_DFL])

    def now(self):
        """Whether to stop at once, as only a process alone may: several stop after the same update."""
        return self.is_set() and NUM_PROCESSES == 1

    def agreed(self, device):
        """Whether this process was told to stop, or any other."""
        if NUM_PROCESSES == 1:
            return self.is_set()
        told = torch.tensor(float(self.is_set()), device=device)
        dist.all_reduce(told)
        synchronize()
        return told.item() > 0


def answer_signals(handlers):
    """Sets the handlers of SIGINT and SIGTERM. Returns those before. Only the main thread may; others do nothing."""
    if threading.current_thread() is threading.main_thread():
        return [signal.signal(*pair) for pair in zip((signal.SIGINT, signal.SIGTERM), handlers)]


class Watch:
    """Looks whether the processes of an engine live and answer."""

    def __init__(self, engine):
        self.engine, self.time = weakref.proxy(engine), time.monotonic()
        self.steps = self.waited = 0  # of each vector, when it looked last

    def check(self):
        """Raises ChildProcessError if a process has ended, TimeoutError if one does not answer."""
        for number, pid in enumerate(self.engine.processes):
            if status := processes.exit_status(pid):
                raise ChildProcessError(f"process {number} of the engine ended {status}")
        now, flags = time.monotonic(), np.concatenate([block.flags.numpy() for block in self.engine.blocks])
        waits, passed = (flags[:, 0] == 1) & (flags[:, 1] == self.steps), min(1, now - self.time)  # 1: after Ctrl-Z
        self.steps, self.waited, self.time = flags[:, 1], np.where(waits, self.waited + passed, 0), now
        if self.waited.max() > STUCK_AFTER:
            owner = flags[self.waited.argmax(), 2]
            raise TimeoutError(f"process {owner} of the engine has not answered for {STUCK_AFTER} seconds")


def check_actors(pool):
    """Raises the exception that an actor died of, or what Watch.check does."""
    if pool.error is not None:
        raise pool.error
    pool.engine.watch.check()


def make_block(B, owners):
    """What an actor of B environments and the processes that play them share."""
    zeros = processes.shared_zeros
    flags = zeros(torch.int32, len(owners), 16)  # flag, steps, number of the process; a cache line
    flags[:, 0], flags[:, 2] = 1, torch.tensor(owners)
    return SimpleNamespace(obs=zeros(torch.uint8, B, *FRAME_SHAPE), reward=zeros(torch.float32, B),
                           done=zeros(torch.bool, B), action=zeros(torch.int64, B), flags=flags)


def end_threads(pool):
    """Waits for a closed pool's threads. Its engine has ended: threads and streams would wait for its flags."""
    for actor in pool.actors:
        actor.free.put(None)
    begin = time.monotonic()
    while any(thread.is_alive() for thread in pool.threads) and time.monotonic() - begin < STUCK_AFTER:
        for block in pool.engine.blocks:
            block.flags.zero_()
        time.sleep(0.01)


def main():
    stop = Stop()
    before = answer_signals([stop.hear, stop.hear])
    processes.keep_freed_memory()
    torch.set_num_threads(min(torch.get_num_threads(), num_cores()))  # PyTorch knows nothing of a container's share
    try:
        try:
            launch = Launch()
            given, checkpoint = parse_args(launch)
            if given.resume is not None and (step := checkpoint["step"]) >= given.total_steps:
                return say(f"{given.resume} is finished, at step {step:,} of {given.total_steps:,}: nothing to do")
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
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        sys.exit(f"{SCRIPT}: too little memory; lower --num-envs or --num-actors (unrolls, inference) or --batch-size "
                 f"(learner): {str(error).splitlines()[0]}")
    finally:  # for other programs that call this, or a notebook
        while locks:
            locks.popitem()[1].close()
        answer_signals(before)


if __name__ == "__main__":
    main()
