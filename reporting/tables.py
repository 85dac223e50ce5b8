"""From returns to tables: what evaluate.py says about its runs, with bootstrap intervals, in four formats.

The statistics are those of Agarwal et al. 2021, 'Deep reinforcement learning at the edge of the statistical precipice'
(arXiv 2108.13264), whose library rliable draws neither from levels nor whole agents that play several games.
"""

import csv
import io
import itertools
import json

import numpy as np

DRAWS = 10_000  # bootstrap samples
PIECE = 2**20  # numbers that are drawn at a time: memory is bounded
COLUMNS = ("train", "test", "mixed", "gap")
NOTE = ("Mean over levels ± standard deviation over seeds (for the IQM, of each seed's own), if there are several "
        "[95 % bootstrap interval over levels and seeds].")


def summarize(returns, distribution_mode, return_range):
    """Statistics of a split's returns {game: [one of each level]}, as they go into its JSON file. return_range is that of the
    script: {game: {distribution mode: (low, high)}}."""
    games = {}
    for game, values in returns.items():
        mean, error = np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
        low, high = return_range[game].get(distribution_mode, (None, None))
        normalized = None if low is None else (mean - low) / (high - low)
        games[game] = dict(mean_return=mean, standard_error=error, normalized=normalized, returns=values)
    mean = {key: np.mean([row[key] for row in games.values()]) for key in ("mean_return", "normalized")
            if None not in [row[key] for row in games.values()]}
    return dict(games=games, mean=mean)


def bootstrap(scores, draws=DRAWS):
    """Means over levels of the scores, and of samples drawn from their seeds and levels with replacement.

    scores[game][column] is a list with an array (seeds, levels) for each split. Returns {column: (1 + draws, seeds, games)},
    where number 0 is of the scores themselves. The levels of each game and split are drawn alone, and are the same for all
    seeds; the seeds drawn are the same in all games and splits, since one agent plays them all: what makes a seed good
    in one game makes it good in others. (rliable, whose agents play a game each, draws the seeds of each game alone.)
    """
    rng = np.random.default_rng(0)
    means = {column: [] for game in scores for column in game}
    seeds = len(next(iter(scores[0].values()))[0])
    chosen = np.concatenate([np.arange(seeds)[None], rng.integers(seeds, size=(draws, seeds))])
    for game in scores:
        for column, splits in game.items():
            total = 0.0
            for x in splits:
                sampled = np.concatenate([sample_levels(x, count, rng) for count in pieces(draws, x.shape[1])])
                total = total + np.take_along_axis(np.concatenate([x.mean(-1)[None], sampled]), chosen, axis=1)
            means[column].append(total / len(splits))
    return {column: np.stack(games, axis=-1) for column, games in means.items()}


def pieces(draws, size):
    """Parts of so many draws, of which none has more than a PIECE of numbers in samples of that size."""
    most = max(1, PIECE // size)
    return [min(most, draws - done) for done in range(0, draws, most)]


def sample_levels(x, draws, rng):
    """Means of each row of x, (seeds, levels), over levels drawn with replacement, the same for all rows: (draws, seeds)."""
    levels = rng.integers(x.shape[1], size=(draws, x.shape[1]))
    return np.stack([row[levels].mean(-1) for row in x], axis=-1)


def mean(x):
    return x.mean(-1)


def interquartile_mean(x):
    """The mean over the last axis without the lowest and the highest quarter (rounded down) of its values."""
    cut = x.shape[-1] // 4
    return np.sort(x, axis=-1)[..., cut : x.shape[-1] - cut].mean(-1)


def estimates(samples, statistic):
    """A statistic over seeds and games of the arrays that `bootstrap` returns, and how sure it is, for each column."""
    values = {column: statistic(x.reshape(len(x), -1)) for column, x in samples.items()}  # (1 + draws,)
    each = {column: statistic(x[0]) for column, x in samples.items()}  # (seeds,)
    for these in (values, each):
        if "train" in these and "test" in these:
            these["gap"] = these["train"] - these["test"]
    for column, (value, *drawn) in values.items():
        low, high = np.percentile(drawn, (2.5, 97.5))
        std = float(np.std(each[column], ddof=1)) if len(each[column]) > 1 else None
        yield dict(split=column, value=float(value), std=std, low=float(low), high=float(high))


def entries(model, games, scores, distribution_mode, return_range):
    """The tables' entries for one model, dictionaries: for each game its return and its normalized return, and for all
    games the mean and the interquartile mean of the normalized (in modes without range: of the returns) of all seeds."""
    samples = {"return": bootstrap(scores)}
    ranges = [return_range[game].get(distribution_mode) for game in games]
    if None not in ranges:
        low, high = np.array(ranges, dtype=float).T
        samples["normalized"] = {column: (x - low) / (high - low) for column, x in samples["return"].items()}
    wanted = [(game, measure, mean, {column: x[..., [i]] for column, x in samples[measure].items()})
              for measure in samples for i, game in enumerate(games)]
    measure = list(samples)[-1]
    wanted += [("all", measure, mean, samples[measure]), ("all", f"{measure} IQM", interquartile_mean, samples[measure])]
    seeds = len(next(iter(scores[0].values()))[0])
    return [dict(model=model, seeds=seeds, game=game, measure=measure) | estimate
            for game, measure, statistic, source in wanted for estimate in estimates(source, statistic)]


def tabulate(runs):
    """The entries of both tables. Runs that share everything but the seed are one model."""
    rows = []
    for model in dict.fromkeys(run.model for run in runs):
        group = [run for run in runs if run.model == model]
        first, scores = group[0], [{} for _ in group[0].games]
        for split in first.splits:
            for i, game in enumerate(scores):
                game.setdefault(split.column, []).append(np.stack([run.returns[split][i] for run in group]))
        mode, steps = first.args.distribution_mode, " ".join(str(run.checkpoint["step"]) for run in group)
        about = dict(steps=steps, distribution_mode=mode, levels=levels(first), greedy=first.greedy, bf16=first.trained.bf16)
        rows += [row | about for row in entries(model, first.games, scores, mode, first.script.RETURN_RANGE)]
    return rows


def cell(entry, digits):
    if entry is None:
        return "-"
    value, low, high = (f"{entry[key]:.{digits}f}" for key in ("value", "low", "high"))
    std = "" if entry["std"] is None else f" ± {entry['std']:.{digits}f}"
    return f"{value}{std} [{low}, {high}]"


def cells(rows):
    """The two tables, per game and aggregated, as lists of lists of strings; the first is the head."""
    found = {(row["game"], row["measure"], row["model"], row["split"]): row for row in rows}
    columns = [column for column in COLUMNS if any(row["split"] == column for row in rows)]
    games, aggregated = [["game", "model", "seeds", *columns, "normalized"]], [["all games", "model", "seeds", *columns]]
    names = [dict.fromkeys(row[name] for row in rows) for name in ("game", "measure", "model")]
    for game, measure, model in itertools.product(*names):
        entry = {column: found.get((game, measure, model, column)) for column in columns}
        if not any(entry.values()):
            continue
        seeds = str(next(row["seeds"] for row in entry.values() if row))
        if game == "all":
            aggregated.append([measure, model, seeds, *(cell(row, 3) for row in entry.values())])
        elif measure == "return":
            plain = [found.get((game, "normalized", model, column)) for column in columns]
            normalized = " / ".join("-" if row is None else f"{row['value']:.3f}" for row in plain)
            games.append([game, model, seeds, *(cell(row, 2) for row in entry.values()), normalized])
    return games, aggregated


def levels(run):
    return ", ".join(f"{split.first} to {split.first + split.count - 1} ({split.column})" for split in run.splits)


def describe(runs):
    """A line for each run: what was played."""
    for run in runs:
        actions, precision = "greedy" if run.greedy else "sampled", "bfloat16" if run.trained.bf16 else "float32"
        begin, end = run.trained.valid_start_level, run.trained.valid_start_level + run.trained.valid_num_levels
        best = f", chosen by validation on levels {begin} to {end - 1}" if run.path.stem == "best" else ""
        yield (f"{run.path}: {run.model}, seed {run.trained.seed}, {run.checkpoint['step']:,} steps{best}; "
               f"{run.args.distribution_mode}, levels {levels(run)}; {actions} actions, {precision}")


def text(runs, rows):
    parts = ["\n".join(describe(runs))]
    for table in cells(rows):
        widths = [max(map(len, column)) for column in zip(*table)]
        parts.append("\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table))
    return "\n\n".join([*parts, NOTE])


def markdown(runs, rows):
    parts = ["\n".join(f"- {line}" for line in describe(runs))]
    for head, *body in cells(rows):
        lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *body]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*parts, NOTE])


def comma_separated(runs, rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().rstrip("\n")


def as_json(runs, rows):
    played = [dict(run=str(run.path), model=run.model, seed=run.trained.seed, step=run.checkpoint["step"],
                   distribution_mode=run.args.distribution_mode, greedy=run.greedy, bf16=run.trained.bf16,
                   splits=[split._asdict() for split in run.splits]) for run in runs]
    return json.dumps(dict(runs=played, entries=rows), indent=1)


FORMATS = {"text": text, "markdown": markdown, "csv": comma_separated, "json": as_json}
