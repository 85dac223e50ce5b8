"""Keeps what came of finished runs in small files, makes tables and plots of them, and publishes agents.

    python evaluate.py runs/NAME --splits paper          first of all, scores the run
    python -m reporting.results add runs/NAME ...        keeps its arguments, scores and learning curve in results/NAME
    python -m reporting.results report                   makes tables and plots of all that is kept: results/README.md
    python -m reporting.results release runs/NAME pretrained/srwm.pt
                                                         weights alone, and their scores beside them in srwm.json
"""

import csv
import functools
import io
import itertools
import json
import re
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import tyro

if not __package__:  # started by its path, in whatever folder
    sys.path[0] = str(Path(__file__).parent.parent)

from housekeeping.checkpoints import load_checkpoint  # noqa: E402
from reporting import page, pictures, playing, tables  # noqa: E402
from reporting.runs import (  # noqa: E402
    Choice,
    Split,
    commands,
    import_script,
    load_run,
    read_record,
)

RESULTS, POINTS = Path("results"), 200  # of a learning curve
MAX_BYTES = 5_000_000  # of weights alone
FIRST_LEVEL, NUM_LEVELS, NUM_STEPS = 1000, 5, 250  # a release keeps the returns of the short episodes among so many
NOISE = 1e-5  # relative, in weights: more than machines differ by

Scored = namedtuple("Scored", "path records model")  # a run, as reporting.tables wants it


def load(folder, file="checkpoint"):
    """A checkpoint file of a run, and its records by the names of their JSON files. Records of other steps are left
    out. Raises ValueError if one of the two is missing."""
    path = folder / f"{file}.pt"
    if not path.is_file():
        raise ValueError(f"runs must be folders with a {path.name}, got {folder}")
    checkpoint = load_checkpoint(path, None)
    found = {path.name: read_record(path) for path in sorted(folder.glob("evaluation_*.json"))}
    records = {name: record for name, record in found.items() if record["file"] == file}
    for name in [name for name, record in records.items() if record["step"] != checkpoint["step"]]:
        print(f"note: left out, {folder / name} is of step {records.pop(name)['step']:,} and {path.name} of step "
              f"{checkpoint['step']:,}", file=sys.stderr)
    if not records:
        raise ValueError(f"{path} has no scores of step {checkpoint['step']:,} yet: "
                         f"python evaluate.py {path} --splits paper")
    return checkpoint, records


def add(runs: tyro.conf.Positional[tuple[Path, ...]]):
    """Keeps the arguments, scores and learning curves of runs in results/.

    Args:
        runs: folders of runs that evaluate.py has scored
    """
    if not runs:
        raise ValueError("runs must be named: folders of runs that evaluate.py has scored")
    loaded = [load(run) for run in runs]  # all of them, before anything is written
    for run, (checkpoint, records) in zip(runs, loaded):
        folder = RESULTS / run.resolve().name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("evaluation_*.json"):
            old.unlink()
        typed = commands(checkpoint, import_script(checkpoint["script"]), folder.name)
        arguments = {name: checkpoint[name] for name in ("script", "step", "args", "history", "before")}
        write_json(folder / "arguments.json", dict(commands=typed) | arguments)
        for name, record in records.items():
            write_json(folder / name, record)
        write_curve(folder / "curve.csv", pictures.curves(run))
        print(f"{run}: {folder}")


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_curve(path, curves):
    """Writes what a plot draws of {tag: (steps, values)}, thinned, with a column for each tag."""
    columns = {tag: dict(zip(*curve)) for tag, curve in curves.items()
               if re.fullmatch(r"(valid_)?(return/.+|normalized_return/mean)", tag)}
    steps = sorted(set().union(*columns.values()))
    kept = np.unique(np.linspace(0, len(steps) - 1, POINTS).round().astype(int)) if steps else []
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *columns])
        for step in (steps[i] for i in kept):
            values = [f"{column[step]:.6g}" if step in column else "" for column in columns.values()]
            writer.writerow([int(step), *values])


def read_curve(path):
    """What `write_curve` wrote: {tag: (steps, values)}."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    curves = {tag: [(int(row["step"]), float(row[tag])) for row in rows if row[tag]]
              for tag in (rows[0] if rows else ()) if tag != "step"}
    return {tag: np.array(points).T for tag, points in curves.items() if points}  # thinning may leave a tag none


def disjoint(splits):
    """Those of splits (first, count, path, record) that share no level: of two that do, the one that has more."""
    kept = []
    for split in sorted(splits, key=lambda split: (-split[1], *split[:3])):
        first, count, path, _ = split
        if other := next((other for other in kept if first < other[0] + other[1] and other[0] < first + count), None):
            print(f"note: left out, {path} has levels of {other[2].name}", file=sys.stderr)
        else:
            kept.append(split)
    return sorted(kept, key=lambda split: split[0])


def tables_of(folders):
    """The runs that are kept in these folders, {what was played: [Scored]}: those that fit into one table."""
    same = {code: group["codes"][0] for group in kept("versions.json", []) for code in group["codes"]}
    found = {}
    for folder in folders:
        by_setting = {}
        for path in sorted(folder.glob("evaluation_*.json")):
            record = read_record(path)
            record["version"] = record["code"]
            for part in (record, *record.get("parts", ()), *record["init_from"]):
                part |= {name: same.get(part[name], part[name]) for name in tables.VERSIONS if name in part}
            actions = "greedy" if record["greedy"] else f"sampled_{record['action_seed']}"
            actions += f"_{number}_episodes" if (number := record.get("episodes", 1)) > 1 else ""
            setting = (record["distribution_mode"], actions, tuple(record["games"]), record["bf16"])
            by_setting.setdefault(setting, []).append((record["start_level"], record["num_levels"], path, record))
        for setting, splits in by_setting.items():
            splits = disjoint(splits)
            levels = tuple((first, count) for first, count, *_ in splits)
            found.setdefault((*setting, levels), []).append((folder, [record for *_, record in splits]))
    for setting, runs in found.items():
        names = tables.name_agents([records[0] for _, records in runs], kept("recipes.json", {}))
        scored = [Scored(*run, name) for run, name in zip(runs, names)]
        found[setting], repeated = tables.one_of_each_seed(scored, [records[0] for _, records in runs])
        for run in repeated:
            print(f"note: left out, {run.path} has a seed of {run.model} that is there already: "
                  f"{run.records[0]['seed']}", file=sys.stderr)
    return found


def kept(name, default):
    """What somebody has written into a file of results/, if it is there. versions.json: versions of scripts, srwm_cuda/ or
    housekeeping/ that count as one, [{"codes": [...], "why": ...}]; recipes.json: sets of flags that have a name, {name:
    flags}; published.json: agents of others, to compare with; the first that has training returns is in the pictures."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.is_file() else default


def best_first(runs):
    """The runs in the order of their models' scores: the mean over games, splits and seeds of normalized returns or, in
    modes without range, of returns."""
    scores = {}
    for run in runs:
        means = [record["mean"].get("normalized", record["mean"]["mean_return"]) for record in run.records]
        scores.setdefault(run.model, []).append(np.mean(means))
    return sorted(runs, key=lambda run: (-np.mean(scores[run.model]), run.path))


def report():
    """Makes tables and plots of all that is kept in results/: README.md there, pictures, and files of all numbers."""
    pictures.check_packages("report", "matplotlib")
    found = tables_of(sorted(path for path in RESULTS.glob("*") if path.is_dir()))
    if not found:
        raise ValueError(f"{RESULTS}/ holds no scores: python -m reporting.results add runs/NAME")
    target, sections, plots = RESULTS / "README.md", [], []
    for mode, actions, games, *rest in sorted(found, key=lambda setting: -len(found[setting])):
        runs = best_first(found[mode, actions, games, *rest])
        stem = f"{mode}_{actions}"
        if same := sum(re.fullmatch(rf"{stem}(_\d+)?", section.stem) is not None for section in sections):
            stem += f"_{same + 1}"  # of other games or levels
        others = [agent for agent in kept("published.json", []) if agent["distribution_mode"] == mode
                  and set(agent["return"]) == set(games)]
        sections.append(page.Section(stem, runs, tables.tabulate(runs), others))
        drawn = next((agent for agent in others if "train" in agent["normalized_return"]["mean"]), None)
        curves = {run.path: read_curve(run.path / "curve.csv") for run in runs}
        for picture, models in sections[-1].pictures().items():
            shown = [run for run in runs if run.model in models]
            plots.append((shown, [row for row in sections[-1].rows if row["model"] in models],
                          [curves[run.path] for run in shown], RESULTS / picture, drawn))
    before = re.findall(r"\]\((\w+\.(?:png|csv))\)", target.read_text()) if target.is_file() else []
    for name in before:  # now that all could be read
        (RESULTS / name).unlink(missing_ok=True)
    for plot in plots:
        pictures.plot(*plot)
    for section in sections:
        (RESULTS / f"{section.stem}.csv").write_text(section.numbers())
    target.write_text(page.write(sections, kept("recipes.json", {}), kept("versions.json", [])))
    print(target)


def release(run: tyro.conf.Positional[Path], target: tyro.conf.Positional[Path]):
    """Publishes a run's weights, for evaluate.py and --init-from, and their scores in a JSON file beside them.

    Args:
        run: folder or checkpoint file of a run that evaluate.py has scored
        target: the file to write, such as pretrained/srwm.pt
    """
    if target.suffix != ".pt":
        raise ValueError(f"target must end in .pt, got {target}")
    checkpoint, records = load(run) if run.is_dir() else load(run.parent, run.stem)
    file = io.BytesIO()
    torch.save(checkpoint | dict(optimizer={}, episodes={}, best=None), file)
    if file.tell() > MAX_BYTES:
        raise ValueError(f"target may have {MAX_BYTES:,} bytes, and the weights of {run} take {file.tell():,}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(file.getvalue())
    record = next(iter(records.values()))
    typed = commands(checkpoint, import_script(checkpoint["script"]), record["run"])
    write_json(target.with_suffix(".json"), dict(run=record["run"], commands=typed, step=record["step"],
                                                 levels=play_levels(target), scores=list(records.values())))
    print(f"{target}: {file.tell():,} bytes; {target.with_suffix('.json')}")


def play_levels(path):
    """Plays a few levels of each game on the CPU, in float32, greedily, and returns [[game, level, return]] of those
    that end soon: by them one sees on another machine that weights and scores belong together. Machines round
    differently, so only those are kept whose returns weights with a little noise get too."""
    torch.set_num_threads(1)  # as when runs are scored
    run = load_run(path, Choice(cuda=False, bf16=False))
    exact, played = [weight.clone() for weight in run.agent.parameters()], [play_once(run)]
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        for weight, value in zip(run.agent.parameters(), exact):
            weight.copy_(value * (1 + NOISE * torch.randn(value.shape, generator=generator)))
        played.append(play_once(run))
    return [[*episode, total] for episode, total in played[0].items() if all(p.get(episode) == total for p in played)]


def play_once(run):
    """{(game, level): return} of the episodes that end within NUM_STEPS."""
    policy = playing.Policy(run.script, run.agent, run.args, greedy=True, seed=1)
    each = max(1, min(NUM_LEVELS, len(policy.step) // len(run.games)))
    splits = [Split(FIRST_LEVEL + n, 1, "test") for n in range(each)]
    episodes = [playing.Game(game, split, policy, slot)
                for slot, (game, split) in enumerate(itertools.product(run.games, splits))]
    for _ in range(NUM_STEPS):
        actions = policy.act()
        for episode in episodes:
            if not episode.ended:
                episode.step(actions)
    return {(episode.name, episode.level): episode.total for episode in episodes if episode.ended}


def later(function):
    """The function of the same arguments that returns the call, to be made once the command line was parsed."""
    return functools.wraps(function)(lambda *words, **options: functools.partial(function, *words, **options))


def main():
    functions = {command.__name__: later(command) for command in (add, report, release)}
    try:
        tyro.extras.subcommand_cli_from_dict(functions, prog="reporting.results", description=__doc__)()
    except (ValueError, OSError) as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
