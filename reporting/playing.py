"""Playing: an agent's episodes, each level once and always the same, whatever is played beside it."""

import contextlib
import math
import sys
import threading
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

import srwm_cuda
from housekeeping.launch import num_cores

SLOTS = {"cpu": 32, "cuda": 128}  # environments that a policy plays at once
BATCH = {"cpu": 16, "cuda": 128}  # of which it computes so many at once: a divisor of the former
VECTOR = {"cpu": 4, "cuda": 64}  # how many of them play the same game
ENGINE_THREADS = {"cpu": 0, "cuda": 2}  # that step these; 0: the playing thread does
TURNS = {"cpu": 1, "cuda": 3}  # policies that a thread plays by turns: some act while the environments of others move
FPS = 15  # of a film: the speed at which people play ProcGen


def make_level(script, args, game, level, num=1, **options):
    """`num` of the script's environments that know this level of the game and no other; the caller steps them."""
    return script.make_envs(replace(args, start_level=level, num_levels=1), [game], num, seed=0, **options)


class Policy:
    """The agent in a fixed number of slots, each of which plays an episode. On CUDA its step is a graph of all slots;
    on a CPU it computes batches of those that are in use.

    A batch always has the same size, and is filled up with slots that are not in use. Batches of different sizes are
    rounded differently, but in batches of one size no row depends on the others: an episode is the same in whatever
    company it is played.
    """

    def __init__(self, script, agent, args, greedy, seed, graph=True):
        self.script, self.agent, self.args, self.greedy, self.seed = script, agent.eval(), args, greedy, seed
        self.device = next(agent.parameters(), torch.zeros(())).device
        cuda, B = self.device.type == "cuda", SLOTS[self.device.type]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
        frames = torch.zeros(B, *script.FRAME_SHAPE, dtype=torch.uint8, pin_memory=cuda)
        self.host = (frames, torch.zeros(4, B, pin_memory=cuda))
        self.inputs = [x.to(self.device) for x in self.host]  # on a CPU, the same tensors
        self.frames, (self.reward, self.begin, self.unroll_begins, self.uniform) = (x.numpy() for x in self.host)
        self.action = torch.zeros(B, dtype=torch.int32, pin_memory=cuda)
        self.used = np.zeros(B, dtype=bool)  # which slots
        self.step, self.generators = np.zeros(B, dtype=np.int64), [np.random.default_rng(0) for _ in range(B)]
        self.initial, self.state = agent.initial_state(B), agent.initial_state(B)
        self.bound = getattr(agent, "state_bound", math.inf)
        self.stream = torch.cuda.Stream() if cuda and graph else None
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.forward()
            self.forward = srwm_cuda.capture(self.forward, self.stream)

    def begin_episode(self, slot, game, level, episode=0):
        """What is random in an episode depends on its game, its level and its number there alone."""
        self.step[slot] = self.reward[slot] = 0
        self.used[slot] = True
        if not self.greedy:
            number = list(self.script.RETURN_RANGE).index(game)
            self.generators[slot] = np.random.default_rng([self.seed, number, level] + [episode] * (episode > 0))

    @torch.no_grad()
    def forward(self):
        """Computes `action` and the next state: of all slots on CUDA, else of those in use."""
        frames, numbers = self.inputs
        if self.device.type == "cuda":
            state = choose(numbers[2], self.begin_unrolls(numbers, self.state), self.state)
            action, state = self.compute(frames, numbers, state)
            for old, new in zip(self.state, state):
                old.copy_(new)
            self.action.copy_(action, non_blocking=True)
            return
        if len(starts := torch.from_numpy(np.flatnonzero(self.used & (self.unroll_begins > 0)))):
            begun = self.begin_unrolls(numbers[:, starts], [part[starts] for part in self.state])
            for part, new in zip(self.state, begun):
                part.index_copy_(0, starts, new.to(part.dtype))
        order = torch.from_numpy(np.argsort(~self.used, kind="stable"))  # first those in use
        for rows in order.split(BATCH["cpu"])[: -(-int(self.used.sum()) // BATCH["cpu"])]:
            state = tuple(part.index_select(0, rows) for part in self.state)
            action, state = self.compute(frames.index_select(0, rows), numbers[:, rows], state)
            for old, new in zip((self.action, *self.state), (action, *state)):
                old.index_copy_(0, rows, new.to(old.dtype))

    def begin_unrolls(self, numbers, state):
        """States with which unrolls begin, from those before."""
        _, begin, unroll_begins, _ = numbers
        initial = [part[: len(begin)] for part in self.initial]
        state = choose(begin if self.args.carry_state else unroll_begins, initial, state)
        srwm_cuda.reset_diverged(state, self.bound)  # as actors do
        return state

    def compute(self, frames, numbers, state):
        """Actions and next states of a batch."""
        reward, begin, _, uniform = numbers
        logits, _, state = self.agent(frames[None], reward[None], begin[None].bool(), state)
        if self.greedy:
            action = logits[0].argmax(-1)
        else:
            action = (logits[0].softmax(-1).cumsum(-1) < uniform[:, None]).sum(-1).clamp(max=logits.shape[-1] - 1)
        return action.int(), state

    def begin_act(self):
        """Queues a step. Returns an event; after it, `action` (B,) is there for `frames` and `reward`."""
        self.begin[:] = self.step == 0
        self.unroll_begins[:] = self.step % self.args.unroll_length == 0
        if not self.greedy:
            self.uniform[:] = [generator.random(dtype=np.float32) for generator in self.generators]
        self.step += 1
        with torch.cuda.stream(self.stream):  # None does nothing
            for on_device, on_host in zip(self.inputs, self.host):
                on_device.copy_(on_host, non_blocking=True)
            self.forward()
            return srwm_cuda.record_event()

    def act(self):
        """Actions (B,) for `frames` and `reward`, as a NumPy array."""
        self.begin_act().synchronize()
        return self.action.numpy()


def choose(which, new, old):
    """Each environment's state: its part of `new` where `which` (B,) is not 0, and else of `old`."""
    return tuple(torch.where(which.bool().view(-1, *[1] * (then.ndim - 1)), now, then) for now, then in zip(new, old))


class Vector:
    """Environments that play the levels of one game at a time, in some of a policy's slots."""

    def __init__(self, policy, slots, todo, returns):
        self.policy, self.slots, self.todo, self.returns = policy, slots, todo, returns
        self.playing = np.full(slots.stop - slots.start, -1)  # for which of the returns, or -1
        self.envs = None

    def begin(self):
        """Gives free environments a level, and the policy what it sees. Returns whether there is anything to play."""
        free = np.flatnonzero(self.playing < 0).tolist()
        if len(free) == len(self.playing):
            self.game = max(self.todo, key=lambda game: len(self.todo[game]))  # that of which most is left
            if not self.todo[self.game]:
                return False
            threads = ENGINE_THREADS[self.policy.device.type]
            close(self.envs)
            self.envs = self.make(level=0, num=len(free), num_threads=threads)
        for n in free:
            try:
                self.playing[n], level, episode = self.todo[self.game].popleft()
            except IndexError:  # other threads take from it too
                break
            # An engine plays the levels that it was made for. So environment n gets its level as the state of another
            # engine, which was made for that level alone and has not moved yet.
            one = self.make(level)
            state = one.get_state()[0]
            self.envs.call_c_func("set_state", n, state, len(state))
            close(one)
            self.policy.begin_episode(self.slots.start + n, self.game, level, episode)
        if free:
            self.frames = self.envs.observe()[1]["rgb"]
        self.policy.frames[self.slots] = self.frames
        return (self.playing >= 0).any()

    def make(self, level, **options):
        return make_level(self.policy.script, self.policy.args, self.game, level, **options)

    def act(self, actions):
        self.envs.act(actions[self.slots])

    def observe(self):
        """Waits for the step. Returns how many episodes went on by it, and how many of them ended."""
        reward, obs, ended = self.envs.observe()
        self.frames, self.policy.reward[self.slots] = obs["rgb"], reward
        active = self.playing >= 0
        self.returns[self.playing[active]] += reward[active]
        ended = ended & active
        self.playing[ended] = -1
        self.policy.used[self.slots] = self.playing >= 0
        return dict(steps=int(active.sum()), episodes=int(ended.sum()))


def close(envs):
    """Closes an engine here and now: when Python ends, other threads may be in it. A wrapper need not have a close."""
    getattr(envs, "close", lambda: None)()


def play_slots(policy, todo, returns, progress, stop):
    """Plays what is left to do, {game: deque of (number, level, episode)}, in a policy's slots; adds to the returns by
    number. A generator, which yields where it would wait: an event while the policy acts, None while environments
    move."""
    size = VECTOR[policy.device.type]
    vectors = [Vector(policy, slice(first, first + size), todo, returns) for first in range(0, len(policy.step), size)]
    try:
        while not stop.is_set():
            busy = [vector for vector in vectors if vector.begin()]
            if busy:
                acted = policy.begin_act()
                yield acted
                acted.synchronize()
                for vector in busy:
                    vector.act(policy.action.numpy())
                yield None
                for vector in busy:
                    progress.update(vector.observe())
            elif not any(todo.values()):
                break
    finally:
        for vector in vectors:
            close(vector.envs)


def take_turns(players):
    """Goes on with generators of play_slots until all have ended: while some policies act, the environments of others
    move. Of each kind, the one that has waited longest goes on first."""
    torch.set_num_threads(1)  # in this thread; the other cores have threads of their own
    acting, moving, most_acting = deque(), deque(players), (len(players) + 1) // 3  # as in training
    while acting or moving:
        if acting and (not moving or len(acting) > most_acting or acting[0][1].query()):
            player, _ = acting.popleft()
        else:
            player = moving.popleft()
        with contextlib.suppress(StopIteration):
            if acted := next(player):
                acting.append((player, acted))
            else:
                moving.append(player)


def play(script, agent, args, levels, greedy=True, seed=1, episodes=1, name="playing"):
    """Plays episodes of each (game, level) of a list. Returns their returns in its order, those of a level together."""
    returns, todo = np.zeros(len(levels) * episodes), {game: deque() for game, _ in levels}
    for index, (game, level) in enumerate(levels):
        todo[game].extend((index * episodes + n, level, n) for n in range(episodes))
    device = next(agent.parameters(), torch.zeros(())).device.type
    cores = num_cores()
    threads = cores if device == "cpu" else min(cores, 2)  # on a GPU, more would wait for Python's lock
    count = min(threads * TURNS[device], len(todo) + len(returns) // SLOTS[device])
    policies = [Policy(script, agent, args, greedy, seed) for _ in range(count)]
    stop, progress = threading.Event(), [Counter(steps=0, episodes=0) for _ in policies]
    players = [play_slots(policy, todo, returns, done, stop) for policy, done in zip(policies, progress)]
    groups = [players[number::threads] for number in range(min(threads, count))]
    line = show_progress(name, "episodes", total=len(returns))
    with ThreadPoolExecutor(len(groups)) as pool:
        left = [pool.submit(take_turns, group) for group in groups]
        try:
            while left:
                done, left = wait(left, timeout=0.2)
                for player in done:
                    player.result()
                sums = sum(progress, Counter())
                with contextlib.suppress(OSError):  # nobody reads it: no reason to stop
                    line.set_postfix_str(f"{sums['steps'] / line.format_dict['elapsed']:,.0f} steps/s", refresh=False)
                    line.update(sums["episodes"] - line.n)
        finally:
            stop.set()
    with contextlib.suppress(OSError):
        line.close()
    return returns


def show_progress(name, unit, iterable=None, total=None, delay=1e-9):  # with 0, tqdm prints before anybody plays
    """A line on stderr that says how far a work is and how long it takes yet; in a file, not more than one in five
    seconds. Where the terminal ends, a long name is cut off. Returns tqdm's object: a loop over the iterable, if there
    is one."""
    left = "{percentage:3.0f}%|{bar:10}| {n_fmt} of {total_fmt} {unit}, {elapsed}, {remaining} left{postfix} | {desc}"
    return tqdm(iterable, desc=name, unit=unit, total=total, delay=delay, smoothing=0, dynamic_ncols=True, miniters=0,
                mininterval=0.2 if sys.stderr.isatty() else 5, bar_format=left if total or iterable else None)


class Game:
    """Plays levels of one game in a slot of a policy, one after the other."""

    def __init__(self, name, split, policy, slot, **options):
        self.name, self.split, self.policy, self.slot, self.number = name, split, policy, slot, -1
        self.make = lambda level: make_level(policy.script, policy.args, name, level, **options)
        self.begin()

    def begin(self):
        """Begins the next level of the split."""
        self.number = (self.number + 1) % self.split.count
        self.level, self.total = self.split.first + self.number, 0.0
        self.ended, self.pause = False, FPS  # pictures for which the end stays
        self.env = self.make(self.level)
        self.policy.begin_episode(self.slot, self.name, self.level)
        self.show(self.env.observe()[1])

    def show(self, obs):
        """Keeps what there is to see: for the agent, and for people if the environment was made to."""
        self.frame = obs["rgb"][0]
        self.picture = self.env.get_info()[0].get("rgb", self.frame).copy()
        self.policy.frames[self.slot] = self.frame

    def step(self, actions):
        """Acts. Returns the reward. At an episode's end the last picture stays: procgen shows the next one already."""
        self.env.act(actions[self.slot : self.slot + 1])
        reward, obs, ended = self.env.observe()
        self.policy.reward[self.slot], self.ended = reward[0], bool(ended[0])
        self.total += float(reward[0])
        if not self.ended:
            self.show(obs)
        return float(reward[0])

    def advance(self, actions):
        """The next picture of a film: a step, or for a second the end of the episode, and then the next level."""
        if not self.ended:
            self.step(actions)
        elif self.pause > 1:
            self.pause -= 1
        else:
            self.begin()
