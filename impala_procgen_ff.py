"""IMPALA on ProcGen with a feedforward agent, the baseline without memory.

Paper: A Modern Self-Referential Weight Matrix That Learns to Modify Itself (Irie et al., ICML 2022, arXiv 2202.05780).
Learning: IMPALA (Espeholt et al. 2018, arXiv 1802.01561), asynchronous actors and V-trace, in one process.

    python impala_procgen_ff.py --multi-env 6              one agent learns six games
    python impala_procgen_ff.py --env maze --seed 2        or a single one
    python impala_procgen_ff.py --resume runs/NAME         goes on where a run stopped; auto: the newest of its kind
    python evaluate.py --start-level 1000                    scores the newest run on levels it has never seen

To be read from top to bottom: games, arguments, model, V-trace, environments, actors, learner, checkpoints, log, main.
For an ablation, copy this file and change it. In shapes, T is time steps, B environments, H heads of size D.
Expect about 200,000 steps a second with the SRWM on one H100 and 16 cores, and 900 on two CPU cores.
"""

import contextlib
import copy
import ctypes
import hashlib
import io
import math
import os
import queue
import re
import shutil
import signal
import sys
import threading
import time
import uuid
import weakref
import zipfile
from collections import deque
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows, where nothing keeps a second process off a run
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter

if sys.version_info < (3, 13):
    import gym_notices.notices

    gym_notices.notices.notices.clear()  # or gym, which procgen imports, announces its retirement at every start
    from procgen import ProcgenGym3Env
else:  # for which there is no procgen, but its engine, unchanged, in another package
    import procgen_gym
    from procgen_gym.env import DISTRIBUTION_MODE_DICT
    from procgen_gym.libenv import CLibenv

    class ProcgenGym3Env(CLibenv):
        """What procgen's class of this name is, as far as it is needed here."""

        def __init__(self, num, env_name, distribution_mode, render_mode=None, **options):
            data = Path(procgen_gym.__file__).parent / "data"
            needed = dict(env_name=env_name, distribution_mode=DISTRIBUTION_MODE_DICT[distribution_mode],
                          render_human=render_mode is not None, num_actions=NUM_ACTIONS, resource_root=f"{data / 'assets'}/")
            super().__init__(str(data / "prebuilt"), num, dict(center_agent=True, use_backgrounds=True) | options | needed)

        def observe(self):
            self.call_c_func("libenv_observe")
            return self.get_reward_buf(), self.get_ob_bufs(), self.get_first_buf().view(bool)

        def get_info(self):
            self.observe()
            return [{name: values[n] for name, values in self.get_info_bufs().items()} for n in range(self.num)]

        def get_state(self):
            state = ctypes.create_string_buffer(2**20)
            return [state[: self.call_c_func("get_state", n, state, len(state))] for n in range(self.num)]

import srwm_cuda

# The games in the order in which --multi-env takes them, and the range of their returns, by which they are normalised
# (Cobbe et al. 2020, appendix C).
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
GAMES = {  # by distribution mode
    "easy": list(RETURN_RANGE),
    "hard": list(RETURN_RANGE),
    "extreme": ["leaper", "starpilot", "chaser", "dodgeball"],
    "memory": ["dodgeball", "heist", "maze", "miner", "caveflyer", "jumper"],
}
NUM_ACTIONS = 15
RANK, LOCAL_RANK, NUM_PROCESSES, NUM_PROCESSES_HERE = (  # torchrun sets them
    int(os.environ.get(name, default)) for name, default in
    {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items())
SOURCE = Path(__file__).read_text(encoding="utf-8")  # as it runs, whatever becomes of the file
STUCK_AFTER = 60  # seconds without an answer from environments
MAX_SKIPPED = 50  # updates in a row that are not finite, and so left out, before the run ends


@dataclass
class TrainingArgs:
    exp_name: str = Path(__file__).stem
    """first part of the run's name; the run's folder is runs/NAME"""
    seed: int = 1
    """seed of weights, levels and actions (asynchronous threads still make runs differ, but for --deterministic)"""
    deterministic: bool = False
    """actors and learner take turns: slower, but two runs with one seed are the same, bit for bit"""
    cuda: bool = torch.cuda.is_available()
    """train on the GPU"""
    bf16: bool | None = None
    """run the CNN in bfloat16 (None: where the hardware computes in it)"""
    resume: Path | None = None
    """go on with the run in this folder, or from this checkpoint file of it; its own arguments are the defaults then. auto: go
    on with the newest unfinished run of the same arguments, or begin a new one"""
    init_from: Path | None = None
    """begin a new run with the weights of this run or checkpoint file, and with its model's arguments as defaults"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline works without a network)"""
    wandb_project_name: str = "srwm-procgen"
    """project to log to"""
    wandb_entity: str | None = None
    """user or team to log to"""
    log_interval: float = 5.0
    """seconds between two status lines and entries in TensorBoard"""
    save_interval: float = 300.0
    """seconds between two checkpoints"""
    save_extra_checkpoint: int | None = None
    """keep the checkpoint at this step too"""
    profile: bool = False
    """write a trace of ten updates to the run's folder, for TensorBoard, chrome://tracing or ui.perfetto.dev"""

    multi_env: int | None = None
    """train on the first so many games at once (None: 6, unless --env names one)"""
    env: str | None = None
    """train on this game alone"""
    distribution_mode: str = "easy"
    """easy, hard, extreme or memory; each has its own list of games"""
    num_levels: int = 200
    """levels of each game to train on; 0: all"""
    start_level: int = 0
    """the first of these levels"""
    num_actors: int | None = None
    """actors, each with a vector of environments (None: by the number of cores)"""
    num_envs: int | None = None
    """environments of each actor, a multiple of the number of games (None: about 96 on a GPU, 24 on a CPU)"""
    valid_num_levels: int = 0
    """levels of each game to validate on while training (0: no validation)"""
    valid_start_level: int = 500
    """the first of these levels"""
    valid_distribution_mode: str | None = None
    """their distribution mode (None: that of the training)"""

    total_steps: int = 300_000_000
    """environment steps (frames) to learn from, and over which the learning rate falls to zero"""
    unroll_length: int = 50
    """steps T of an unroll"""
    batch_size: int = 32
    """unrolls B in an update"""
    learning_rate: float = 6e-4
    """of RMSprop, at the start"""
    alpha: float = 0.99
    """RMSprop's smoothing constant"""
    epsilon: float = 0.01
    """RMSprop's epsilon"""
    momentum: float = 0.0
    """RMSprop's momentum"""
    grad_norm_clipping: float = 40.0
    """largest norm of the gradient"""
    discounting: float = 0.99
    """discount factor"""
    baseline_cost: float = 0.5
    """weight of the value loss"""
    entropy_cost: float = 0.01
    """weight of the entropy bonus"""
    reward_clipping: str = "abs_one"
    """abs_one: clamp rewards to [-1, 1] for learning; normalize: divide by the spread of a game's returns; none: neither"""
    carry_state: bool = True
    """carry the recurrent state, if the model has one, from unroll to unroll; --no-carry-state is the state-reset ablation"""


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv1(F.relu(self.conv0(F.relu(x))))


class Encoder(nn.Module):
    """IMPALA's residual CNN (Espeholt et al. 2018, figure 3): frames (N, 64, 64, 3) uint8 to features (N, 256)."""

    def __init__(self, args):
        super().__init__()
        layers, channels = [], 3
        for width in (16, 32, 32):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.MaxPool2d(3, 2, 1), Residual(width), Residual(width)]
            channels = width
        self.cnn, self.fc = nn.Sequential(*layers), nn.Linear(2048, 256)
        self.dtype = torch.bfloat16 if args.bf16 else torch.float32
        self.fused = args.cuda and args.bf16 and srwm_cuda.is_impala_cnn(self.cnn)  # not so in a copy that changes it
        if not self.fused:
            self.to(memory_format=torch.channels_last)

    def forward(self, frames):
        if not frames.is_cuda and len(frames) > 240:  # on a CPU, pieces that fit its caches are 1.6 times as fast
            return torch.cat([self(piece) for piece in frames.split(240)])
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            if self.fused:
                x = srwm_cuda.impala_cnn(frames, *self.cnn.parameters())
            else:
                x = self.cnn(frames.permute(0, 3, 1, 2).to(self.dtype) / 255.0).flatten(1)
            return F.relu(self.fc(F.relu(x))).float()


# ======================================== model: what the scripts differ in ========================================


@dataclass
class Args(TrainingArgs):
    pass


class Agent(nn.Module):
    """The feedforward baseline: the heads read the features of the current frame, and nothing is remembered."""

    def __init__(self, args):
        super().__init__()
        self.encoder = Encoder(args)
        self.policy, self.baseline = nn.Linear(257, NUM_ACTIONS), nn.Linear(257, 1)

    def initial_state(self, batch_size):
        return ()

    def forward(self, obs, reward, done, state):  # obs (T, B, 64, 64, 3) uint8; reward, done (T, B)
        features = self.encoder(obs.flatten(0, 1)).unflatten(0, obs.shape[:2])  # (T, B, 256)
        h = torch.cat([features, reward.clamp(-1, 1).unsqueeze(-1)], dim=-1)
        return self.policy(h), self.baseline(h).squeeze(-1), state  # (T, B, 15), (T, B), state


# ================================================= end of the model ================================================


@torch.no_grad()
def vtrace(log_rhos, discounts, rewards, values, bootstrap_value):
    """V-trace targets and policy-gradient advantages (Espeholt et al. 2018, section 4.1) with all weights clipped at 1.

    log_rhos, log(pi / mu) of the actions taken, discounts, rewards and values: (T, B); bootstrap_value, V at step T: (B,).
    Returns vs and pg_advantages, (T, B) each, without gradient.
    """
    rhos = log_rhos.exp().clamp(max=1.0)
    next_values = torch.cat([values[1:], bootstrap_value.unsqueeze(0)])
    deltas = rhos * (rewards + discounts * next_values - values)
    # vs - V at step s is the sum over t >= s of deltas[t], times the product of discounts * rhos from s to t - 1.
    steps = torch.arange(len(values), device=values.device)
    s, t = steps.view(-1, 1, 1), steps.view(1, -1, 1)
    factors = torch.cat([torch.ones_like(values[:1]), (discounts * rhos)[:-1]])  # of step t - 1
    products = torch.where(t > s, factors, 1.0).cumprod(dim=1)  # (T, T, B), by s and t
    vs = values + torch.where(t >= s, products * deltas, 0.0).sum(dim=1)
    next_vs = torch.cat([vs[1:], bootstrap_value.unsqueeze(0)])
    return vs, rhos * (rewards + discounts * next_vs - values)


def keep_freed_memory():
    """Lets glibc keep what is freed, where the system has it: to map a large tensor's memory anew costs a CPU a sixth of its
    speed."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest that there is
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def num_cores(root="/"):
    """Cores for this process: those that it may run on, or as much of their time as its container may use; of these, its share,
    where torchrun started several on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    groups = Path(root, "proc/self/cgroup")  # lines such as 0::/a/b, in version 1 4:cpu,cpuacct:/a/b
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, group = line.split(":", 2)
        folder = Path(root, "sys/fs/cgroup", controllers, group.lstrip("/"))
        files = ["cpu.cfs_quota_us", "cpu.cfs_period_us"] if controllers else ["cpu.max"]
        for above in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit here
                quota, period = map(int, " ".join((above / file).read_text() for file in files).split())
                cores = min(cores, math.ceil(quota / period)) if quota > 0 else cores
    return max(1, cores // NUM_PROCESSES_HERE)


def make_envs(args, games, num, seed, num_threads=0, **options):
    """`num` environments in one vector; number n plays games[n % len(games)]. num_threads 0: the caller steps them. The options
    are the engine's. evaluate.py makes its environments with this function too."""
    options |= dict(distribution_mode=args.distribution_mode, num_levels=args.num_levels, start_level=args.start_level)
    try:
        envs = ProcgenGym3Env(num, ",".join(games), rand_seed=seed % 2**31, num_threads=num_threads, **options)
    except OSError as error:  # the dynamic linker's
        raise ValueError(f"procgen's engine does not load ({error}); on Debian: apt install libgl1 libglib2.0-0") from None
    envs._reuse_arrays = True  # observe() returns the engine's own buffers: an option of gym3 that procgen hides
    return envs


def engine_threads(args):
    """Threads in which the engine steps an actor's environments; 0: the actor's own. Together they are more than the cores,
    since while some actors infer, others step."""
    return max(1, math.ceil(1.5 * num_cores() / args.num_actors)) if args.cuda else 0


class Episodes:
    """The last 100 returns and lengths of each game."""

    def __init__(self, games, saved=None):
        self.recent = {game: deque((saved or {}).get(game, ()), maxlen=100) for game in games}

    def add(self, game, episode_return, length):
        self.recent[game].append((float(episode_return), int(length)))

    def full(self):
        return all(len(episodes) == episodes.maxlen for episodes in self.recent.values())

    def saved(self):
        return {game: list(episodes) for game, episodes in self.recent.items()}

    def spread(self, game):
        """Standard deviation of the game's returns; 1 as long as fewer than ten are known, or all are the same."""
        returns = [episode_return for episode_return, _ in list(self.recent[game])]
        return (np.std(returns) if len(returns) >= 10 else 0.0) or 1.0

    def scalars(self, distribution_mode):
        """Mean return, normalised return and length of each game, and their mean over the games once all have ended one."""
        scalars = {}
        for game, episodes in self.saved().items():
            if episodes:
                scalars[f"return/{game}"], scalars[f"length/{game}"] = np.mean(episodes, axis=0).tolist()
                if distribution_mode in RETURN_RANGE[game]:
                    low, high = RETURN_RANGE[game][distribution_mode]
                    scalars[f"normalized_return/{game}"] = (scalars[f"return/{game}"] - low) / (high - low)
        for kind in ("return", "normalized_return", "length"):
            values = [value for name, value in scalars.items() if name.startswith(f"{kind}/")]
            if len(values) == len(self.recent):
                scalars[f"{kind}/mean"] = np.mean(values).item()
        return scalars


class Unroll:
    """T + 1 time steps of B environments, in fixed memory on the learner's device; the last is the next unroll's first.

    It is what actors fill, and the learner's batch, whose columns come from several.
    """

    def __init__(self, agent, T, B):
        device = next(agent.parameters()).device
        self.obs = torch.zeros(T + 1, B, 64, 64, 3, dtype=torch.uint8, device=device)
        self.reward = torch.zeros(T + 1, B, device=device)  # of the action before
        self.done = torch.zeros(T + 1, B, dtype=torch.bool, device=device)  # the frame at t begins an episode
        self.shown = (self.obs, self.reward, self.done)  # by the environments
        self.action = torch.zeros(T, B, dtype=torch.int64, device=device)
        self.logits = torch.zeros(T, B, NUM_ACTIONS, device=device)  # of the policy that acted
        self.reward_scale = torch.ones(1, B, device=device)  # what to multiply rewards by, to learn from them
        self.state = agent.initial_state(B)  # before the first step
        self.version = 0  # of the weights that acted
        self.used = None  # CUDA's event after which it is free to be read, or to be written again

    def columns(self, begin, count):
        """Views of `count` environments from number `begin` on."""
        steps = (*self.shown, self.action, self.logits, self.reward_scale)
        return [x.narrow(1, begin, count) for x in steps] + [x.narrow(0, begin, count) for x in self.state]


@torch.no_grad()
def begin_diverged_anew(agent, state):
    """Sets the state, whose parts are (B, ...), of environments to zero in which it is not finite or reaches the agent's bound,
    if that has one. Returns their number, a tensor, for which nobody has to wait."""
    bound = getattr(agent, "state_bound", math.inf)
    diverged = [~(part.abs().flatten(1).amax(1) < bound) for part in state]  # (B,) each; nan is not less either
    diverged = torch.stack(diverged).any(0) if diverged else torch.zeros(0)
    for part in state:
        part.masked_fill_(diverged.view(-1, *[1] * (part.ndim - 1)), 0)
    return diverged.sum()


class Weights:
    """The newest weights on their way from the learner to the actors: whole, never half an update. On a GPU each copy waits
    there for the one before, whichever thread began it; nobody waits for a copy on the host."""

    def __init__(self, agent):
        self.newest = [parameter.detach().clone() for parameter in agent.parameters()]
        self.version, self.lock, self.copied = 0, threading.Lock(), record_event()

    @torch.no_grad()
    def copy(self, sources, targets, updates):
        with self.lock:
            wait_on_device(self.copied)
            torch._foreach_copy_(list(targets), list(sources))
            self.copied = record_event()
            self.version += updates
            return self.version

    def publish(self, agent):
        self.copy(agent.parameters(), self.newest, updates=1)

    def fetch(self, agent):
        return self.copy(self.newest, agent.parameters(), updates=0)


def record_event():
    """An event on the calling thread's CUDA stream; None if there is no GPU in use."""
    if torch.cuda.is_initialized():
        event = torch.cuda.Event(blocking=True)  # whoever waits for it leaves the core to the environments
        event.record()
        return event
    return None


def wait_for(event):
    if event is not None:
        event.synchronize()


def wait_on_device(event):
    """Lets what the calling thread's stream does next wait for an event, but not the thread."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def synchronize():
    """Waits for the calling thread's CUDA stream, if there is one."""
    wait_for(record_event())


def lock_pages(owner, tensor):
    """Page-locks a tensor's memory as long as its owner lives, so that the GPU copies from there by itself."""
    error = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    torch.cuda.check_error(int(error))
    weakref.finalize(owner, lambda: torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())).atexit = False


def capture(function, stream, generator=None):
    """Captures a function without arguments into a CUDA graph. Returns one that replays it and returns the same tensors."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        outputs = function()

    def replay():
        graph.replay()
        return outputs

    return replay


class Actor:
    """A vector of environments and what plays it: fills an unroll with T of its steps, with the newest weights.

    What a step does on the device is one function, `act`, and on CUDA one graph, from the frames in the engine's memory to the
    action's way back.
    """

    def __init__(self, index, args, games, seed, weights, episodes):
        self.name, self.args, self.games, self.weights, self.episodes = f"actor {index}", args, games, weights, episodes
        self.waiting_since = None
        self.envs = make_envs(args, games, args.num_envs, seed, engine_threads(args))
        self.returns, self.lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=np.int64)
        device = torch.device("cuda" if args.cuda else "cpu")
        self.agent = Agent(args).to(device).requires_grad_(False)
        self.unroll, self.state = Unroll(self.agent, args.unroll_length, args.num_envs), self.agent.initial_state(args.num_envs)
        self.t = torch.zeros(1, dtype=torch.int64, device=device)  # the time step that comes next into the unroll
        # On the host: what the environments show beside frames, reward and done, and what they are told.
        self.signals = [torch.zeros_like(x[:1], device="cpu", pin_memory=args.cuda) for x in self.unroll.shown[1:]]
        self.action = torch.zeros(args.num_envs, dtype=torch.int32, pin_memory=args.cuda)
        self.begun_anew = torch.zeros((), device=device)  # states that diverged
        frames = torch.from_numpy(self.observe()[1]["rgb"])  # the engine's own buffer
        self.shown = [frames.unsqueeze(0), *self.signals]
        self.generator = torch.Generator(device).manual_seed(seed)
        self.stream = None
        if args.cuda:
            lock_pages(self, frames)
            self.stream = torch.cuda.Stream(priority=-1)  # inference is short, and environments wait for it
            self.stream.wait_stream(torch.cuda.current_stream())  # on which the tensors above get their first values
            with torch.cuda.stream(self.stream):
                self.act()
            self.act = capture(self.act, self.stream, self.generator)

    def store(self):
        """Uploads what the environments show, and writes it to the unroll. Returns it: obs, reward and done, (1, B, ...)."""
        now = [x.to(self.t.device, non_blocking=True) for x in self.shown]
        for steps, x in zip(self.unroll.shown, now):
            steps.index_copy_(0, self.t, x)
        return now

    @torch.no_grad()
    def act(self):
        """One step of the policy: the unroll and the state move on, and the action comes to the host."""
        logits, _, state = self.agent(*self.store(), self.state)
        for old, new in zip(self.state, state):
            old.copy_(new)
        clocks = torch.empty_like(logits).exponential_(generator=self.generator)
        action = (logits.softmax(-1) / clocks).argmax(-1)  # argmax(p / Exp(1)) is a sample of p
        self.unroll.logits.index_copy_(0, self.t, logits)
        self.unroll.action.index_copy_(0, self.t, action)
        self.action.copy_(action[0].int(), non_blocking=True)
        self.t += 1

    def observe(self):
        """Waits for the environments. Returns reward (B,), a dictionary of what is seen, and done (B,): the engine's arrays."""
        self.waiting_since = time.monotonic()
        reward, obs, done = self.envs.observe()
        self.waiting_since = None
        for mine, theirs in zip(self.signals, (reward, done)):
            mine.numpy()[0] = theirs
        return reward, obs, done

    def play(self, unroll):
        """Fills the unroll with the next T steps. A generator: it yields where it would wait, for the device and then for the
        environments, so that the thread can turn to other actors."""
        unroll.version = self.weights.fetch(self.agent)
        self.begun_anew += begin_diverged_anew(self.agent, self.state)
        for first, now in zip(self.unroll.state, self.state):
            first.copy_(now if self.args.carry_state else now.zero_())
        if self.args.reward_clipping == "normalize":
            scales = [1 / self.episodes.spread(game) for game in self.games] * (self.args.num_envs // len(self.games))
            self.unroll.reward_scale.copy_(torch.tensor([scales]))
        self.t.zero_()
        for _ in range(self.args.unroll_length):
            self.act()
            acted = record_event()
            yield
            wait_for(acted)
            self.envs.act(self.action.numpy())
            yield
            reward, _, done = self.observe()
            self.returns += reward
            self.lengths += 1
            for n in np.flatnonzero(done):
                self.episodes.add(self.games[n % len(self.games)], self.returns[n], self.lengths[n])
                self.returns[n] = self.lengths[n] = 0
        self.store()
        wait_on_device(unroll.used)
        torch._foreach_copy_(unroll.columns(0, self.args.num_envs), self.unroll.columns(0, self.args.num_envs))
        unroll.used = record_event()


class Actors:
    """Actors, the threads in which they play, and the fixed pool of unrolls that passes between them and the learner: it bounds
    memory and policy lag.

    On a GPU there is one thread, which turns from actor to actor: threads share Python's lock, and waiting for it would cost
    more than all that an actor does with it. On a CPU, where a thread computes what it asks for, each actor has its own.
    With --deterministic there are no threads: whoever asks for an unroll lets the next actor play it.
    """

    def __init__(self, agent, args, games, seed, weights, episodes, spare=1):
        self.args, self.episodes, self.turn, self.error = args, episodes, 0, None
        self.free, self.full, self.stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
        self.actors = [Actor(i, args, games, seed + i, weights, episodes) for i in range(args.num_actors)]
        for _ in range(args.num_actors + spare):
            self.free.put(Unroll(agent, args.unroll_length, args.num_envs))
        groups = [] if args.deterministic else [self.actors] if args.cuda else [[actor] for actor in self.actors]
        self.threads = [threading.Thread(target=self.run, args=(group,), daemon=True) for group in groups]

    def start(self):
        synchronize()
        for thread in self.threads:
            thread.start()

    def run(self, actors):
        """Lets actors play by turns until told to stop."""
        def unrolls(actor):
            while (unroll := self.free.get()) is not None:
                yield from actor.play(unroll)
                self.full.put(unroll)

        def go_on(i):
            if actors[i].stream is not None:
                torch.cuda.set_stream(actors[i].stream)
            next(games[i], None)

        try:
            games, number = [unrolls(actor) for actor in actors], len(actors)
            later = (number + 1) // 3  # turns of others in which an actor infers
            for i in range(number):  # if all unrolls ended at once, the learner could not take them, and nobody would play
                for _ in range(2 * (i * self.args.unroll_length // number) + (i + later >= number)):
                    go_on(i)
            while True:
                for i in range(number):
                    if self.stop.is_set():
                        return
                    go_on(i)  # its environments have moved, and it infers
                    go_on(i - later)  # it has inferred, and its environments move
        except BaseException as error:
            self.error = error
        finally:
            self.full.put(None)  # wakes whoever waits: no more will come

    def get(self):
        """The next full unroll, or None if the actors were told to stop. Raises what one of them died of."""
        if self.args.deterministic:
            actor, self.turn = self.actors[self.turn], (self.turn + 1) % len(self.actors)
            unroll = self.free.get()
            with torch.cuda.stream(actor.stream):
                for _ in actor.play(unroll):
                    if self.stop.is_set():
                        return None
            return unroll
        while True:
            with contextlib.suppress(queue.Empty):
                unroll = self.full.get(timeout=1)
                self.check()
                return unroll
            self.check()

    def check(self):
        """Raises the exception that an actor died of, and TimeoutError if its environments do not answer."""
        if self.error is not None:
            raise self.error
        for actor in self.actors:
            since = actor.waiting_since
            if since is not None and time.monotonic() - since > STUCK_AFTER:
                time.sleep(1)  # if it was this whole process that stood still, they answer now
                if actor.waiting_since == since:
                    raise TimeoutError(f"{actor.name}: its environments have not answered for {STUCK_AFTER} seconds")

    def close(self):
        self.stop.set()
        for _ in self.threads:
            self.free.put(None)
        for thread in self.threads:
            if thread.is_alive():
                thread.join(timeout=2)  # a stuck one never ends


class Learner:
    """Agent and optimizer, and the update: forward, V-trace, backward, clipping and RMSprop; on CUDA one graph."""

    STATISTICS = ("loss/policy", "loss/baseline", "loss/entropy", "loss/total", "vtrace/mean_rho", "gradient_norm")

    def __init__(self, agent, args, saved_optimizer=None):
        self.agent, self.args = agent, args
        device = next(agent.parameters()).device
        self.learning_rate = torch.tensor(args.learning_rate, device=device)  # a tensor, so that a graph can read it
        self.optimizer = torch.optim.RMSprop(agent.parameters(), self.learning_rate, args.alpha, args.epsilon,
                                             momentum=args.momentum, foreach=args.cuda, capturable=args.cuda)
        for parameter in agent.parameters():  # a step on zero gradients changes nothing, but makes the optimizer's state
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        if saved_optimizer is not None:  # its averages; how to use them is for the arguments to say
            state = self.optimizer.state_dict()
            for index, saved in saved_optimizer["state"].items():
                state["state"][index] |= saved
            self.optimizer.load_state_dict(state)
            self.optimizer.param_groups[0]["lr"] = self.learning_rate
        self.batch = Unroll(agent, args.unroll_length, args.batch_size)
        self.unroll, self.column = None, 0  # the unroll in use, and its first environment that was not yet learned from
        self.stop = torch.zeros(1, device=device)  # whether to stop after this update: a mean over all processes too
        if args.cuda:
            for _ in range(3):  # compilation, and cuDNN's choice of algorithms
                self.loss()[0].backward()
            self.backward = capture(self.backward, torch.cuda.current_stream())
            self.step = capture(self.step, torch.cuda.current_stream())

    def fill(self, actors, version):
        """Fills the batch with the next unrolls of single environments. Returns their mean policy lag, in updates, or None
        where the actors were told to stop."""
        filled, lag = 0, 0.0
        while filled < self.args.batch_size:
            if self.unroll is None:
                self.unroll, self.column = actors.get(), 0
                if self.unroll is None:
                    return None
                wait_on_device(self.unroll.used)
            count = min(self.args.batch_size - filled, self.args.num_envs - self.column)
            torch._foreach_copy_(self.batch.columns(filled, count), self.unroll.columns(self.column, count))
            lag += (version - self.unroll.version) * count / self.args.batch_size
            filled, self.column = filled + count, self.column + count
            if self.column == self.args.num_envs:
                self.unroll.used = record_event()
                actors.free.put(self.unroll)
                self.unroll = None
        return lag

    def loss(self):
        """The loss, a sum over time and batch as in the paper, and the first of the STATISTICS, means over both."""
        batch, args = self.batch, self.args
        logits, values, _ = self.agent(batch.obs, batch.reward, batch.done, batch.state)
        values, bootstrap_value = values[:-1], values[-1].detach()
        log_pi, log_mu = logits[:-1].log_softmax(-1), batch.logits.log_softmax(-1)
        action = batch.action.unsqueeze(-1)
        log_pi_action, log_mu_action = log_pi.gather(-1, action).squeeze(-1), log_mu.gather(-1, action).squeeze(-1)  # (T, B)
        log_rhos = log_pi_action.detach() - log_mu_action
        rewards = batch.reward[1:].clamp(-1, 1) if args.reward_clipping == "abs_one" else batch.reward[1:] * batch.reward_scale
        discounts = args.discounting * (~batch.done[1:]).float()
        vs, pg_advantages = vtrace(log_rhos, discounts, rewards, values.detach(), bootstrap_value)

        policy_loss = -(log_pi_action * pg_advantages).sum()
        baseline_loss = 0.5 * (vs - values).square().sum()
        entropy = -(log_pi.exp() * log_pi).sum()
        loss = policy_loss + args.baseline_cost * baseline_loss - args.entropy_cost * entropy
        sums = torch.stack([policy_loss, baseline_loss, entropy, loss, log_rhos.exp().clamp(max=1.0).sum()])
        return loss, sums.detach() / log_rhos.numel()

    def backward(self):
        """Computes the gradient of the loss. Returns it, flat, with the first of the STATISTICS and the wish to stop behind."""
        self.optimizer.zero_grad()
        loss, statistics = self.loss()
        loss.backward()
        gradients = [parameter.grad for parameter in self.agent.parameters()]  # None: the loss does not depend on it, here
        gradients = [torch.zeros_like(x) if grad is None else grad for grad, x in zip(gradients, self.agent.parameters())]
        self.joint = torch.cat([*(gradient.flatten() for gradient in gradients), statistics, self.stop])
        return self.joint

    @torch.no_grad()
    def step(self):
        """One step of RMSprop with the clipped gradient. Where that or the loss is not finite, in any process, all weights and
        averages stay what they were. Returns the STATISTICS, and whether a process wants to stop."""
        parameters = list(self.agent.parameters())
        *gradients, statistics, stop = self.joint.split([*(x.numel() for x in parameters), len(self.STATISTICS) - 1, 1])
        gradient = self.joint[: -len(self.STATISTICS)]
        norm = gradient.norm().view(1)
        finite = torch.cat([statistics, norm]).isfinite().all()
        scale = (self.args.grad_norm_clipping / (norm + 1e-6)).clamp(max=1.0)
        gradient.copy_(torch.where(finite, gradient * scale, 0.0))
        for parameter, part in zip(parameters, gradients):
            parameter.grad = part.view_as(parameter)
        averages = [x for state in self.optimizer.state.values() for name, x in state.items() if name != "step"]
        learned, finite = [*parameters, *averages], finite.float()
        before = torch._foreach_mul(learned, 1 - finite)
        self.optimizer.step()
        torch._foreach_mul_(learned, finite)  # a CUDA graph cannot ask, and must not wait
        torch._foreach_add_(learned, before)
        return torch.cat([statistics, norm, stop])

    def update(self, stop=False):
        """One update on the batches of all processes. Returns a tensor: the STATISTICS, and whether a process wants to stop."""
        self.stop.fill_(stop)
        joint = self.backward()
        if dist.is_initialized():
            dist.all_reduce(joint)
            joint /= dist.get_world_size()
        return self.step()


def open_streams():
    """Lets closed standard streams lead nowhere; what the terminal's character set lacks is printed as a question mark."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")


def say(text, file=None, passing=False):
    """Prints a line; on a terminal, the next one that is passing too takes its place. Where it cannot go (a broken pipe, a full
    disk, a print that a signal interrupted), there is none."""
    file = file or sys.stdout
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        if passing and file.isatty():
            width = max(1, shutil.get_terminal_size().columns - 1)
            print("\r" + text[:width].ljust(width), end="", file=file, flush=True)
            terminal["passing"] = True
        else:
            print("\n" * terminal["passing"] + text, file=file, flush=True)
            terminal["passing"] = False


terminal = dict(passing=False)  # whether its last line is such a one


def save_checkpoint(path, given, learner, episodes, step, best=None, before=()):
    """Writes to a temporary file first: whatever happens, `path` is a whole checkpoint. Returns whether it could be written."""
    checkpoint = dict(script=Path(__file__).name, sha256=hashlib.sha256(SOURCE.encode()).hexdigest(), args=to_plain(given),
                      before=before, step=step, model=learner.agent.state_dict(), optimizer=learner.optimizer.state_dict(),
                      episodes=episodes.saved(), best=best)
    try:
        with open(path.with_suffix(".tmp"), "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # or else, when the power fails, the new name may come before what it stands for
        os.replace(path.with_suffix(".tmp"), path)
        with contextlib.suppress(OSError):  # some systems cannot
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:  # the second is how torch.save passes on some of the first
        say(f"{path} could not be written: {str(error).splitlines()[0]}", sys.stderr)
        return False
    return True


def load_checkpoint(path, script):
    """Reads what `save_checkpoint` wrote (None: any script's), executing nothing of it. ValueError if it is not that."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if (damaged := zipfile.ZipFile(path).testzip()) is not None:  # checksums, which torch.load does not look at
            raise zipfile.BadZipFile(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own for a damaged file
        raise ValueError(f"{path} is not a whole checkpoint ({type(error).__name__})") from None
    kinds = dict(script=str, args=dict, step=int, model=dict, optimizer=dict, episodes=dict)
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{path} is not a checkpoint of this project")
    if script not in (None, checkpoint["script"]):
        raise ValueError(f"{path} belongs to {checkpoint['script']}, not to {script}")
    return checkpoint


def load_weights(agent, checkpoint):
    try:
        agent.load_state_dict(checkpoint["model"])
    except (RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"the checkpoint holds a model of other sizes than the arguments say: {reason}") from None


class Logger:
    """Prints the status line; writes scalars to TensorBoard and, with --track, to Weights & Biases."""

    def __init__(self, args, run, step):
        self.args, self.run, self.wandb = args, run, None
        self.tracked = run / "wandb_steps.txt"  # of the entries there: unlike TensorBoard's, none of them can be taken back
        self.tracked_step = int(self.tracked.read_text().split()[-1]) if self.tracked.is_file() else -1
        if args.track:
            import wandb

            name = run.resolve().name
            os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "0.1")  # seconds: what SIGKILL may cost offline
            try:
                self.wandb = wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=name, id=name,
                                        resume="allow", config=to_plain(args), allow_val_change=True)
            except Exception as error:  # no network, no account: nothing to lose a run over
                say(f"training goes on without Weights & Biases: {str(error).splitlines()[0]}")
        self.writer = SummaryWriter(run, purge_step=step + 1)  # drops what lies past the checkpoint
        if step == 0:
            rows = "".join(f"|{name}|{value}|\n" for name, value in to_plain(args).items())
            self.writer.add_text("arguments", f"|argument|value|\n|-|-|\n{rows}")
        self.start(step)

    def start(self, step):
        """Begins a new interval, over which `write` averages."""
        self.time, self.step, self.sums, self.updates = time.monotonic(), step, 0.0, 0

    def add(self, *statistics):
        self.sums, self.updates = self.sums + np.array(statistics), self.updates + 1

    def write(self, step, learning_rate, episodes, validators, diverged):
        """Logs the interval. Returns the mean return of the validation, normalised where it can be, over the last 100 episodes
        of each game, or None if there are not as many."""
        sps = (step - self.step) / (time.monotonic() - self.time)
        scalars = dict(zip((*Learner.STATISTICS, "policy_lag"), self.sums / self.updates))
        scalars |= dict(learning_rate=learning_rate, SPS=sps) | diverged | episodes.scalars(self.args.distribution_mode)
        valid = validators.episodes.scalars(validators.args.distribution_mode) if validators else {}
        mean, valid_mean = (next((name for name in ("normalized_return/mean", "return/mean") if name in found), None)
                            for found in (scalars, valid))
        scalars |= {f"valid_{name}": value for name, value in valid.items()}
        if mean in valid:
            scalars["generalization_gap"] = scalars[mean] - valid[mean]
        try:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()
            if self.wandb and step > self.tracked_step:
                with open(self.tracked, "a") as file:
                    file.write(f"{step}\n")
                self.wandb.log(scalars, step=step, commit=True)  # now, and not with the next
        except OSError as error:  # TensorBoard's writer does not go on after an error
            say(f"the log could not be written, training goes on: {error}")
            with contextlib.suppress(OSError):
                self.writer = SummaryWriter(self.run)
        left = timedelta(seconds=round(max(0, self.args.total_steps - step) / max(sps, 1e-9)))
        returns = f"mean {mean.split('/')[0].replace('_', ' ')} {scalars[mean]:.3f}" if mean else "no episode of each game yet"
        returns += f", validation {valid[valid_mean]:.3f}" if valid_mean else ""
        returns += "".join(f" | {name.replace('_', ' ')}: {count}" for name, count in diverged.items() if count)
        say(f"step {step:,} of {self.args.total_steps:,} | {sps:,.0f} steps/s | {left} left | {returns}", passing=True)
        self.start(step)
        return valid[valid_mean] if valid_mean and validators.episodes.full() else None

    def close(self):
        if terminal["passing"]:
            terminal["passing"] = False
            say("")
        with contextlib.suppress(OSError):
            self.writer.close()
        if self.wandb:
            self.wandb.finish()


def to_plain(args):
    """The arguments as a dictionary of plain values, which a checkpoint may hold."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


# What flags of the reference and of CleanRL are called here.
FOREIGN = {
    **{f"use-{theirs}": f"impala_procgen_{ours}.py" for theirs, ours in dict(
        sr="srwm", lstm="lstm", delta="delta", psr="fake_sr", smfwp="sr_delta").items()}, "use-no-carry-sr": "--no-carry-state",
    "dim-head": "--hidden-size / --num-head", "xpid": "--exp-name", "savedir": "nothing: runs go to runs/",
    "use-wandb": "--track", "project-name": "--wandb-project-name", "write-profiler-trace": "--profile",
    "mode": "evaluate.py", "test-num-levels": "evaluate.py --num-levels", "test-start-level": "evaluate.py --start-level",
    "test-distribution-mode": "evaluate.py --distribution-mode", "num-servers": "--num-actors and --num-envs",
    **dict.fromkeys(("single-gpu", "pipes-basename", "num-learner-threads", "num-inference-threads", "num-actions",
                     "disable-validation"), "nothing: not needed"),
    "env-id": "--env", "total-timesteps": "--total-steps", "num-steps": "--unroll-length", "gamma": "--discounting",
    "ent-coef": "--entropy-cost", "vf-coef": "--baseline-cost", "max-grad-norm": "--grad-norm-clipping",
    "torch-deterministic": "--deterministic", "capture-video": "evaluate.py --video",
    "anneal-lr": "nothing: the learning rate always falls", "no-anneal-lr": "nothing: the learning rate always falls",
}


def command_line(default, description):
    """Parses the command line; the box that tyro would print an error in becomes the one line of a ValueError."""
    words = sys.argv[1:]
    for i, word in enumerate(words):
        name = word.split("=")[0].lstrip("-").replace("_", "-")
        if word.startswith("--") and name in FOREIGN:
            raise ValueError(f"{word.split('=')[0]} is {FOREIGN[name]} here")
        if game := re.fullmatch(r"(?:--env=)?(?:procgen:)?procgen-(\w+)-v0", word):
            raise ValueError(f"--env {game[0].removeprefix('--env=')} is --env {game[1]} here")
        if i and words[i - 1].replace("_", "-") == "--total-steps" and re.fullmatch(r"[\d.]+e\d+", word.lower()):
            words[i] = f"{float(word):.0f}"
    with contextlib.redirect_stderr(io.StringIO()) as box:
        try:
            return tyro.cli(type(default), default=default, description=description, args=words)
        except SystemExit as end:
            if end.code:
                lines = [line.strip("│| ") for line in box.getvalue().splitlines()[1:-1]]  # less the title and the last rule
                raise ValueError(" ".join(" ".join(line for line in lines if line.strip("─-")).split())) from None
            raise


locks = {}  # of the runs that are this process's: open files, which end with it, however it ends


def lock(run):
    """Keeps other processes off the run. Raises ValueError if it is another's, or cannot be written to."""
    if run in locks:
        return
    try:
        file = open(run / "lock", "a")
    except OSError as error:
        raise ValueError(f"the run's folder cannot be written to: {error}") from None
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{run} is in use: another process trains there") from None
    except OSError:
        pass  # a file system without locks
    locks[run] = file


def unfinished_run(given):
    """The newest run with these arguments that has steps left and is not in use, now locked, or None."""
    for path in sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime, reverse=True):
        if path.parent.name.startswith(f"{given.exp_name}__{given.seed}__"):
            with contextlib.suppress(ValueError):
                checkpoint = load_checkpoint(path, Path(__file__).name)
                if saved_args(checkpoint) == replace(given, resume=None) and checkpoint["step"] < given.total_steps:
                    lock(path.parent)
                    return path.parent
    return None


def saved_args(checkpoint):
    """The arguments that a checkpoint's run was given."""
    saved = {name: value for name, value in checkpoint["args"].items() if name in vars(Args())}
    return Args(**saved | dict(resume=None, init_from=Path(saved["init_from"]) if saved.get("init_from") else None))


def find_checkpoint(path):
    """The file of a run's folder, or the file itself."""
    return path if path.is_file() else path / "checkpoint.pt"


class Launch:
    """What processes have in common that torchrun started together, and with those that it starts in their place after one has
    died: a store. A process alone has none."""

    def __init__(self):
        self.store, of_torchrun = None, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if NUM_PROCESSES > 1 or of_torchrun:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.store = dist.TCPStore(address, port, is_master=RANK == 0 and not of_torchrun)

    def agree(self, find):
        """What the first process finds, a path or None. The machines count restarts each for itself, so that it also names the
        attempt, and tells those that ask now, and no others."""
        if self.store is None:
            return find()
        me = uuid.uuid4().hex
        if RANK == 0:
            saved = self.store.get("run").decode() if self.store.check(["run"]) else ""  # by an attempt before
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

    def saved(self, run):
        """A restart goes on from there."""
        if self.store is not None:
            self.store.set("run", str(run))

    def join(self, args, step):
        """Connects the processes, whose gradients are averaged."""
        store = dist.PrefixStore(self.attempt, self.store)
        dist.init_process_group("nccl" if args.cuda else "gloo", store=store, rank=RANK, world_size=NUM_PROCESSES,
                                timeout=timedelta(minutes=2))
        steps = [None] * NUM_PROCESSES
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            dist.destroy_process_group()
            raise RuntimeError(f"the processes do not go on from the same checkpoint, but from steps {steps}")


def parse_args(launch):
    """The arguments as given, and what to begin with, or None: the checkpoint of a run that goes on, or weights."""
    given, checkpoint = command_line(Args(), __doc__), None
    auto = given.resume == Path("auto")
    if given.resume is not None and given.init_from is not None and not auto:
        raise ValueError("--resume and --init-from exclude each other")
    if given.init_from is not None:
        checkpoint = load_checkpoint(find_checkpoint(given.init_from), None)
        model = {name: value for name, value in vars(saved_args(checkpoint)).items() if name not in vars(TrainingArgs())}
        given = command_line(Args(**model), __doc__)
        before = [checkpoint["args"], *checkpoint.get("before", ())]  # what the weights have learned from
        checkpoint = dict(step=0, model=checkpoint["model"], optimizer=None, episodes=None, before=before)
    given.resume = launch.agree(lambda: unfinished_run(given) if auto else given.resume)
    if given.resume is not None:
        path = find_checkpoint(given.resume)
        checkpoint = load_checkpoint(path, Path(__file__).name)
        saved = saved_args(checkpoint)
        given = replace(command_line(saved, __doc__), resume=path.parent)
        check_same_experiment(given, saved)
        if RANK == 0 and checkpoint["step"] < given.total_steps:
            lock(given.resume)
            checkpoint = load_checkpoint(path, Path(__file__).name)  # again: who had the run may have saved it before leaving
    return given, checkpoint


def check_same_experiment(given, saved):
    """Raises ValueError where an argument would make another experiment of the run that goes on."""
    of_model = [name for name in vars(given) if name not in vars(TrainingArgs())]
    for name in ["exp_name", "seed", "env", "multi_env", "distribution_mode", "num_levels", "start_level", "reward_clipping",
                 "carry_state", *of_model]:
        before, now = getattr(saved, name), getattr(given, name)
        if before != now and not (name == "multi_env" and {before, now} == {None, 6}):
            raise ValueError(f"--{name.replace('_', '-')} cannot become {now} in {given.resume}, which began with {before}; "
                             f"--init-from begins a new run with its weights")


def validation_args(args, games):
    """The arguments of the actor that plays held-out levels."""
    return replace(args, num_levels=args.valid_num_levels, start_level=args.valid_start_level, num_actors=1,
                   num_envs=8 * len(games), distribution_mode=args.valid_distribution_mode or args.distribution_mode)


def check_numbers(args):
    from_zero = {"seed", "num_levels", "start_level", "valid_num_levels", "valid_start_level", "discounting", "alpha",
                 "momentum", "baseline_cost", "entropy_cost", "learning_rate", "log_interval", "save_interval"}
    for name, value in vars(args).items():
        if type(value) in (int, float):
            least = "at least 0" if name in from_zero else "positive"
            most = 2**53 if name in ("total_steps", "save_extra_checkpoint") else 2**31
            if not (value > 0 or value == 0 and name in from_zero) or value >= most:
                raise ValueError(f"--{name.replace('_', '-')} must be {least} and less than {most}, got {value}")
            if value > 1 and name in ("discounting", "alpha", "momentum"):
                raise ValueError(f"--{name} must be at most 1, got {value}")


def check_games(games, args, valid=""):
    """Raises ValueError unless the engine, which would abort the process, can play these levels of these games."""
    mode = args.distribution_mode
    if mode not in GAMES:
        raise ValueError(f"--{valid}distribution-mode must be one of {', '.join(GAMES)}, got {mode}")
    for game in games:
        if game not in GAMES[mode]:
            raise ValueError(f"--env must be one of {', '.join(GAMES[mode])} in {valid}distribution mode {mode}, got {game}")
    if args.start_level > 0 and args.num_levels == 0:
        raise ValueError("--start-level needs --num-levels: with 0, all levels, procgen ignores it")
    if args.start_level + args.num_levels >= 2**31:
        raise ValueError(f"--{valid}start-level plus --{valid}num-levels must be less than {2**31}")


def check_device(args):
    """Raises ValueError if the GPU that --cuda asks for is not there; decides about bfloat16."""
    if args.cuda and not torch.cuda.is_available():
        raise ValueError("--cuda needs a GPU that PyTorch can use, and there is none; --no-cuda computes on the CPU")
    if args.cuda and NUM_PROCESSES_HERE > torch.cuda.device_count():
        raise ValueError(f"--cuda needs a GPU for each of {NUM_PROCESSES_HERE} processes, not {torch.cuda.device_count()}")
    if args.bf16 is None:
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        args.bf16 = (torch.cuda.is_bf16_supported(including_emulation=False) if args.cuda
                     else any(map(cpu.get, ("avx512_bf16", "amx_bf16"))))


def complete(given):
    """Checks the arguments and fills in what is None. Returns them, and the games to play. Raises ValueError.

    A checkpoint keeps the arguments as given, so that None is decided anew on the machine that goes on.
    """
    args = copy.copy(given)
    check_numbers(args)
    check_device(args)
    if args.reward_clipping not in ("abs_one", "none", "normalize"):
        raise ValueError(f"--reward-clipping must be abs_one, none or normalize, got {args.reward_clipping}")
    if Path(args.exp_name).name != args.exp_name or not args.exp_name.isprintable() or len(args.exp_name) > 200:
        raise ValueError(f"--exp-name must be a folder's name, got '{args.exp_name}'")
    if args.env is not None and args.multi_env is not None:
        raise ValueError("--env and --multi-env exclude each other")
    games = GAMES.get(args.distribution_mode, [])
    if (args.multi_env or 0) > len(games) > 0:
        raise ValueError(f"--multi-env must be at most {len(games)} in distribution mode {args.distribution_mode}, "
                         f"got {args.multi_env}")
    games = [args.env] if args.env is not None else games[: args.multi_env or 6]
    check_games(games, args)
    if args.valid_num_levels:
        valid_args = validation_args(args, games)
        check_games(games, valid_args, "valid-")
        first, last = valid_args.start_level, valid_args.start_level + valid_args.num_levels - 1
        end = args.start_level + (args.num_levels or 2**31)
        if valid_args.distribution_mode == args.distribution_mode and first < end and args.start_level <= last:
            raise ValueError(f"--valid-start-level must begin levels that are not trained on, got {first} to {last}")

    if args.num_actors is None:
        args.num_actors = max(1, min(8, num_cores() // 2))
    if args.num_envs is None:
        least = max(96 if args.cuda else 24, math.ceil(args.batch_size / args.num_actors))
        args.num_envs = math.ceil(least / len(games)) * len(games)
    if args.num_envs % len(games):
        raise ValueError(f"--num-envs must be a multiple of {len(games)}, the number of games, got {args.num_envs}")
    if args.batch_size > args.num_actors * args.num_envs:
        raise ValueError(f"--batch-size must be at most {args.num_actors * args.num_envs}, the number of all environments "
                         f"(--num-actors times --num-envs), got {args.batch_size}")
    return args, games


def make_agent(args, checkpoint):
    """The agent, new or with the checkpoint's weights, on its device. Raises ValueError for sizes that cannot be."""
    if args.cuda:
        torch.cuda.set_device(LOCAL_RANK)
        torch.cuda.set_stream(torch.cuda.Stream())  # this thread's, the learner's: the default stream cannot be captured
    torch.manual_seed(args.seed)
    agent = Agent(args).to("cuda" if args.cuda else "cpu")
    if checkpoint:
        load_weights(agent, checkpoint)
    return agent


def make_profiler(run):
    return torch.profiler.profile(schedule=torch.profiler.schedule(wait=20, warmup=5, active=10, repeat=1),
                                  on_trace_ready=torch.profiler.tensorboard_trace_handler(str(run), use_gzip=True))


def answer_signals(handler):
    """Lets SIGINT and SIGTERM call it, or does nothing in a thread, which may not. Returns who answered them before."""
    if threading.current_thread() is threading.main_thread():
        return [signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)]


def stop_at_signals(*events):
    """SIGINT and SIGTERM set the events; a second one ends the process."""
    def on_signal(number, frame):
        answer_signals(signal.SIG_IGN)
        for event in events:
            event.set()
        say(f"{signal.Signals(number).name}: saving and stopping (once more: stop at once)")
        time.sleep(0.1)  # one wish may come as two signals: to the process, and to its group
        answer_signals(signal.SIG_DFL)

    answer_signals(on_signal)


def make_run(args):
    """The folder of the run that goes on, or of a new one, locked; of several processes, only the first makes one."""
    run = args.resume
    if run is None and RANK == 0:
        Path("runs").mkdir(exist_ok=True)
        run = Path("runs") / f"{args.exp_name}__{args.seed}__{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        while True:
            with contextlib.suppress(FileExistsError):
                run.mkdir()
                break
            run = run.with_name(run.name + "+")  # of a run that began in the same second as another
    if RANK == 0:
        lock(run)
        keep_script(run)
    return run


def keep_script(run):
    """Keeps a copy of this script in the run's folder; after a change, of the newest that trained there."""
    copy = run / Path(__file__).name
    try:
        if copy.is_file() and copy.read_text(encoding="utf-8") != SOURCE:
            say(f"{Path(__file__).name} has changed since it trained {run}; the run goes on with it as it is now")
        copy.write_text(SOURCE, encoding="utf-8")
    except (OSError, UnicodeError) as error:
        say(f"{copy} could not be written: {error}", sys.stderr)


def best_return(run):
    """That of best.pt, which may be newer than the checkpoint. None if there is none."""
    with contextlib.suppress(ValueError):
        return load_checkpoint(run / "best.pt", Path(__file__).name).get("best")


def extra_step(args, run, step):
    """The step from which on the extra checkpoint is due: infinite if it is not wanted, or there already."""
    wanted = args.save_extra_checkpoint or math.inf
    written = [int(path.stem[11:]) for path in run.glob("checkpoint_*.pt") if path.stem[11:].isdecimal()]
    return math.inf if wanted <= min(step, max(written, default=0)) else wanted


def train(given, args, games, agent, checkpoint, run, launch):
    """Trains until total_steps, or until a signal says stop. Leaves a checkpoint in either case."""
    step = checkpoint["step"] if checkpoint else 0
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.cuda:  # on a CPU these are slow, and the usual ones just as deterministic
        torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as cuBLAS needs for that
    if RANK == 0:
        parameters = sum(parameter.numel() for parameter in agent.parameters())
        device = torch.cuda.get_device_name() if args.cuda else "the CPU"
        say(f"{run}: {', '.join(games)} ({args.distribution_mode}), {args.num_actors} actors x {args.num_envs} environments, "
            f"{parameters:,} parameters on {device}, processes: {NUM_PROCESSES}")
    learner, weights = Learner(agent, args, checkpoint and checkpoint["optimizer"]), Weights(agent)
    episodes = Episodes(games, checkpoint and checkpoint["episodes"])
    seed = (args.seed + step) * 1000 + RANK * 2**16  # a resumed run plays on, not again; processes have ranges of their own
    actors, validators = Actors(agent, args, games, seed, weights, episodes), None
    if args.valid_num_levels and RANK == 0:
        valid_args, valid_seed = validation_args(args, games), seed + args.num_actors
        validators = Actors(agent, valid_args, games, valid_seed, weights, Episodes(games), spare=0)
        pause = math.ceil(valid_args.num_envs / (0.03 * args.batch_size))  # updates between its unrolls: 3 % of all steps
    logger = None
    if RANK == 0:
        logger, best, extra = Logger(args, run, step), best_return(run), extra_step(args, run, step)
    profiler = make_profiler(run) if args.profile and RANK == 0 else None
    if NUM_PROCESSES > 1:
        launch.join(args, step)
        for tensor in agent.state_dict().values():  # other processors round the initial weights otherwise
            dist.broadcast(tensor, src=0)
        weights.copy(agent.parameters(), weights.newest, updates=0)
    stop, stopping, updates, saved, lost_best = threading.Event(), False, 0, time.monotonic(), False
    skipped, in_a_row = 0, 0  # updates that are not finite
    stop_at_signals(stop, *([actors.stop] if NUM_PROCESSES == 1 else []))  # several agree on the update after which they stop

    def save(name, best=None):
        before = checkpoint.get("before", ()) if checkpoint else ()
        return save_checkpoint(run / name, given, learner, episodes, step, best, list(before))

    def log():
        nonlocal best, lost_best
        diverged = dict(skipped_updates=skipped, states_begun_anew=sum(int(actor.begun_anew) for actor in actors.actors))
        valid_return = logger.write(step, learning_rate, episodes, validators, diverged)
        if valid_return is not None and (best is None or valid_return > best):
            if not (lost_best := not save("best.pt", valid_return)):
                best = valid_return

    try:
        for each in filter(None, (actors, validators, profiler)):
            each.start()
        while step < args.total_steps and not stopping:
            if (lag := learner.fill(actors, weights.version)) is None:
                break
            learning_rate = args.learning_rate * (1 - step / args.total_steps)
            learner.learning_rate.fill_(learning_rate)
            result = learner.update(stop.is_set())
            synchronize()  # and leaves the core to others, which `tolist` would not
            *statistics, stopping = result.tolist()
            stopping = stopping or NUM_PROCESSES == 1 and stop.is_set()  # it may have come after the update began
            finite = all(map(math.isfinite, statistics))
            skipped, in_a_row = skipped + (not finite), 0 if finite else in_a_row + 1
            if in_a_row == MAX_SKIPPED:
                named = ", ".join(f"{name} {value:g}" for name, value in zip(learner.STATISTICS, statistics))
                raise FloatingPointError(f"{in_a_row} updates in a row, the last after step {step:,}, are not finite: {named}")
            weights.publish(agent)
            before, step = step, step + args.unroll_length * args.batch_size * NUM_PROCESSES
            updates += 1
            if profiler:
                profiler.step()
            if RANK > 0:
                continue
            if finite:
                logger.add(*statistics, lag)
            if validators:
                validators.check()
                if updates % pause == 0 and (args.deterministic or validators.full.qsize()):
                    validators.free.put(validators.get())
            if logger.updates and time.monotonic() - logger.time >= args.log_interval:
                log()
            due = time.monotonic() - saved >= args.save_interval
            if step >= extra and (before < extra or due) and save(f"checkpoint_{step}.pt"):
                extra = math.inf
            if due:
                if save("checkpoint.pt"):
                    launch.saved(run)
                saved = time.monotonic()
        if RANK == 0 and logger.updates:
            log()
        written = RANK > 0 or all([save("checkpoint.pt"),  # first of all: who ends this process may not wait long
                                   step < extra or save(f"checkpoint_{step}.pt"), not lost_best])
    finally:
        for each in filter(None, (actors, validators, logger)):
            each.close()
        if profiler:
            profiler.stop()
    if NUM_PROCESSES > 1:
        dist.destroy_process_group()
    if not written:
        sys.exit(1)
    if RANK == 0:
        say(f"saved {run / 'checkpoint.pt'} at step {step:,}")


def main():
    def leave(number, frame):
        say("stopped before training began: there is nothing to save")
        os._exit(0)

    open_streams()
    answered = answer_signals(leave)
    keep_freed_memory()
    torch.set_num_threads(min(torch.get_num_threads(), num_cores()))  # PyTorch knows nothing of a container's share
    try:
        try:
            launch = Launch()
            given, checkpoint = parse_args(launch)
            if given.resume is not None and checkpoint["step"] >= given.total_steps:
                say(f"{given.resume} is finished, at step {checkpoint['step']:,} of {given.total_steps:,}: nothing to do")
                return
            args, games = complete(given)
            make_envs(args, games, len(games), args.seed)  # whatever ails the engine shows here
            agent, run = make_agent(args, checkpoint), make_run(args)
        except BrokenPipeError:  # of --help | head
            os._exit(0)
        except (ValueError, OSError) as error:  # only from here: in training it would be a mistake in the program
            print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
            sys.exit(2)
        train(given, args, games, agent, checkpoint, run, launch)
    except (FloatingPointError, TimeoutError) as error:
        sys.exit(f"{Path(__file__).name}: stopped, the last checkpoint is kept: {error}")
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        sys.exit(f"{Path(__file__).name}: too little memory; lower --num-envs or --num-actors (unrolls, inference) or "
                 f"--batch-size (learner): {str(error).splitlines()[0]}")
    finally:  # for who called this from a program of their own, or a notebook
        while locks:
            locks.popitem()[1].close()
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), answered or ()):
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
