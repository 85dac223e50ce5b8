"""A run: to load it with its script, to choose what of it is played, and what its records say."""

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import shlex
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

import housekeeping
import srwm_cuda
from housekeeping import arguments, checkpoints, engine
from reporting import playing

HOME = Path(__file__).parent.parent  # where the scripts are
RECORD = set("run file script code flags init_from trained_games seed step validation bf16 distribution_mode "
             "start_level num_levels column greedy action_seed games mean".split())  # what a record has at least
SHARED = dict(srwm_cuda=srwm_cuda, housekeeping=housekeeping)  # what scripts import of this project
SPLITS = {"paper": ["train", "1000", "1200", "1400"], "test": ["1000", "1200", "1400"]}


# The column is of the tables: train, test, mixed (levels of both kinds), validation (weights were chosen on some of it).
Split = namedtuple("Split", "first count column")


@dataclass
class Choice:
    """What of a run to play, and how: the part of evaluate.py's arguments that is needed here."""

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
    cuda: bool = torch.cuda.is_available()
    """compute on the GPU"""
    bf16: bool | None = None
    """run the CNN in bfloat16: on a CPU faster, but scores then depend on the kind of machine (None: on CPUs that
    compute in it)"""


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
    """The name of the script whose checkpoint this is. ValueError if it is none; load_checkpoint checks the rest."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own for a damaged file
        raise ValueError(f"{path} is not a whole checkpoint ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("script"), str):
        raise ValueError(f"{path} is not a checkpoint of this project")
    return checkpoint["script"]


def import_script(name):
    """The training script `name` beside evaluate.py, as a module. ValueError if there is none of that name."""
    path = HOME / name
    if Path(name).name != name or path.suffix != ".py" or not path.is_file():
        raise ValueError(f"the checkpoint's script, {name}, is not a Python file beside evaluate.py; "
                         "the run's folder has a copy that you can put there")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"the checkpoint's script, {name}, cannot be imported: {error}; a copy of an older version needs "
                         "srwm_cuda/ and housekeeping/ as they were then") from None
    if not hasattr(module, "Agent"):
        raise ValueError(f"the checkpoint's script, {name}, has no Agent")
    return module


def choose_splits(args, mode, games, script, history, is_best=False):
    """The splits that the arguments ask for. Their columns in the tables depend on what the run has seen: history is a
    list of arguments and games, its own and then those of the runs with whose weights it began. is_best: whether its
    weights were chosen by validation."""
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
        engine.check_games(replace(trained, env=tuple(games), multi_env=None, distribution_mode=mode, start_level=first,
                                   num_levels=count))
        column = "test"
        for seen, seen_games in history:
            begin, end = seen.start_level, seen.start_level + (seen.num_levels or 2**31)
            if mode == seen.distribution_mode and begin <= last and first < end and set(games) & set(seen_games):
                all_of_them = begin <= first and last < end and set(games) <= set(seen_games)
                column = "train" if all_of_them or column == "train" else "mixed"
        begin, end = trained.valid_start_level, trained.valid_start_level + trained.valid_num_levels
        valid_mode = trained.valid_distribution_mode or trained.distribution_mode
        if is_best and column == "test" and mode == valid_mode and begin <= last and first < end:
            column = "validation"
        splits.append(Split(first, count, column))
    return splits


def load_run(path, args):
    """The run of a folder or checkpoint file, ready to be played. Raises ValueError for what is not allowed."""
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"runs must be folders with a checkpoint.pt, or checkpoint files; {path}: no such file")
    script = import_script(script_of(path))
    checkpoint = checkpoints.load_checkpoint(path, None)
    history = resolve_history(script, checkpoint, args)
    trained, trained_games = history[0]
    mode = args.distribution_mode or trained.distribution_mode
    known = engine.GAMES.get(mode, [])  # whose order all runs have, whatever that of their --env
    games = list(args.env or sorted(dict.fromkeys(trained_games), key=lambda game: [*known, game].index(game)))
    if len(set(games)) < len(games):
        raise ValueError(f"--env must name each game once, got {' '.join(games)}")
    splits = choose_splits(args, mode, games, script, history, path.stem == "best")
    played = replace(trained, distribution_mode=mode)
    with ThreadPoolExecutor() as pool:
        envs = pool.submit(script.make_envs, played, games, len(games), seed=0)  # loads its pictures meanwhile
        agent = script.Agent(trained).to("cuda" if args.cuda else "cpu").requires_grad_(False)
        checkpoints.load_weights(agent, checkpoint)
        envs = envs.result()  # fails early if procgen cannot start
    if ffi := getattr(envs, "_ffi", None):  # where gym3 opens the engine's library: once, not for each engine,
        ffi.dlopen = functools.cache(ffi.dlopen)  # which would take a quarter of the time to make one
    if args.cuda and not trained.bf16:
        channels_first(agent)
    about = describe(path, script, checkpoint, history)
    note_changes(about, path, script)
    return Run(path, script, trained, played, games, agent, splits, about)


def note_changes(about, path, script):
    """Says if the script, or what it imports of this project, is not what trained the run."""
    now = dict(code=hashlib.sha256(script.SOURCE.encode()).hexdigest()[:8])
    now |= {name: package.SHA256[:8] for name, package in SHARED.items()}
    names = dict(code=about["script"]) | {name: name for name in SHARED}
    if changed := [names[name] for name in now if about[name] not in ("", now[name])]:
        copy = ", whose folder has a copy of the script as it was" * (about["run"] is not None)
        print(f"note: {path} was trained with another version of {' and '.join(changed)}{copy}", file=sys.stderr)


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
    return [script.resolve_args(replace(arguments.from_plain(saved, script.Args), **here))
            for saved in (checkpoint["args"], *(parts[-1]["args"] for parts in checkpoint["before"]))]


def flags_of(saved, script, defaults=None):
    """{name: flag as typed} of a run's saved arguments, those that differ from the defaults: the script's, or these."""
    plain = arguments.to_plain(script.Args())
    flags, defaults = {}, plain | (defaults or {})
    for argument in fields(script.Args):
        default = defaults[argument.name]
        value = saved.get(argument.name, default)
        if argument.name not in ("cuda", "resume") and arguments.as_typed(value) != arguments.as_typed(default):
            flag = argument.name.replace("_", "-")
            switch = f"--{'no-' * (not value)}{flag}"
            typed = f"--{flag} {shlex.join(map(str, arguments.leaves(value)))}"
            flags[argument.name] = switch if argument.type is bool else typed
    return flags


def parts_of(parts, end, script):
    """What trained a run until step `end`: [dict(until, flags, code, hashes of SHARED, processes)], oldest first, without
    parts that trained no step."""
    ends = [*(part["step"] for part in parts[1:]), end]
    found = [dict(until=until, flags=flags_of(part["args"], script), code=part.get("sha256", "")[:8],
                  **{name: part.get(name, "")[:8] for name in SHARED}, processes=part.get("processes", 1))
             for part, until in zip(parts, ends) if until > part["step"] or len(parts) == 1]
    return found or parts_of(parts[:1], end, script)


def trained_by(parts, end, script):
    """What a record says of that: its newest part, and those before it."""
    *earlier, last = parts_of(parts, end, script)
    del last["until"]
    return last | dict(parts=earlier)


def commands(checkpoint, script, name):
    """What was typed for each part of the run of this name: [dict(step, command)]."""
    typed, before = [], None
    for part in checkpoint["history"]:
        words = ["python", checkpoint["script"]] + ["--resume", f"runs/{name}"] * (before is not None)
        words += flags_of(part["args"], script, before).values()
        typed.append(dict(step=part["step"], command=" ".join(words)))
        before = part["args"]
    return typed


def describe(path, script, checkpoint, history):
    """What every record of a run says about it, and about those with whose weights it began."""
    (trained, trained_games), *before = history
    first, count, step = trained.valid_start_level, trained.valid_num_levels, checkpoint["step"]
    return dict(run=path.resolve().parent.name if checkpoint["optimizer"] else None, file=path.stem,
                script=checkpoint["script"], **trained_by(checkpoint["history"], step, script),
                init_from=[dict(exp_name=Path(parts[-1]["args"]["exp_name"]).name, games=games,
                                **trained_by(parts, math.inf, script))
                           for parts, (_, games) in zip(checkpoint["before"], before)],
                trained_games=trained_games, seed=trained.seed, step=step, finished=step >= trained.total_steps,
                validation=[first, first + count - 1] if count else None, bf16=trained.bf16,
                weights=hashlib.sha256(path.read_bytes()).hexdigest()[:16], player=player(script))


def player(script):
    """A hash of all that decides, besides weights and arguments, how an episode is played."""
    texts = script.SOURCE, srwm_cuda.SHA256, *(Path(module.__file__).read_text() for module in (playing, engine))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def read_record(path):
    """What evaluate.py wrote to this file. Raises ValueError for anything else."""
    with contextlib.suppress(json.JSONDecodeError, UnicodeError):
        record = json.loads(path.read_text())
        whole = isinstance(record, dict) and RECORD <= record.keys()
        if whole and all(isinstance(ancestor, dict) for ancestor in record["init_from"]):  # once they were names
            return record
    raise ValueError(f"{path} is not a whole record of evaluate.py")
