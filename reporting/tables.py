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
import math
import re
import shutil
import sys
import textwrap
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F

from housekeeping.engine import GAMES
from housekeeping.launch import num_cores
from reporting.playing import show_progress

DRAWS = 100_000  # bootstrap samples: so many that an end of an interval of width 0.05 moves by less than 0.0005
MARGIN = 0.0005  # by more than which the interval of a difference must be clear of zero
PIECE = 2**20  # numbers that are drawn at a time: memory is bounded
COLUMNS = ("train", "test", "mixed", "validation", "gap")
NOTE = ("Mean over levels ± standard deviation over seeds (for the IQM, of each seed's own), if there are several "
        "[95 % bootstrap interval over levels and seeds].")
NOTE_ON_EPISODES = "Of a single level, intervals are over its episodes."
SINGLE = "What stands without an interval is of a single episode, or of one of each game."
NOTE_ON_DIFFERENCES = "Differences are on the same levels: they may be clear where the intervals of two models overlap."
MARKED = ("** is a clear difference: its interval would exclude zero even if it were {widen:.2f} times as wide, as "
          "Bonferroni's correction for {pairs} of models wants; * is a plausible one: the interval as it stands "
          "excludes zero. Pairs in which a model has a single seed are not marked.")
UNMARKED = "None is marked as clear: that takes several seeds of both models."
MARKS = dict(clear="**", plausible="*", open="")

# Flags in which runs of one model may differ; `games` and `init_from` stand in their records, readable.
MANAGING = {"exp_name", "seed", "track", "profile", "cuda_graphs", "env", "multi_env", "init_from", "num_actors",
            "num_envs", "num_servers"}
ELSEWHERE = ("total_steps", "distribution_mode", "num_levels", "start_level")  # what a page of results says by itself
MANAGING_PREFIXES = ("wandb_", "log_", "save_", "valid_")
VERSIONS = ("code", "srwm_cuda", "housekeeping")
UNKNOWN = {name: f"{name} unknown" for name in VERSIONS} | dict(processes="1 process")  # where nothing is said


def learned_from(part):
    """How a part of a run has learned: {name: words for it}, without what may differ between seeds."""
    found = {}
    for name, words in part["flags"].items():
        if name not in MANAGING and not name.startswith(MANAGING_PREFIXES):
            found[name] = re.sub(r"(?<= )([1-9]\d*)0{6}$", r"\1M", words)  # millions
    if part.get("processes", 1) > 1:
        found["processes"] = f"{part['processes']} processes"
    return found


def versions(part):
    """Of what text its script and what that imports were: {name: words for it}; a record need not know."""
    return {name: f"{name} {part[name]}" for name in VERSIONS if part.get(name)}


def earlier_parts(run):
    """What was different before the run's last resume, in words; nothing if it was not."""
    def difference(part):
        own = learned_from(part) | versions(part)
        gone = [UNKNOWN.get(name, f"without {last[name].split()[0]}") for name in last if name not in own]
        return " ".join([words for name, words in own.items() if last.get(name) != words] + gone)

    last, words = learned_from(run) | versions(run), []
    parts = [(part["until"], difference(part)) for part in run.get("parts", ())]
    for (until, now), (_, after) in itertools.pairwise([*parts, (None, "")]):
        if now != after:
            words.append(f"until step {until:,} {now or 'as in the end'}")
    return f"({', '.join(words)})" if words else ""


def name_games(games, mode):
    """A name for the games that a run learned from, in any order: their number, if they are the first of the mode's; else
    each with its share of the environments, the same for maze, maze, leaper, leaper as for maze, leaper."""
    shares = Counter(games)
    common = math.gcd(*shares.values())
    words = [f"{share} x {game}" if (share := number // common) > 1 else game for game, number in sorted(shares.items())]
    return f"{len(words)} games" if words == sorted(GAMES.get(mode, [])[: len(words)]) and words[1:] else ", ".join(words)


def learned(games, run):
    """What a run has learned from, and how: {name: words for it}."""
    parts, mode = earlier_parts(run), run["flags"].get("distribution_mode", "easy").split()[-1]
    return dict(games=name_games(games, mode)) | learned_from(run) | (dict(parts=parts) if parts else {})


def features(record):
    """What makes a run's model, but the script: {name: words for it}. Flags with their default values are not in it."""
    found = learned(record["trained_games"], record)
    if before := record["init_from"]:
        words = [f"{run['exp_name']} ({', '.join(learned(run['games'], run).values())})" for run in before]
        found["init_from"] = f"--init-from {', '.join(words)}"
        if all(run.get("code") for run in before):
            found["init_from_code"] = f"(by {', '.join(' '.join(versions(run).values()) for run in before)})"
    if record["file"] != "checkpoint":
        found["file"] = record["file"]
    if record["file"] == "best" and record["validation"]:
        found["validation"] = "validated on levels {} to {}".format(*record["validation"])
    elif not record.get("finished", True):
        found["step"] = f"at step {record['step']:,}"
    return found | versions(record)


def number_of(record):
    """A number for a run's model. Unlike its name, it does not depend on the other runs in a table, and so its
    bootstrap intervals do not either."""
    return zlib.crc32(" ".join([record["script"], *features(record).values()]).encode())


def name_models(records, everything=False):
    """A name for the model of each run, given one of its records: the script, and what not all runs of the script
    share. Runs that differ in nothing but their seed have one name. everything: flags are said, too, that all share, and
    games to learn from, if others were played or their shares of the environments differ."""
    scripts, names = {record["script"]: Path(record["script"]).stem for record in records}, []
    short = {script: stem.removeprefix("impala_procgen_") for script, stem in scripts.items()}
    if len(set(short.values())) == len(short):
        scripts = short
    for record in records:
        others = [features(other) for other in records if other["script"] == record["script"]]
        played = learned([*record["games"]], record)["games"] if everything else None
        differs = [words for name, words in features(record).items()  # code of weights to begin with, if two had some
                   if everything and words != played and name not in (*VERSIONS, "init_from_code")
                   or any(other.get(name, words if name == "init_from_code" else None) != words for other in others)]
        names.append(" ".join([scripts[record["script"]], *differs]))
    return names


def name_agents(records, recipes=None):
    """Names for a table that says the steps, levels and versions of training elsewhere: the script, and all that differs
    from its defaults, which are the paper's settings. What is said elsewhere is named only where agents differ in
    nothing else: steps and levels, or versions, or both.
    recipes: {name: flags}, sets of flags that have a name; with `--env`, of games to learn from, too."""
    recipes = {name: set(map(in_any_order, re.split(" (?=--)", flags))) for name, flags in (recipes or {}).items()}
    known, names = [], []
    for record in records:
        parts = [record, *record.get("parts", ())]
        own = next((name for name, flags in sorted(recipes.items(), key=lambda item: -len(item[1]))
                    if all(flags <= flags_of(part) for part in parts)), None)
        known.append((own, without(record, recipes.get(own, ()))))
    for versioned, elsewhere in itertools.product((False, True), (ELSEWHERE, ())):
        shown = [record if versioned else unversioned(record) for _, record in known]
        for flag in elsewhere:
            shown = [without(record, [record["flags"].get(flag)]) for record in shown]
        long = [name.split(" ", 1) for name in name_models(shown, everything=True)]
        names.append([" ".join([f"{script}, {own}" if own else script, *rest])
                      for (own, _), (script, *rest) in zip(known, long)])
    found = []  # the numbers of the models of each name
    for column in names:
        found.append({})
        for name, record in zip(column, records):
            found[-1].setdefault(name, set()).add(number_of(record))
    return [next((name for name, models in zip(choices, found) if len(models[name]) == 1), choices[-1])
            for choices in zip(*names)]


def without(record, flags):
    """A record whose run, in all its parts, was started without these flags: without `--env`, from the games played."""
    def rest(part):
        kept = {name: words for name, words in part["flags"].items() if in_any_order(words) not in flags}
        return part | dict(flags=kept)

    parts = [record, *record.get("parts", ())]
    if not all(set(flags) <= flags_of(part) for part in parts):
        return record
    games = record["games" if any(words.startswith("--env ") for words in filter(None, flags)) else "trained_games"]
    return rest(record) | dict(parts=[rest(part) for part in parts[1:]], trained_games=[*games])


def flags_of(part):
    return set(map(in_any_order, part["flags"].values()))


def in_any_order(words):
    """A flag, `--env` with its games sorted: in which order they are named is the same."""
    flag, *games = words.split(" ")
    return " ".join([flag, *sorted(games)]) if flag == "--env" else words


def unversioned(part):
    """A record, or a part of one, that knows no versions."""
    inner = {name: [unversioned(each) for each in part[name]] for name in ("parts", "init_from") if name in part}
    return part | dict.fromkeys(VERSIONS) | inner


def one_of_each_seed(runs, records):
    """The runs without those whose model and seed are there already, since one seed is no evidence of two; and those.
    records: one of each run's."""
    kept = {}
    for run, record in zip(runs, records):
        kept.setdefault((run.model, record["seed"]), run)
    return list(kept.values()), [run for run in runs if not any(run is other for other in kept.values())]


def summarize(returns, ranges):
    """Statistics of a split's returns {game: one of each level, or a row of its episodes'}, as they go into its record.
    ranges: {game: (low, high) of its returns, or None}."""
    games = {}
    for game, levels in returns.items():
        episodes = np.reshape(levels, (len(levels), -1))
        values = units(means := episodes.mean(axis=1), episodes)
        mean, error = np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
        low, high = ranges[game] or (None, None)
        normalized = None if low is None else (mean - low) / (high - low)
        games[game] = dict(mean_return=mean, standard_error=error, normalized=normalized, range=ranges[game],
                           returns=means.tolist())
        if episodes.shape[1] > 1:
            games[game]["episode_returns"] = episodes.tolist()
    mean = {key: np.mean([row[key] for row in games.values()]) for key in ("mean_return", "normalized")
            if None not in [row[key] for row in games.values()]}
    return dict(games=games, mean=mean)


def units(means, episodes):
    """What a bootstrap draws from: the levels' means or, of a single level, its episodes."""
    return means if len(means) > 1 else np.ravel(episodes)


def bootstrap(models, draws=DRAWS):
    """Means over levels of the scores of models, and of samples drawn from their seeds and levels with replacement.

    models: (number, scores) of each, where scores[game][column] is a list with an array (seeds, levels) for each split.
    Returns for each {column: (1 + draws, seeds, games)}, where number 0 is of the scores themselves. The levels of each
    game and split are drawn alone, and are the same for all seeds; the seeds drawn are the same in all games and
    splits, since one agent plays them all: what makes a seed good in one game makes it good in others. (rliable, whose
    agents play a game each, draws the seeds of each game alone.) Models of different numbers that played the same
    splits get the same levels, and seeds of their own: so the differences of their samples are samples of their
    difference. What is drawn for a model does not depend on the others.
    """
    torch.set_num_threads(1)  # of embedding_bag: more are slower
    splits, totals = {}, {}
    for index, (_, scores) in enumerate(models):
        for game, columns in enumerate(scores):
            for column, arrays in columns.items():
                for place, x in enumerate(arrays):
                    key = (game, COLUMNS.index(column), place, x.shape[1])  # models in which it is equal share levels
                    splits.setdefault(key, {})[index] = x / len(arrays)

    def sample(item):
        (game, column, place, count), arrays = item
        rng, x = np.random.default_rng([1, game, column, place, count]), np.concatenate(list(arrays.values()))
        sampled = [sample_levels(x, number, rng) for number in pieces(draws, count)]
        return np.concatenate([x.mean(-1, keepdims=True).T, *sampled])  # (1 + draws, seeds of all models)

    with ThreadPoolExecutor(num_cores()) as pool:
        drawn = pool.map(sample, splits.items())  # a core each
        line = show_progress("statistics", "splits", drawn, len(splits), delay=2)  # of what takes less, nothing is shown
        for ((game, column, *_), arrays), means in zip(splits.items(), line):
            for index, own in zip(arrays, np.split(means, np.cumsum([len(own) for own in arrays.values()])[:-1], axis=1)):
                totals[index, game, column] = totals.get((index, game, column), 0) + own
    for index, (number, scores) in enumerate(models):
        seeds = len(next(iter(scores[0].values()))[0])
        its_own = np.random.default_rng([0, number])
        chosen = np.concatenate([np.arange(seeds)[None], its_own.integers(seeds, size=(draws, seeds))])
        yield {column: np.stack([np.take_along_axis(totals.pop((index, game, COLUMNS.index(column))), chosen, axis=1)
                                 for game in range(len(scores))], axis=-1) for column in scores[0]}


def pieces(draws, size):
    """Parts of so many draws, of which none has more than a PIECE of numbers in samples of that size."""
    most = max(1, PIECE // size)
    return [min(most, draws - done) for done in range(0, draws, most)]


def sample_levels(x, draws, rng):
    """Means (draws, rows) of each row of x (rows, levels) over levels drawn with replacement, the same for all rows."""
    levels = torch.from_numpy(rng.integers(x.shape[1], size=(draws, x.shape[1])))
    weights = torch.from_numpy(x.T.astype(np.float32, order="C"))  # several times as fast as in another order
    return F.embedding_bag(levels, weights, mode="sum").double().numpy() / x.shape[1]


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
    for column, samples in with_gap(values).items():
        low, high = np.percentile(samples[1:], (2.5, 97.5))
        yield dict(split=column, value=float(samples[0]), std=None, low=float(low), high=float(high))


def with_gap(columns):
    both = "train" in columns and "test" in columns
    return columns | dict(gap=columns["train"] - columns["test"]) if both else columns


def widening(pairs):
    """How many times as wide an interval must be to hold with the same 95 % for all of so many pairs together: by
    Bonferroni's correction, of a normal distribution."""
    return NormalDist().inv_cdf(1 - 0.025 / pairs) / NormalDist().inv_cdf(0.975)


def verdict(row, pairs):
    """What a difference's interval says: clear, plausible, which it would be of a single pair, or open."""
    value, end = row["value"], row["low"] if row["value"] > 0 else row["high"]
    for name, times in (("clear", widening(pairs)), ("plausible", 1)):
        if abs(value) - times * abs(value - end) > MARGIN:
            return name
    return "open"


def sample(returns, ranges):
    """{measure: what `bootstrap` returns}: returns and, if all games have a range, normalized returns."""
    samples = {"return": returns}
    if None not in ranges.values():
        low, high = np.array(list(ranges.values()), dtype=float).T
        samples["normalized"] = {column: (x - low) / (high - low) for column, x in returns.items()}
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
    rows, played, groups = [], {}, {}
    for run in runs:
        groups.setdefault(run.model, []).append(run)
    scores = {model: scores_of(group) for model, group in groups.items()}
    drawn = bootstrap([(number_of(groups[model][0].records[0]), list(games.values()))
                       for model, games in scores.items()])
    for (model, group), returns in zip(groups.items(), drawn):
        first = group[0].records[0]
        samples = sample(returns, {game: row["range"] for game, row in first["games"].items()})
        about = dict(steps=" ".join(str(run.records[0]["step"]) for run in group), levels=levels(group[0]),
                     episodes=first.get("episodes", 1),
                     **{name: first[name] for name in ("distribution_mode", "greedy", "bf16")})
        several = more_than_one(scores[model])
        rows += [dict(model=model, minus=None, seeds=len(group)) | row | no_interval(several[row["split"]])
                 | dict(verdict=None) | about for row in entries(samples, scores[model])]
        measure = list(samples)[-1]
        means = {(column, *splits_of(group[0], column)): x.mean((1, 2)) for column, x in samples[measure].items()}
        played[model] = means, about | dict(steps=None, levels=None)  # which the rows of both models have
    pairs = several_seeds_each(groups)
    for (model, (means, about)), (other, (others, _)) in itertools.combinations(played.items(), 2):
        values = {column: x - others[column, *splits] for (column, *splits), x in means.items()
                  if (column, *splits) in others}
        both = [more_than_one(scores[name]) for name in (model, other)]
        for row in intervals(values):
            row |= no_interval(all(several[row["split"]] for several in both))
            judged = dict(verdict=verdict(row, len(pairs)) if (model, other) in pairs else None)
            rows.append(dict(model=model, minus=other, seeds=None, game="all", measure=f"{measure} difference")
                        | row | judged | about)
    return rows


def several_seeds_each(groups):
    """The pairs of models that can be judged: of one run, nobody knows what another would reach."""
    return list(itertools.combinations([model for model, runs in groups.items() if len(runs) > 1], 2))


def scores_of(group):
    """{game: {column: [(seeds, levels) of each split]}} of the runs of a model."""
    scores = {game: {} for game in group[0].records[0]["games"]}
    for records in zip(*[run.records for run in group]):  # of one split
        for game, columns in scores.items():
            found = [record["games"][game] for record in records]
            returns = [units(row["returns"], row.get("episode_returns", row["returns"])) for row in found]
            columns.setdefault(records[0]["column"], []).append(np.array(returns))
    return scores


def more_than_one(scores):
    """{column: whether each of its means, by game and split, is of more than one episode}."""
    first = next(iter(scores.values()))
    found = {column: all(x.size > 1 for columns in scores.values() for x in columns[column]) for column in first}
    return found | dict(gap=found.get("train", False) and found.get("test", False))


def no_interval(several):
    """What to change in a row: from a single episode, nobody knows how sure it is."""
    return {} if several else dict(low=None, high=None)


def cell(entry, digits):
    if entry is None:
        return "-"
    std = "" if entry["std"] is None else f" ± {entry['std']:.{digits}f}"
    interval = "" if entry["low"] is None else f" [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"
    return f"{entry['value']:.{digits}f}{std}{interval}{MARKS.get(entry['verdict'], '')}"


def labels(models):
    """What the tables call each model: a number stands for flags that are too many for a column."""
    long = [model for model in dict.fromkeys(models) if len(model) > 40]
    return {model: f"{model.split()[0]} ({long.index(model) + 1})" if model in long else model for model in models}


def cells(rows):
    """The tables, per game, aggregated and of differences, as lists of lists of strings; the first is the head."""
    label = labels([row["model"] for row in rows])
    found = {(row["game"], row["measure"], row["model"], row["split"]): row for row in rows if not row["minus"]}
    columns = [column for column in COLUMNS if any(row["split"] == column for row in rows)]
    has_range = any(row["measure"] == "normalized" for row in rows)
    games = [["game", "model", "seeds", *columns, *["normalized"] * has_range]]
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
            games.append([game, label[model], seeds, *(cell(row, 2) for row in entry.values()),
                          *[normalized] * has_range])
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
    return ", ".join(f"{first}{f' to {first + count - 1}' * (count > 1)} ({column})" for first, count, column in parts)


def splits_of(run, column):
    """(first level, number of levels) of each split in a column."""
    return [(record["start_level"], record["num_levels"]) for record in run.records if record["column"] == column]


def describe(runs):
    """A line for each run: what was played."""
    label = labels([run.model for run in runs])
    for run in runs:
        name = run.model if label[run.model] == run.model else f"{label[run.model]} = {run.model}"
        record = run.records[0]
        number = record.get("episodes", 1)
        episodes = f", {number} episodes of each" if number > 1 else ""
        word = "level" if [each["num_levels"] for each in run.records] == [1] else "levels"
        actions, precision = "greedy" if record["greedy"] else "sampled", "bfloat16" if record["bf16"] else "float32"
        chosen = ", chosen by validation on levels {} to {}"
        best = chosen.format(*record["validation"]) if record["file"] == "best" and record["validation"] else ""
        earlier = earlier_parts(record)
        parts = f" {earlier}" if earlier and earlier not in name else ""
        yield (f"{run.path}: {name}, seed {record['seed']}, {record['step']:,} steps{parts}{best}; "
               f"{record['distribution_mode']}, {word} {levels(run)}{episodes}; {actions} actions, {precision}")


def notes(rows):
    note = NOTE + f" {NOTE_ON_EPISODES}" * any(row["episodes"] > 1 for row in rows)
    note += f" {SINGLE}" * any(row["low"] is None for row in rows)
    if not any(row["minus"] for row in rows):
        return note
    pairs = len({(row["model"], row["minus"]) for row in rows if row["verdict"]})
    if not pairs:
        return f"{note} {NOTE_ON_DIFFERENCES} {UNMARKED}"
    words = f"{pairs} pairs" if pairs > 1 else "1 pair"
    return f"{note} {NOTE_ON_DIFFERENCES} {MARKED.format(widen=widening(pairs), pairs=words)}"


def text(runs, rows):
    """On a terminal no line is longer than it is wide, as far as names allow."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    fold = textwrap.TextWrapper(width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False).fill
    parts = ["\n".join(map(fold, describe(runs)))]
    for table in itertools.chain.from_iterable(narrow(whole, width) for whole in cells(rows)):
        widths = [max(map(len, column)) for column in zip(*table)]
        parts.append("\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table))
    return "\n\n".join([*parts, fold(notes(rows))])


def narrow(table, width):
    """Tables with a table's first three columns and as many of the others as fit, at least one."""
    others = list(zip(*[line[3:] for line in table]))
    used, parts = sum(2 + max(len(line[i]) for line in table) for i in range(3)) - 2, [[]]
    for column in others:
        taken = sum(2 + max(map(len, each)) for each in [*parts[-1], column])
        if parts[-1] and used + taken > width:
            parts.append([])
        parts[-1].append(column)
    return [[[*line[:3], *values] for line, values in zip(table, zip(*part))] for part in parts]


def markdown(runs, rows):
    parts = ["\n".join(f"- {line}" for line in describe(runs))]
    for head, *body in cells(rows):
        body = [[word.replace("|", "&#124;").replace("*", r"\*") for word in line] for line in body]
        lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *body]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*parts, notes(rows).replace("*", r"\*")])


def comma_separated(runs, rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().rstrip("\n")


def as_json(runs, rows):
    kept = ("seed", "step", "distribution_mode", "greedy", "bf16")
    played = [dict(run=str(run.path), model=run.model, **{name: run.records[0][name] for name in kept},
                   episodes=run.records[0].get("episodes", 1),
                   splits=[dict(first=record["start_level"], count=record["num_levels"], column=record["column"])
                           for record in run.records]) for run in runs]
    return json.dumps(dict(runs=played, entries=rows), indent=1)


FORMATS = {"text": text, "markdown": markdown, "csv": comma_separated, "json": as_json}
