"""From returns to tables: names of models, statistics with bootstrap intervals, four formats.

A run here is anything with a path, a model, its name in the tables, and records, one for each split that was played:
the dictionaries that evaluate.py writes to JSON files.

The statistics are those of Agarwal et al. 2021, 'Deep reinforcement learning at the edge of the statistical precipice'
(arXiv 2108.13264), whose library rliable draws neither from levels nor whole agents that play several games.
"""

import csv
import io
import itertools
import json
import re
import zlib
from pathlib import Path

import numpy as np

DRAWS = 10_000  # bootstrap samples
PIECE = 2**20  # numbers that are drawn at a time: memory is bounded
COLUMNS = ("train", "test", "mixed", "gap")
NOTE = ("Mean over levels ± standard deviation over seeds (for the IQM, of each seed's own), if there are several "
        "[95 % bootstrap interval over levels and seeds].")
NOTE_ON_DIFFERENCES = "Differences are on the same levels: they may be clear where the intervals of two models overlap."


# Flags in which runs of one model may differ; `games` and `init_from` stand in their records, readable.
MANAGING = {"exp_name", "seed", "track", "profile", "cuda_graphs", "env", "multi_env", "init_from", "num_actors",
            "num_envs"}
MANAGING_PREFIXES = ("wandb_", "log_", "save_", "valid_")


def learned_from(games, flags):
    """What a run has learned from, and how: {name: words for it}, without the flags in which seeds may differ."""
    found = dict(games=games[0] if len(games) == 1 else f"{len(games)} games")
    for name, words in flags.items():
        if name not in MANAGING and not name.startswith(MANAGING_PREFIXES):
            found[name] = re.sub(r"(?<= )([1-9]\d*)0{6}$", r"\1M", words)  # millions
    return found


def features(record):
    """What makes a run's model, but the script: {name: words for it}. Flags with their default values are not in it."""
    found = learned_from(record["trained_games"], record["flags"])
    if record["init_from"]:
        before = [f"{run['exp_name']} ({', '.join(learned_from(run['games'], run['flags']).values())})"
                  for run in record["init_from"]]
        found["init_from"] = f"--init-from {', '.join(before)}"
    if record["file"] != "checkpoint":
        found["file"] = record["file"]
    if record["code"]:
        found["code"] = f"code {record['code']}"
    return found


def number_of(record):
    """A number for a run's model. Unlike its name, it does not depend on the other runs in a table, and so its bootstrap
    intervals do not either."""
    return zlib.crc32(" ".join([record["script"], *features(record).values()]).encode())


def name_models(records):
    """A name for the model of each run, given one of its records: the script, and what not all runs of the script
    share. Runs that differ in nothing but their seed have one name."""
    scripts, names = {record["script"]: Path(record["script"]).stem for record in records}, []
    short = {script: stem.removeprefix("impala_procgen_") for script, stem in scripts.items()}
    if len(set(short.values())) == len(short):
        scripts = short
    for record in records:
        others = [features(other) for other in records if other["script"] == record["script"]]
        differs = [words for name, words in features(record).items()
                   if any(other.get(name) != words for other in others)]
        names.append(" ".join([scripts[record["script"]], *differs]))
    return names


def odd_seeds(names, records):
    """A sentence for each model whose runs have a seed in common, or different numbers of steps."""
    for name in dict.fromkeys(names):
        group = [record for other, record in zip(names, records) if other == name]
        seeds, steps = (tuple(record[key] for record in group) for key in ("seed", "step"))
        if len(set(seeds)) < len(seeds) or len(set(steps)) > 1:
            yield f"the runs of {name} have the seeds {seeds} and the steps {steps}"


def summarize(returns, ranges):
    """Statistics of a split's returns {game: [one of each level]}, as they go into its record. ranges: {game: (low,
    high) of its returns, or None}."""
    games = {}
    for game, values in returns.items():
        mean, error = np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
        low, high = ranges[game] or (None, None)
        normalized = None if low is None else (mean - low) / (high - low)
        games[game] = dict(mean_return=mean, standard_error=error, normalized=normalized, range=ranges[game],
                           returns=values)
    mean = {key: np.mean([row[key] for row in games.values()]) for key in ("mean_return", "normalized")
            if None not in [row[key] for row in games.values()]}
    return dict(games=games, mean=mean)


def bootstrap(scores, draws=DRAWS, model=0):
    """Means over levels of the scores, and of samples drawn from their seeds and levels with replacement.

    scores[game][column] is a list with an array (seeds, levels) for each split. Returns {column: (1 + draws, seeds,
    games)}, where number 0 is of the scores themselves. The levels of each game and split are drawn alone, and are the
    same for all seeds; the seeds drawn are the same in all games and splits, since one agent plays them all: what makes
    a seed good in one game makes it good in others. (rliable, whose agents play a game each, draws the seeds of each
    game alone.) Models of different numbers that played the same splits get the same levels, and seeds of their own: so
    the differences of their samples are samples of their difference.
    """
    means = {column: [] for game in scores for column in game}
    seeds = len(next(iter(scores[0].values()))[0])
    its_own = np.random.default_rng([0, model])
    chosen = np.concatenate([np.arange(seeds)[None], its_own.integers(seeds, size=(draws, seeds))])
    for number, game in enumerate(scores):
        for column, splits in game.items():
            rng, total = np.random.default_rng([1, number, COLUMNS.index(column)]), 0.0
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
    """Means (draws, seeds) of each row of x (seeds, levels) over levels drawn with replacement, the same for all
    rows."""
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
    each = with_gap({column: statistic(x[0]) for column, x in samples.items()})  # (seeds,)
    for row in intervals(values):
        own = each[row["split"]]
        yield row | dict(std=float(np.std(own, ddof=1)) if len(own) > 1 else None)


def intervals(values):
    """The value of each column, and of the gap, and where 95 % of its samples are, given both (1 + draws,)."""
    for column, (value, *drawn) in with_gap(values).items():
        low, high = np.percentile(drawn, (2.5, 97.5))
        yield dict(split=column, value=float(value), std=None, low=float(low), high=float(high))


def with_gap(columns):
    both = "train" in columns and "test" in columns
    return columns | dict(gap=columns["train"] - columns["test"]) if both else columns


def sample(scores, ranges, model):
    """{measure: what `bootstrap` returns}: returns and, if all games have a range, normalized returns."""
    samples = {"return": bootstrap(scores, model=model)}
    if None not in ranges.values():
        low, high = np.array(list(ranges.values()), dtype=float).T
        samples["normalized"] = {column: (x - low) / (high - low) for column, x in samples["return"].items()}
    return samples


def entries(samples, games):
    """The tables' entries for one model, dictionaries: for each game its return and its normalized return, and for all
    games the mean and the interquartile mean of the normalized (in modes without range: of the returns) of all
    seeds."""
    wanted = [(game, measure, mean, {column: x[..., [i]] for column, x in samples[measure].items()})
              for measure in samples for i, game in enumerate(games)]
    measure = list(samples)[-1]
    wanted += [("all", measure, mean, samples[measure]),
               ("all", f"{measure} IQM", interquartile_mean, samples[measure])]
    for game, measure, statistic, source in wanted:
        for estimate in estimates(source, statistic):
            yield dict(game=game, measure=measure) | estimate


def tabulate(runs):
    """The entries of the tables. Runs of the same model are its seeds."""
    rows, played = [], {}
    for model in dict.fromkeys(run.model for run in runs):
        group = [run for run in runs if run.model == model]
        first = group[0].records[0]
        scores = {game: {} for game in first["games"]}
        for records in zip(*[run.records for run in group]):  # of one split
            for game, columns in scores.items():
                returns = np.array([record["games"][game]["returns"] for record in records])  # (seeds, levels)
                columns.setdefault(records[0]["column"], []).append(returns)
        ranges = {game: row["range"] for game, row in first["games"].items()}
        samples = sample(list(scores.values()), ranges, number_of(first))
        about = dict(steps=" ".join(str(run.records[0]["step"]) for run in group), levels=levels(group[0]),
                     **{name: first[name] for name in ("distribution_mode", "greedy", "bf16")})
        rows += [dict(model=model, minus=None, seeds=len(group)) | row | about for row in entries(samples, scores)]
        measure = list(samples)[-1]
        means = {(column, *splits_of(group[0], column)): x.mean((1, 2)) for column, x in samples[measure].items()}
        played[model] = means, about | dict(steps=None, levels=None)  # which the rows of both models have
    for (model, (means, about)), (other, (others, _)) in itertools.combinations(played.items(), 2):
        values = {column: x - others[column, *splits] for (column, *splits), x in means.items()
                  if (column, *splits) in others}
        rows += [dict(model=model, minus=other, seeds=None, game="all", measure=f"{measure} difference") | row | about
                 for row in intervals(values)]
    return rows


def cell(entry, digits):
    if entry is None:
        return "-"
    value, low, high = (f"{entry[key]:.{digits}f}" for key in ("value", "low", "high"))
    std = "" if entry["std"] is None else f" ± {entry['std']:.{digits}f}"
    return f"{value}{std} [{low}, {high}]"


def labels(models):
    """What the tables call each model: a number stands for flags that are too many for a column."""
    long = [model for model in dict.fromkeys(models) if len(model) > 40]
    return {model: f"{model.split()[0]} ({long.index(model) + 1})" if model in long else model for model in models}


def cells(rows):
    """The tables, per game, aggregated and of differences, as lists of lists of strings; the first is the head."""
    label = labels([row["model"] for row in rows])
    found = {(row["game"], row["measure"], row["model"], row["split"]): row for row in rows if not row["minus"]}
    columns = [column for column in COLUMNS if any(row["split"] == column for row in rows)]
    games = [["game", "model", "seeds", *columns, "normalized"]]
    aggregated = [["all games", "model", "seeds", *columns]]
    names = [dict.fromkeys(row[name] for row in rows) for name in ("game", "measure", "model")]
    for game, measure, model in itertools.product(*names):
        entry = {column: found.get((game, measure, model, column)) for column in columns}
        if not any(entry.values()):
            continue
        seeds = str(next(row["seeds"] for row in entry.values() if row))
        if game == "all":
            aggregated.append([measure, label[model], seeds, *(cell(row, 3) for row in entry.values())])
        elif measure == "return":
            plain = [found.get((game, "normalized", model, column)) for column in columns]
            normalized = " / ".join("-" if row is None else f"{row['value']:.3f}" for row in plain)
            games.append([game, label[model], seeds, *(cell(row, 2) for row in entry.values()), normalized])
    pairs = {}
    for row in rows:
        if row["minus"]:
            pairs.setdefault((row["measure"], row["model"], row["minus"]), {})[row["split"]] = row
    differences = [["all games", "model", "minus", *columns]]
    differences += [[measure, label[model], label[other], *(cell(pair.get(column), 3) for column in columns)]
                    for (measure, model, other), pair in pairs.items()]
    return [games, aggregated] + [differences] * bool(pairs)


def levels(run):
    parts = [(record["start_level"], record["num_levels"], record["column"]) for record in run.records]
    return ", ".join(f"{first} to {first + count - 1} ({column})" for first, count, column in parts)


def splits_of(run, column):
    """(first level, number of levels) of each split in a column."""
    return [(record["start_level"], record["num_levels"]) for record in run.records if record["column"] == column]


def describe(runs):
    """A line for each run: what was played."""
    label = labels([run.model for run in runs])
    for run in runs:
        name = run.model if label[run.model] == run.model else f"{label[run.model]} = {run.model}"
        record = run.records[0]
        actions, precision = "greedy" if record["greedy"] else "sampled", "bfloat16" if record["bf16"] else "float32"
        chosen = ", chosen by validation on levels {} to {}"
        best = chosen.format(*record["validation"]) if record["file"] == "best" and record["validation"] else ""
        yield (f"{run.path}: {name}, seed {record['seed']}, {record['step']:,} steps{best}; "
               f"{record['distribution_mode']}, levels {levels(run)}; {actions} actions, {precision}")


def notes(rows):
    return " ".join([NOTE, NOTE_ON_DIFFERENCES] if any(row["minus"] for row in rows) else [NOTE])


def text(runs, rows):
    parts = ["\n".join(describe(runs))]
    for table in cells(rows):
        widths = [max(map(len, column)) for column in zip(*table)]
        parts.append("\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table))
    return "\n\n".join([*parts, notes(rows)])


def markdown(runs, rows):
    parts = ["\n".join(f"- {line}" for line in describe(runs))]
    for head, *body in cells(rows):
        body = [[word.replace("|", "&#124;") for word in line] for line in body]  # or it would begin a column
        lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *body]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*parts, notes(rows)])


def comma_separated(runs, rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().rstrip("\n")


def as_json(runs, rows):
    kept = ("seed", "step", "distribution_mode", "greedy", "bf16")
    played = [dict(run=str(run.path), model=run.model, **{name: run.records[0][name] for name in kept},
                   splits=[dict(first=record["start_level"], count=record["num_levels"], column=record["column"])
                           for record in run.records]) for run in runs]
    return json.dumps(dict(runs=played, entries=rows), indent=1)


FORMATS = {"text": text, "markdown": markdown, "csv": comma_separated, "json": as_json}
