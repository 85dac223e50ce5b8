"""ProcGen's engine and its games, and the processes that play it for the actors of a script."""

import ctypes
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from . import processes

if sys.version_info < (3, 13):
    import gym_notices.notices

    gym_notices.notices.notices.clear()  # or gym, which procgen imports, announces its retirement at every start
    from procgen import ProcgenGym3Env as _Engine
else:  # for which there is no procgen, but its engine, unchanged, in another package
    import procgen_gym

    class _Engine(procgen_gym.libenv.CLibenv):  # what is needed here of procgen's class
        def __init__(self, num, env_name, distribution_mode, render_mode=None, **options):
            data = Path(procgen_gym.__file__).parent / "data"
            options = dict(center_agent=True, use_backgrounds=True) | options | dict(
                env_name=env_name, distribution_mode=procgen_gym.env.DISTRIBUTION_MODE_DICT[distribution_mode],
                render_human=render_mode is not None, num_actions=15, resource_root=f"{data / 'assets'}/")
            super().__init__(str(data / "prebuilt"), num, options)

        def observe(self):
            self.call_c_func("libenv_observe")
            return self.get_reward_buf(), self.get_ob_bufs(), self.get_first_buf().view(bool)

        def get_info(self):
            self.observe()
            return [{name: values[n] for name, values in self.get_info_bufs().items()} for n in range(self.num)]

        def get_state(self):
            state = ctypes.create_string_buffer(2**20)
            return [state[: self.call_c_func("get_state", n, state, len(state))] for n in range(self.num)]

NOOP = 4  # the action that neither moves nor fires
Mode = Literal["easy", "hard", "extreme", "memory"]
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
# One or more of them, or None. --help lists them.
Game = Annotated[tuple[str, ...] | None,
                 tyro.conf.arg(metavar="GAME ...", help_behavior_hint=f"({', '.join(GAMES['easy'])})")]


def check_games(args, valid="", trained=None):
    """The games to play: those of --env, or the first ones, as many as --multi-env says, or six. Raises ValueError unless
    the engine, which would abort the process, can play their levels.

    Args:
        args: of a script.
        valid: begins the names of some arguments in messages: "valid-" for those of the validation.
        trained: arguments of a training, none of whose levels may be among these.
    """
    mode = args.distribution_mode
    if mode not in GAMES:
        raise ValueError(f"--{valid}distribution-mode must be one of {', '.join(GAMES)}, got {mode}")
    if args.env is not None and args.multi_env is not None:
        raise ValueError("--env and --multi-env exclude each other")
    if (args.multi_env or 0) > len(GAMES[mode]):
        raise ValueError(f"--multi-env must be at most {len(GAMES[mode])} in distribution mode {mode}, got {args.multi_env}")
    games = GAMES[mode][: args.multi_env or 6] if args.env is None else [*args.env]
    if unknown := [game for game in games if game not in GAMES[mode]]:
        allowed = ", ".join(GAMES[mode])
        raise ValueError(f"--env must be one of {allowed} in {valid}distribution mode {mode}, got {unknown[0]}")
    if not games:
        raise ValueError("--env must name a game, got none")
    if args.start_level > 0 and args.num_levels == 0:
        raise ValueError("--start-level needs --num-levels: with 0, all levels, procgen ignores it")
    if args.start_level + args.num_levels >= 2**31:
        raise ValueError(f"--{valid}start-level plus --{valid}num-levels must be less than {2**31}")
    if trained and trained.distribution_mode == mode:
        first, last = args.start_level, args.start_level + args.num_levels - 1
        if first < trained.start_level + (trained.num_levels or 2**31) and trained.start_level <= last:
            raise ValueError(f"--{valid}start-level must begin levels that are not trained on, got {first} to {last}")
    return games


class ProcgenGym3Env(_Engine):
    """Environments in one vector, as procgen's class of this name makes them. `observe` returns the engine's own arrays.

    Args:
        num, env_name, options: as procgen takes them.
        frames: (num, 64, 64, 3) uint8, memory for the engine to draw into; it does so with gym3, the base of procgen.

    Raises:
        ValueError: the engine does not load.
    """

    def __init__(self, num, env_name, frames=None, **options):
        self._frames = frames
        try:
            super().__init__(num, env_name, **options)
        except OSError as error:  # the dynamic linker's
            raise ValueError(f"procgen does not load ({error}); on Debian: apt install libgl1 libglib2.0-0") from None
        self._reuse_arrays = True  # observe() returns the engine's own arrays: an option of gym3 that procgen hides

    def _numpy_aligned(self, shape, dtype, *rest):  # with which gym3 makes each array that the engine writes to
        if self._frames is not None and tuple(shape) == self._frames.shape:
            return self._frames
        return super()._numpy_aligned(shape, dtype, *rest)


class NoopStarts:
    """Lets episodes begin with steps in which nothing is done, whatever the action: as many as are drawn, from 0 to a
    maximum. So what moves in a level is not always where it was at that step. As the no-op starts of Mnih et al. (2015), but
    the agent sees them.

    Args:
        envs: environments in one vector; their `noop`, if they have one, is the action that does nothing.
        most: (num,), the maximum of each.
        seed: of what is drawn.
    """

    def __init__(self, envs, most, seed):
        self.envs, self.most, self.random = envs, np.asarray(most), np.random.default_rng(seed)
        self.left = np.zeros_like(self.most)  # steps
        self.noop = getattr(envs, "noop", NOOP)

    def observe(self):
        reward, obs, first = self.envs.observe()
        self.left[first] = self.random.integers(self.most[first] + 1)
        return reward, obs, first

    def act(self, action):
        self.envs.act(np.where(self.left > 0, self.noop, action).astype(np.int32))
        self.left -= 1


class Engine:
    """Processes that play the environments of all actors. Each plays a part of those of two actors or more, if there are two:
    for one while the policy of another computes. What passes between an actor and its processes lies in a block of memory
    that they share. There each process has a flag: 1 while it is its turn, 0 while it is the policy's.

    Args:
        make_envs: the script's function.
        args: with num_actors, num_envs (of each) and num_servers, the processes.
        games: environment n of an actor plays games[n % len(games)].
        seed: of the first vector; the next has the next one.
        frame_shape: of what an environment's `observe` returns, uint8.

    Attributes:
        blocks: of each actor, as make_block makes them.
        workers: the processes.
        next_seed: which no vector has.
    """

    def __init__(self, make_envs, args, games, seed, frame_shape):
        self.make_envs, self.args, self.games, self.blocks = make_envs, args, games, []
        B = args.num_envs
        groups = max(1, min(args.num_actors // 2, args.num_servers))  # of actors with the same processes, two or more
        work = [[] for _ in range(min(args.num_servers, groups * B))]  # of each process, a list of vectors
        for actor in range(args.num_actors):
            owners = range(len(work))[actor % groups :: groups]
            self.blocks.append(block := make_block(B, owners, frame_shape))
            for n, owner in enumerate(owners):
                part = slice(B * n // len(owners), B * (n + 1) // len(owners))
                work[owner].append((block, part, block.flags[n].numpy(), seed))
                seed += 1
        self.next_seed = seed
        self.workers = processes.Workers(self.serve, work, [block.flags for block in self.blocks])

    def close(self):
        """Ends the processes, and tells their actors."""
        self.workers.close()
        for block in self.blocks:
            block.closed = True

    def serve(self, work):
        """What a process does: it plays a step of each vector whose flag is 1."""
        vectors = [(flag, self.play(block, part, flag, seed)) for block, part, flag, seed in work]
        idle_since = time.monotonic()
        while True:
            for flag, steps in vectors:
                if flag[0]:
                    next(steps)
                    idle_since = time.monotonic()
            processes.rest(time.monotonic() - idle_since)

    def play(self, block, part, flag, seed):
        """A generator that plays a step of a part of a block whenever it goes on."""
        games = [self.games[n % len(self.games)] for n in range(part.start, part.stop)]
        *inputs, action = (x.numpy()[part] for x in block.tensors)
        envs = self.make_envs(self.args, games, len(games), seed, frames=inputs[0])  # which the engine draws to
        if any(most := [dict(self.args.noop_max).get(game, 0) for game in games]):
            envs = NoopStarts(envs, most, seed)
        nanoseconds, begin = flag.view(np.int64)[4:], time.monotonic_ns()  # from byte 32 on
        while True:
            reward, obs, done = envs.observe()
            for shared, new in zip(inputs, (obs["rgb"], reward, done)):
                if new is not shared:
                    np.concatenate([new], out=shared)  # a copy; an error if it is of another shape or kind of numbers
            flag[1] += 1
            nanoseconds[0] += time.monotonic_ns() - begin
            flag[0] = 0
            yield
            begin = time.monotonic_ns()
            envs.act(action.astype(np.int32))

    def seconds_played(self):
        """Time that processes have played, in seconds, their mean: the rest they waited for policies."""
        nanoseconds = sum(block.flags.view(torch.int64)[:, 4].sum().item() for block in self.blocks)
        return nanoseconds / len(self.workers.pids) / 1e9


def make_block(B, owners, frame_shape):
    """What an actor of B environments shares with the processes that play them, whose numbers are `owners`. Each has a row of
    flags, a cache line: the flag, its steps, its number, and from byte 32 on the nanoseconds that it has played."""
    zeros = processes.shared_zeros
    block = SimpleNamespace(obs=zeros(torch.uint8, B, *frame_shape), reward=zeros(torch.float32, B),
                            done=zeros(torch.bool, B), action=zeros(torch.int64, B),
                            flags=zeros(torch.int32, len(owners), 16), closed=False)
    block.flags[:, 0], block.flags[:, 2] = 1, torch.tensor(owners)
    block.tensors = block.obs, block.reward, block.done, block.action
    return block
