"""Scores agents: plays each level of one or more splits once per game, or several times, and prints tables.

    python evaluate.py runs/A runs/B --splits paper    training and test levels
    python evaluate.py --start-level 1000              newest run, new levels
    python evaluate.py runs/A --video out.mp4          a film; --plot, --probe
    python evaluate.py pretrained/srwm.pt              weights alone are enough

Agent, environments and normalization are those of the script which the checkpoint names: any impala_procgen_*.py, or
your own copy beside this file. The paper's splits have 200 levels each: the training levels, and tests that start at
1000, 1200 and 1400. The return of every level goes to JSON files beside the checkpoint, or to runs/NAME/ for
pretrained/NAME.pt.

To be read from top to bottom: arguments, runs, scores, main. How runs are loaded, played, and made into tables and
pictures is in reporting/.
"""

import importlib
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.append(str(Path(__file__).parent))  # where these are, also with PYTHONSAFEPATH
from reporting import playing, tables
from reporting.runs import Choice, load_run, read_record
from housekeeping import arguments, processes

SAME = ("weights", "player", "distribution_mode", "start_level", "num_levels", "greedy", "action_seed", "episodes",
        "bf16")


@dataclass
class Args(Choice):
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """run folders or checkpoint files to score (none: the newest runs/*/checkpoint.pt)"""
    greedy: bool = True
    """take the most probable action; --no-greedy samples"""
    seed: int = 1
    """seed of the sampled actions"""
    episodes: int = 1
    """episodes of each level, with --no-greedy: greedy ones are all the same"""
    replay: bool = False
    """play anew what was played before by the same weights and code"""
    format: Literal["text", "markdown", "csv", "json"] = "text"
    """of the tables"""
    plot: Path | None = None
    """draw learning curves and scores into this picture, such as out.png"""
    video: Path | None = None
    """instead of scoring, film the agent at its games: out.mp4 or out.gif"""
    probe: Path | None = None
    """instead of scoring, draw what the self-referential matrices do in one episode: out.png"""


def say(text):
    print(text, file=sys.stderr, flush=True)


def prepare(args):
    """The runs to play. Raises ValueError for whatever is not allowed, before any work is done."""
    for name, least in (("start_level", 0), ("seed", 0), ("num_levels", 1), ("episodes", 1)):
        if not least <= (value := getattr(args, name)) < 2**31:
            allowed = "positive" if least else "at least 0"
            raise ValueError(f"--{name.replace('_', '-')} must be {allowed} and less than {2**31}, got {value}")
    if args.greedy and args.episodes > 1:
        raise ValueError(f"--episodes must be 1 with greedy actions, got {args.episodes}: all episodes of a level "
                         "would be the same; --no-greedy samples")
    if args.splits == ():
        raise ValueError("--splits must be train, test, paper or first levels, got none")
    if args.splits and args.start_level:
        raise ValueError("--start-level and --splits exclude each other: --splits takes first levels too")
    if Path("runs").is_symlink() and not Path("runs").exists():
        raise ValueError("runs, the folder, is a link to one that is not there")
    if args.plot or args.video or args.probe:
        pictures = importlib.import_module("reporting.pictures")
        pictures.check(args)
    paths = find_runs(args.runs)
    if len(paths) > 1 and (args.video or args.probe):
        raise ValueError(f"--{'video' if args.video else 'probe'} shows a single run, got {len(paths)}")
    runs = [load_run(path, args) for path in paths]
    for run in runs:
        if run.games != runs[0].games or run.args.distribution_mode != runs[0].args.distribution_mode:
            first, other = (f"{one.path}: {' '.join(one.games)} ({one.args.distribution_mode})"
                            for one in (runs[0], run))
            raise ValueError("runs must have the same games and distribution mode, or --env and --distribution-mode "
                             f"must say which to compare; {first}; {other}")
    for path, count in Counter(record_path(run, args, split) for run in runs for split in run.splits).items():
        if count > 1:
            raise ValueError(f"runs must be files of different names, since the scores of {path.stem} have one place")
    if args.probe:
        pictures.check_probe(runs[0])
    for run, name in zip(runs, tables.name_models([run.about for run in runs])):
        run.model = name
    kept, repeated = tables.one_of_each_seed(runs, [run.about for run in runs])
    for run in repeated:
        say(f"note: left out, {run.path} has a seed of {run.model} that is there already: {run.about['seed']}")
    return kept


def find_runs(named):
    """The runs that are named, each once, or the newest."""
    newest = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)[-1:]
    paths = list(named) or newest
    if not paths:
        raise ValueError("runs must name folders or checkpoint files, since there is no checkpoint under runs/")
    if empty := [path for path in paths if path.is_dir() and not (path / "checkpoint.pt").is_file()]:
        if len(empty) < len(paths):  # as in runs/*, where one has just begun
            say(f"note: left out, there is no checkpoint.pt in {', '.join(map(str, empty))}")
            paths = [path for path in paths if path not in empty]
    found = {}
    for path in paths:
        file = (path / "checkpoint.pt" if path.is_dir() else path).resolve()
        if found.setdefault(file, path) is not path:  # a link, such as runs/latest, in runs/*
            say(f"note: left out, {path} is {found[file]} once more")
    return list(found.values())


def score(run, args):
    """Plays all splits of a run's games that it has not played yet. Each makes a record, and a JSON file of it."""
    mode, levels = run.args.distribution_mode, []
    ranges = {game: run.script.RETURN_RANGE[game].get(mode) for game in run.games}
    for split in run.splits:
        record = run.about | dict(distribution_mode=mode, start_level=split.first, num_levels=split.count,
                                  column=split.column, greedy=args.greedy, action_seed=args.seed,
                                  episodes=args.episodes)
        if returns := {} if args.replay else known_returns(record, record_path(run, args, split), run.games):
            record |= tables.summarize(returns, ranges)
        else:
            levels += [(game, split.first + n) for game in run.games for n in range(split.count)]
        run.records.append(record)
    if used := [record_path(run, args, split) for run_record, split in zip(run.records, run.splits)
                if "games" in run_record]:
        say(f"note: not played again (--replay does): {', '.join(map(str, used))}")
    if not levels:
        return
    played = playing.play(run.script, run.agent, run.args, levels, args.greedy, args.seed, args.episodes, str(run.path))
    written = []
    for record, split in zip(run.records, run.splits):
        if "games" not in record:
            shape = len(run.games), split.count, args.episodes
            now, played = np.split(played, [np.prod(shape)])
            record |= tables.summarize(dict(zip(run.games, now.reshape(shape))), ranges)
            path = record_path(run, args, split)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(record, indent=1) + "\n")
                written.append(path)
            except OSError as error:
                say(f"not written: {error}")
    if written:
        say(f"every level's return: {', '.join(map(str, written))}")


def known_returns(record, path, games):
    """{game: returns} of the file, if the same weights played the same levels by the same code; else nothing."""
    try:
        before = read_record(path)
    except (OSError, ValueError):
        return {}
    before.setdefault("episodes", 1)  # in older records
    same = list(before["games"]) == games and all(before.get(name) == record[name] for name in SAME)
    return {game: row.get("episode_returns", row["returns"]) for game, row in before["games"].items()} if same else {}


def record_path(run, args, split):
    """The JSON file of a split: beside the checkpoint, but not beside weights alone, which others have published."""
    folder = run.path.parent if run.about["run"] else Path("runs", run.path.stem)
    file, sampled = [run.path.stem] * (run.path.stem != "checkpoint"), ["sampled", args.seed] * (not args.greedy)
    sampled += ["episodes", args.episodes] * (args.episodes > 1)
    words = ["evaluation", *file, *args.env, run.args.distribution_mode, split.first, split.count, *sampled]
    return folder / ("_".join(map(str, words + ["bf16"] * run.about["bf16"])) + ".json")


def main():
    for name in ("stdout", "stderr"):  # closed ones lead nowhere
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # what the terminal's character set lacks becomes a question mark
    try:
        args = tyro.cli(Args, description=arguments.for_terminal(__doc__))
        try:
            runs = prepare(args)
        except (ValueError, OSError) as error:
            say(f"evaluate.py: error: {error}")
            sys.exit(2)
        processes.keep_freed_memory()
        if args.video or args.probe or args.plot:
            from reporting import pictures  # with libraries that nothing else needs
        if args.video:
            pictures.film(runs[0], make_policy(runs[0], args), args.video)
            say(f"the film: {args.video}")
        if args.probe:
            pictures.probe(runs[0], make_policy(runs[0], args, graph=False), args.probe)
            say(f"the probe: {args.probe}")
        if args.plot or not (args.video or args.probe):
            for run in runs:
                score(run, args)
            rows = tables.tabulate(runs)
            print(tables.FORMATS[args.format](runs, rows), flush=True)
        if args.plot:
            say(f"drawing {args.plot}")
            pictures.plot(runs, rows, [pictures.curves(run.path.parent) for run in runs], args.plot)
            say(f"the plot: {args.plot}")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # nobody reads the tables, or a disk is full
        sys.stdout = None  # or Python tells of it once more at its end
        sys.exit(0 if isinstance(error, BrokenPipeError) else f"evaluate.py: stopped: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"evaluate.py: the GPU's memory is too small; --no-cuda needs none: {str(error).splitlines()[0]}")


def make_policy(run, args, **options):
    return playing.Policy(run.script, run.agent, run.args, args.greedy, args.seed, **options)


if __name__ == "__main__":
    main()
