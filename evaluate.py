"""Scores agents: plays each level of one or more splits exactly once per game, and prints tables.

    python evaluate.py runs/A runs/B --splits paper    training levels and the three test splits, all runs in one table
    python evaluate.py --start-level 1000              newest checkpoint under runs/, levels 1000 to 1199
    python evaluate.py runs/A --video out.mp4          the agent playing all its games; also --plot and --probe, out.png
    python evaluate.py pretrained/srwm.pt              a file of weights alone is as good as a run

Agent, environments and normalization are those of the script which the checkpoint names: any impala_procgen_*.py, or
your own copy beside this file. The paper's splits have 200 levels each: the training levels, and tests that start at
1000, 1200 and 1400. The return of every level goes to JSON files beside the checkpoint, or to runs/NAME/ for
pretrained/NAME.pt.

To be read from top to bottom: arguments, runs, playing, main. Statistics, tables and pictures are in reporting/.
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import shlex
import shutil
import sys
import textwrap
import threading
import time
from collections import Counter, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from reporting import tables
from srwm_cuda import processes

SPLITS = {"paper": ["train", "1000", "1200", "1400"], "test": ["1000", "1200", "1400"]}
SLOTS = {"cpu": 32, "cuda": 128}  # environments that a policy plays at once: its batch
VECTOR = {"cpu": 4, "cuda": 64}  # how many of them play the same game
ENGINE_THREADS = {"cpu": 0, "cuda": 2}  # that step these; 0: the playing thread does
TURNS = {"cpu": 1, "cuda": 3}  # policies that a thread plays by turns: some act while the environments of others move


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """run folders or checkpoint files to score (none: the newest runs/*/checkpoint.pt)"""
    splits: tuple[str, ...] | None = None
    """train (a run's own levels), test (1000 1200 1400), paper (both), or first levels (None: --start-level)"""
    start_level: int = 0
    """first level, if --splits names none"""
    num_levels: int = 200
    """levels in a split, each played once per game"""
    distribution_mode: str | None = None
    """easy, hard, extreme or memory (None: the run's own)"""
    env: tuple[str, ...] = ()
    """games to play (none: the run's own)"""
    greedy: bool = True
    """take the most probable action; --no-greedy samples"""
    seed: int = 1
    """seed of the sampled actions"""
    cuda: bool = torch.cuda.is_available()
    """compute on the GPU"""
    bf16: bool | None = None
    """run the CNN in bfloat16: on a CPU faster, but scores then depend on the kind of machine (None: on CPUs that
    compute in it)"""
    format: Literal["text", "markdown", "csv", "json"] = "text"
    """of the tables"""
    plot: Path | None = None
    """draw learning curves and scores into this picture, such as out.png"""
    video: Path | None = None
    """instead of scoring, film the agent at its games: out.mp4 or out.gif"""
    probe: Path | None = None
    """instead of scoring, draw what the self-referential matrices do in one episode: out.png"""


def command_line(text, interface, **options):
    """Parses the command line with a function of tyro, whose boxed error message becomes the one line of a
    ValueError."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        for part in text.rstrip().split("\n\n"):  # what is indented stays as it is
            print(part if part.startswith(" ") else textwrap.fill(part, shutil.get_terminal_size().columns), end="\n\n")
    with contextlib.redirect_stderr(io.StringIO()) as box:
        try:
            return interface(**options)
        except SystemExit as end:
            if end.code:
                lines = [line.strip("│| ") for line in box.getvalue().splitlines()[1:-1]]  # without the frame
                message = " ".join(line for line in lines if line.strip("─-"))
                raise ValueError(" ".join(message.split())) from None
            raise


Split = namedtuple("Split", "first count column")  # of the tables: train, test, or mixed if it has levels of both kinds


@dataclass
class Run:
    path: Path
    script: object  # the module
    trained: object  # its script's arguments, resolved
    args: object  # the same with the distribution mode to play
    games: list
    agent: torch.nn.Module
    splits: list
    about: dict  # what every record of it says
    model: str = ""  # its name in the tables
    records: list = field(default_factory=list)  # one for each split that was played: what goes into a JSON file


def script_of(path):
    """The name of the script whose checkpoint this is. ValueError if it is none; the script itself checks the rest."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own for a damaged file
        raise ValueError(f"{path} is not a whole checkpoint ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("script"), str):
        raise ValueError(f"{path} is not a checkpoint of this project")
    return checkpoint["script"]


def import_script(name):
    """The training script `name` beside this file, as a module. ValueError if there is none of that name."""
    path = Path(__file__).parent / name
    if Path(name).name != name or path.suffix != ".py" or not path.is_file():
        raise ValueError(f"the checkpoint's script, {name}, is not a Python file beside {Path(__file__).name}; "
                         "the run's folder has a copy that you can put there")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"the checkpoint's script, {name}, cannot be imported: {error}") from None
    if not hasattr(module, "Agent"):
        raise ValueError(f"the checkpoint's script, {name}, has no Agent")
    return module


def choose_splits(args, mode, games, script, history):
    """The splits that the arguments ask for. Their columns in the tables depend on what the run has seen: history is a
    list of arguments and games, its own and then those of the runs with whose weights it began."""
    trained, _ = history[0]
    words = [part for word in args.splits or [str(args.start_level)] for part in SPLITS.get(word, [word])]
    if wrong := [word for word in words if word != "train" and not (word.isdecimal() and int(word) < 2**31)]:
        is_run = Path(wrong[0]).exists() or "/" in wrong[0]
        hint = " (runs come first: evaluate.py RUNS --splits ...)" if is_run else ""
        raise ValueError(f"--splits must be train, test, paper or first levels, got {wrong[0]}{hint}")
    own = (trained.start_level, min(args.num_levels, trained.num_levels or 2**31))
    splits, last = [], None
    for first, count in sorted({own if word == "train" else (int(word), args.num_levels) for word in words}):
        if last is not None and first <= last:
            raise ValueError(f"--splits must not overlap: with --num-levels {args.num_levels}, level {first} is in two")
        last = first + count - 1
        script.check_games(games, replace(trained, distribution_mode=mode, start_level=first, num_levels=count))
        column = "test"
        for seen, seen_games in history:
            begin, end = seen.start_level, seen.start_level + (seen.num_levels or 2**31)
            if mode == seen.distribution_mode and begin <= last and first < end and set(games) & set(seen_games):
                all_of_them = begin <= first and last < end and set(games) <= set(seen_games)
                column = "train" if all_of_them or column == "train" else "mixed"
        splits.append(Split(first, count, column))
    return splits


def load_run(path, args):
    """The run of a folder or checkpoint file, ready to be played. Raises ValueError for what is not allowed."""
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"runs must be folders with a checkpoint.pt, or checkpoint files; {path}: no such file")
    script = import_script(script_of(path))
    checkpoint = script.load_checkpoint(path, None)
    history = resolve_history(script, checkpoint, args)
    trained, trained_games = history[0]
    mode, games = args.distribution_mode or trained.distribution_mode, list(args.env) or trained_games
    if len(set(games)) < len(games):
        raise ValueError(f"--env must name each game once, got {' '.join(games)}")
    splits, played = choose_splits(args, mode, games, script, history), replace(trained, distribution_mode=mode)
    with ThreadPoolExecutor() as pool:
        engine = pool.submit(script.make_envs, played, games, len(games), seed=0)  # loads its pictures meanwhile
        agent = script.Agent(trained).to("cuda" if args.cuda else "cpu").requires_grad_(False)
        script.load_weights(agent, checkpoint)
        envs = engine.result()  # fails early if procgen cannot start
    if ffi := getattr(envs, "_ffi", None):  # where gym3 opens the engine's library: once, not for each engine,
        ffi.dlopen = functools.cache(ffi.dlopen)  # which would take a quarter of the time to make one
    if args.cuda and not trained.bf16:
        channels_first(agent)
    about = describe(path, script, checkpoint, history)
    if about["run"] and about["code"] != hashlib.sha256(script.SOURCE.encode()).hexdigest()[:8]:
        print(f"note: {about['script']} has changed since it trained {path}, whose folder has a copy of it as it was",
              file=sys.stderr)
    return Run(path, script, trained, played, games, agent, splits, about)


def channels_first(agent):
    """Lets an agent's convolutions see channels first in memory: so cuDNN's take half the time in float32."""
    agent.to(memory_format=torch.contiguous_format)
    for module in agent.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))


def resolve_history(script, checkpoint, args):
    """[(arguments as this machine needs them, games)] of the checkpoint's run, then of those with whose weights it
    began."""
    bf16 = False if args.cuda and args.bf16 is None else args.bf16  # a GPU is fast enough in float32
    here = dict(cuda=args.cuda, bf16=bf16, resume=None, num_actors=None, num_envs=None)
    known = {field.name for field in fields(script.Args)}  # those of an older version may be gone
    return [script.resolve_args(script.Args(**{name: value for name, value in saved.items() if name in known} | here))
            for saved in (checkpoint["args"], *(parts[-1]["args"] for parts in checkpoint["before"]))]


def flags_of(saved, script):
    """{name: flag as typed} of a run's saved arguments, those that differ from the script's defaults."""
    flags = {}
    for argument in fields(script.Args):
        value = saved.get(argument.name, argument.default)
        if argument.name not in ("cuda", "resume") and value != argument.default:
            flag = argument.name.replace("_", "-")
            switch = f"--{'no-' * (not value)}{flag}"
            flags[argument.name] = switch if argument.type is bool else f"--{flag} {shlex.quote(str(value))}"
    return flags


def describe(path, script, checkpoint, history):
    """What every record of a run says about it, and about those with whose weights it began."""
    (trained, trained_games), *before = history
    first, count = trained.valid_start_level, trained.valid_num_levels
    return dict(run=path.resolve().parent.name if checkpoint["optimizer"] else None, file=path.stem,
                script=checkpoint["script"], code=checkpoint["history"][-1]["sha256"][:8],
                flags=flags_of(checkpoint["args"], script),
                init_from=[dict(exp_name=Path(parts[-1]["args"]["exp_name"]).name, games=games,
                                flags=flags_of(parts[-1]["args"], script))
                           for parts, (_, games) in zip(checkpoint["before"], before)],
                trained_games=trained_games, seed=trained.seed, step=checkpoint["step"],
                validation=[first, first + count - 1] if count else None, bf16=trained.bf16)


def prepare(args):
    """The runs to play. Raises ValueError for whatever is not allowed, before any work is done."""
    for name, least in (("start_level", 0), ("seed", 0), ("num_levels", 1)):
        if not least <= (value := getattr(args, name)) < 2**31:
            allowed = "positive" if least else "at least 0"
            raise ValueError(f"--{name.replace('_', '-')} must be {allowed} and less than {2**31}, got {value}")
    if args.splits == ():
        raise ValueError("--splits must be train, test, paper or first levels, got none")
    if args.splits and args.start_level:
        raise ValueError("--start-level and --splits exclude each other: --splits takes first levels too")
    if args.plot or args.video or args.probe:
        pictures = importlib.import_module("reporting.pictures")
        pictures.check(args)
    newest = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)[-1:]
    paths = list(args.runs) or newest
    if not paths:
        raise ValueError("runs must name folders or checkpoint files, since there is no checkpoint under runs/")
    if len(paths) > 1 and (args.video or args.probe):
        raise ValueError(f"--{'video' if args.video else 'probe'} shows a single run, got {len(paths)}")
    if empty := [path for path in paths if path.is_dir() and not (path / "checkpoint.pt").is_file()]:
        if len(empty) < len(paths):  # as in runs/*, where one has just begun
            print(f"note: left out, there is no checkpoint.pt in {', '.join(map(str, empty))}", file=sys.stderr)
            paths = [path for path in paths if path not in empty]
    runs = [load_run(path, args) for path in paths]
    for run in runs:
        if sum(run.path.samefile(other.path) for other in runs) > 1:
            raise ValueError(f"runs must be named once each, got {run.path} twice")
        if run.games != runs[0].games or run.args.distribution_mode != runs[0].args.distribution_mode:
            first, other = (f"{one.path}: {' '.join(one.games)} ({one.args.distribution_mode})"
                            for one in (runs[0], run))
            raise ValueError("runs must have the same games and distribution mode, or --env and --distribution-mode "
                             f"must say which to compare; {first}; {other}")
    for path, count in Counter(record_path(run, args, split) for run in runs for split in run.splits).items():
        if count > 1:
            raise ValueError(f"runs must be files of different names, since the scores of {path.stem} have one place")
    abouts = [run.about for run in runs]
    if args.probe:
        pictures.check_probe(runs[0])
    names = tables.name_models(abouts)
    for run, name in zip(runs, names):
        run.model = name
    for sentence in tables.odd_seeds(names, abouts):
        print(f"note: {sentence}", file=sys.stderr)
    return runs


def make_level(script, args, game, level, num=1, **options):
    """`num` of the script's environments that know this level of the game and no other; the caller steps them."""
    return script.make_envs(replace(args, start_level=level, num_levels=1), [game], num, seed=0, **options)


class Policy:
    """The agent in a fixed number of slots, each of which plays an episode. On CUDA its step is a graph.

    The batch has all slots always, whether they are in use or not. Batches of different sizes are rounded differently,
    but in batches of one size no row depends on the others: an episode is the same in whatever company it is played.
    """

    def __init__(self, script, agent, args, greedy, seed, graph=True):
        self.script, self.agent, self.args, self.greedy, self.seed = script, agent.eval(), args, greedy, seed
        self.device = next(agent.parameters(), torch.zeros(())).device
        cuda, B = self.device.type == "cuda", SLOTS[self.device.type]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
        self.host = (torch.zeros(B, 64, 64, 3, dtype=torch.uint8, pin_memory=cuda), torch.zeros(4, B, pin_memory=cuda))
        self.inputs = [x.to(self.device) for x in self.host]  # on a CPU, the same tensors
        self.frames, (self.reward, self.begin, self.unroll_begins, self.uniform) = (x.numpy() for x in self.host)
        self.action = torch.zeros(B, dtype=torch.int32, pin_memory=cuda)
        self.step, self.generators = np.zeros(B, dtype=np.int64), [np.random.default_rng(0) for _ in range(B)]
        self.initial, self.state = agent.initial_state(B), agent.initial_state(B)
        self.stream = torch.cuda.Stream() if cuda and graph else None
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.forward()
            self.forward = script.capture(self.forward, self.stream)

    def begin_episode(self, slot, game, level):
        """What is random in an episode depends on its game and level alone."""
        self.step[slot] = self.reward[slot] = 0
        if not self.greedy:
            number = list(self.script.RETURN_RANGE).index(game)
            self.generators[slot] = np.random.default_rng([self.seed, number, level])

    @torch.no_grad()
    def forward(self):
        frames, (reward, begin, unroll_begins, uniform) = self.inputs
        state = choose(begin if self.args.carry_state else unroll_begins, self.initial, self.state)
        checked = [part.clone() for part in state]
        self.script.reset_diverged(self.agent, checked)  # as actors do with each unroll
        state = choose(unroll_begins, checked, state)
        logits, _, state = self.agent(frames[None], reward[None], begin[None].bool(), state)
        for old, new in zip(self.state, state):
            old.copy_(new)
        if self.greedy:
            action = logits[0].argmax(-1)
        else:
            action = (logits[0].softmax(-1).cumsum(-1) < uniform[:, None]).sum(-1).clamp(max=logits.shape[-1] - 1)
        self.action.copy_(action.int(), non_blocking=True)

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
            return self.script.record_event()

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

    def begin(self):
        """Gives free environments a level, and the policy what it sees. Returns whether there is anything to play."""
        free = np.flatnonzero(self.playing < 0).tolist()
        if len(free) == len(self.playing):
            self.game = max(self.todo, key=lambda game: len(self.todo[game]))  # that of which most is left
            if not self.todo[self.game]:
                return False
            threads = ENGINE_THREADS[self.policy.device.type]
            self.envs = self.make(level=0, num=len(free), num_threads=threads)
        for n in free:
            try:
                self.playing[n], level = self.todo[self.game].popleft()
            except IndexError:  # other threads take from it too
                break
            # An engine plays the levels that it was made for. So environment n gets its level as the state of another
            # engine, which was made for that level alone and has not moved yet.
            state = self.make(level).get_state()[0]
            self.envs.call_c_func("set_state", n, state, len(state))
            self.policy.begin_episode(self.slots.start + n, self.game, level)
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
        return dict(steps=int(active.sum()), episodes=int(ended.sum()))


def play_slots(policy, todo, returns, progress, stop):
    """Plays what is left to do, {game: deque of (number, level)}, in a policy's slots; adds to the returns by number.
    A generator, which yields where it would wait: an event while the policy acts, None while environments move."""
    size = VECTOR[policy.device.type]
    vectors = [Vector(policy, slice(first, first + size), todo, returns) for first in range(0, len(policy.step), size)]
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


def play(script, agent, args, levels, greedy=True, seed=1, name="playing"):
    """Plays one episode of each (game, level) of a list. Returns their returns, in its order."""
    returns, todo = np.zeros(len(levels)), {game: deque() for game, _ in levels}
    for index, (game, level) in enumerate(levels):
        todo[game].append((index, level))
    device = next(agent.parameters(), torch.zeros(())).device.type
    cores = script.num_cores()
    threads = cores if device == "cpu" else min(cores, 2)  # on a GPU, more would wait for Python's lock
    count = min(threads * TURNS[device], len(todo) + len(levels) // SLOTS[device])
    policies = [Policy(script, agent, args, greedy, seed) for _ in range(count)]
    stop, progress = threading.Event(), [Counter(steps=0, episodes=0) for _ in policies]
    players = [play_slots(policy, todo, returns, done, stop) for policy, done in zip(policies, progress)]
    groups = [players[number::threads] for number in range(min(threads, count))]
    with ThreadPoolExecutor(len(groups)) as pool:
        try:
            follow([pool.submit(take_turns, group) for group in groups], progress, len(levels), name)
        finally:
            stop.set()
    return returns


def follow(players, progress, total, name):
    """Shows on stderr how far the players are: on a terminal in one line, elsewhere in one line every five seconds."""
    begin, terminal, left = time.time(), sys.stderr.isatty(), players
    while left:
        done, left = wait(left, timeout=0.2 if terminal else 5.0)
        for player in done:
            player.result()
        sums, seconds = sum(progress, Counter()), time.time() - begin
        if left or terminal:
            line = (f"{name}: {sums['episodes']:,} of {total:,} episodes, {sums['steps'] / seconds:,.0f} steps/s, "
                    f"{seconds:.0f} s")
            width = max(1, shutil.get_terminal_size().columns - 1)
            with contextlib.suppress(OSError):
                print("\r" + line[:width].ljust(width) if terminal else line, end="" if terminal and left else "\n",
                      file=sys.stderr, flush=True)


def score(run, args):
    """Plays all splits of a run's games. Each makes a record, and a JSON file of it."""
    levels = [(game, split.first + n) for split in run.splits for game in run.games for n in range(split.count)]
    returns = play(run.script, run.agent, run.args, levels, args.greedy, args.seed, str(run.path))
    mode, written = run.args.distribution_mode, []
    ranges = {game: run.script.RETURN_RANGE[game].get(mode) for game in run.games}
    for split in run.splits:
        now, returns = np.split(returns, [len(run.games) * split.count])
        record = run.about | dict(distribution_mode=mode, start_level=split.first, num_levels=split.count,
                                  column=split.column, greedy=args.greedy, action_seed=args.seed)
        record |= tables.summarize(dict(zip(run.games, now.reshape(len(run.games), -1).tolist())), ranges)
        run.records.append(record)
        path = record_path(run, args, split)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
            written.append(path)
        except OSError as error:
            print(f"not written: {error}", file=sys.stderr)
    if written:
        print(f"every level's return: {', '.join(map(str, written))}", file=sys.stderr, flush=True)


def record_path(run, args, split):
    """The JSON file of a split: beside the checkpoint, but not beside weights alone, which others have published."""
    folder = run.path.parent if run.about["run"] else Path("runs", run.path.stem)
    file, sampled = [run.path.stem] * (run.path.stem != "checkpoint"), ["sampled", args.seed] * (not args.greedy)
    words = ["evaluation", *file, *args.env, run.args.distribution_mode, split.first, split.count, *sampled]
    return folder / ("_".join(map(str, words)) + ".json")


def open_streams():
    """Lets closed standard streams lead nowhere; characters that the terminal lacks are printed as question marks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")


def show(text):
    """Prints the tables, if there is still somebody who reads them. A full disk ends the program."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tells of it once more at its end
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"{Path(__file__).name}: the tables could not be printed: {error}")


def main():
    open_streams()
    try:
        try:
            args = command_line(__doc__, tyro.cli, f=Args, description="")
            runs = prepare(args)
            processes.keep_freed_memory()
        except BrokenPipeError:  # of --help | head
            os._exit(0)
        except (ValueError, OSError) as error:
            print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
            sys.exit(2)
        if args.plot or args.video or args.probe:
            from reporting import pictures  # with libraries that nothing else needs

            make_policy = functools.partial(Policy, runs[0].script, runs[0].agent, runs[0].args, args.greedy, args.seed)
        if args.video:
            pictures.film(runs[0], make_policy(), make_level, args.video)
        if args.probe:
            pictures.probe(runs[0], make_policy(graph=False), make_level, args.probe)
        if args.plot or not (args.video or args.probe):
            for run in runs:
                score(run, args)
            rows = tables.tabulate(runs)
            show(tables.FORMATS[args.format](runs, rows))
        if args.plot:
            pictures.plot(runs, rows, [pictures.curves(run.path.parent) for run in runs], args.plot)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # of a disk that became full under a picture
        sys.exit(f"{Path(__file__).name}: stopped: {error}")
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"{Path(__file__).name}: the GPU's memory is too small; --no-cuda needs none: {reason}")


if __name__ == "__main__":
    main()
