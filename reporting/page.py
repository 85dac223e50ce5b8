"""The page of results, for people: the scores first, then games, then differences, and at the end the runs.

All numbers of a section, also those that the page leaves out, are in a CSV file beside it.
"""

import csv
import io
import textwrap
from dataclasses import dataclass

from reporting import tables

HEADS = dict(train="training levels", test="test levels", mixed="levels of both kinds", validation="validation levels",
             gap="gap")


@dataclass
class Section:
    """What of one kind was played: the same mode, games, levels and actions."""

    stem: str  # of its files' names
    runs: list  # as reporting.tables wants them, the best agent first
    rows: list  # of reporting.tables.tabulate
    published: list  # agents of others, to compare with

    def __post_init__(self):
        self.record = self.runs[0].records[0]
        self.agents, self.steps = list(dict.fromkeys(run.model for run in self.runs)), {}
        for run in self.runs:
            self.steps.setdefault(run.model, run.records[0]["step"])
        self.columns = [column for column in HEADS if any(row["split"] == column for row in self.rows)]
        keys = ("game", "measure", "model", "minus", "split")
        self.found = {tuple(row[key] for key in keys): row for row in self.rows}
        self.measure = "normalized" if any(row["measure"] == "normalized" for row in self.rows) else "return"

    def groups(self):
        """Agents of as many steps each, those with the most first."""
        groups = {}
        for agent in sorted(self.agents, key=lambda agent: -self.steps[agent]):
            groups.setdefault(millions(self.steps[agent]), []).append(agent)
        return [sorted(group, key=self.agents.index) for group in groups.values()]

    def pictures(self):
        """{file: agents}: one for each number of steps."""
        groups = self.groups()
        if len(groups) == 1:
            return {f"{self.stem}.png": groups[0]}
        return {f"{self.stem}_{millions(self.steps[group[0]]).replace(' ', '')}.png": group for group in groups}

    def reference(self, group):
        """The agent that the others of a group are compared with: the SRWM or, without it, the best."""
        return next((agent for agent in group if agent.split(",")[0] == "srwm"), group[0])

    def seeds(self, agent):
        return sum(run.model == agent for run in self.runs)

    def cell(self, agent, column, digits=3, game="all", measure=None, minus=None):
        return tables.cell(self.found.get((game, measure or self.measure, agent, minus, column)), digits)

    def scores(self):
        """The table of the README."""
        shown = [column for column in self.columns if column != "gap"]
        lines = [[agent, millions(self.steps[agent]), str(self.seeds(agent)),
                  *(self.cell(agent, column) for column in shown)] for agent in self.agents]
        if shown == ["train", "test"]:
            tests = [self.found["all", self.measure, agent, None, "test"]["value"] for agent in self.agents]
            for other in self.published:
                mean, steps = other["normalized_return"]["mean"], other["steps"]
                at = ([test >= mean["test"][-1] for test in tests] + [False]).index(False)
                tests.insert(at, mean["test"][-1])
                lines.insert(at, [
                    f"{other['name']} ([published by {other['by']}]({other['source']}))",
                    f"{millions(steps[-1])} in all", str(other.get("seeds", "")),
                    *(f"{mean[column][-1]:.3f}" if column in mean else "" for column in shown)])
        return markdown(["agent", "steps", "seeds", *(HEADS[column] for column in shown)], lines)

    def games(self):
        """The mean return of each game."""
        games, shown = list(self.record["games"]), [column for column in self.columns if column != "gap"]

        def values(agent, game):
            rows = [self.found.get((game, "return", agent, None, column)) for column in shown]
            return " / ".join("-" if row is None else f"{row['value']:.2f}" for row in rows)

        lines = [[agent, *(values(agent, game) for game in games)] for agent in self.agents]
        return markdown(["agent", *games], lines)

    def differences(self, group):
        """Each agent of a group minus one of them, or nothing if there is no other."""
        minus, lines = self.reference(group), []
        for agent in group:
            entries = [self.difference(agent, minus, column) for column in self.columns]
            if any(entries):
                lines.append([agent, *(tables.cell(entry, 3) for entry in entries)])
        head = [f"minus {minus}", *(HEADS[column] for column in self.columns)]
        return markdown(head, lines) if lines else ""

    def difference(self, agent, minus, column):
        measure = f"{self.measure} difference"
        if turned := self.found.get(("all", measure, minus, agent, column)):
            ends = dict(value="value", low="high", high="low")  # None if there is no interval
            return turned | {name: turned[end] and -turned[end] for name, end in ends.items()}
        return self.found.get(("all", measure, agent, minus, column))

    def numbers(self):
        """All of them, as CSV."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["game", "measure", "agent", "minus", "seeds", *self.columns])
        keys = dict.fromkeys((row["game"], row["measure"], row["model"], row["minus"]) for row in self.rows)
        for game, measure, agent, minus in keys:
            digits = 2 if measure == "return" and game != "all" else 3
            cells = [self.cell(agent, column, digits, game, measure, minus) for column in self.columns]
            writer.writerow([game, measure, agent, minus or "", "" if minus else self.seeds(agent), *cells])
        return file.getvalue()

    def parts(self):
        """What the page says of it."""
        actions = "greedy actions" if self.record["greedy"] else f"sampled actions (seed {self.record['action_seed']})"
        mean = "normalized return" if self.measure == "normalized" else "return"
        games = ", ".join(self.record["games"])
        yield f"## {self.record['distribution_mode'].capitalize()} mode, {actions}: {games}"
        yield (f"{mean.capitalize()}, mean of the games; levels {tables.levels(self.runs[0])}; "
               f"{'bfloat16' if self.record['bf16'] else 'float32'}. [All numbers]({self.stem}.csv), also of all "
               "pairs of agents and of the IQM.")
        yield self.scores()
        for about in dict.fromkeys(other["about"] for other in self.published):
            names = [other["name"] for other in self.published if other["about"] == about]
            yield f"{' and '.join(names)}: {about}"
        yield "Returns of each game, " + " / ".join(HEADS[column] for column in self.columns if column != "gap") + ":"
        yield self.games()
        for file, group in self.pictures().items():
            yield f"![Learning curves and scores, {millions(self.steps[group[0]])} steps]({file})"
        found = [table for table in map(self.differences, self.groups()) if table]
        if found:
            yield f"Differences of the {mean}, each agent minus one of as many steps:"
            yield from found
            yield tables.notes(self.rows).removeprefix(tables.NOTE).strip()


def millions(steps):
    """Steps in words: in whole millions also where a last batch went a little beyond them."""
    whole = round(steps / 10**6)
    return f"{whole:,} M" if 1000 * abs(steps - whole * 10**6) < steps else f"{steps:,}"


def escape(text):
    return text.replace("|", "&#124;").replace("*", r"\*")


def markdown(head, lines):
    rule = ["---", *["---:"] * (len(head) - 1)]
    body = [[escape(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(map(escape, head)), rule, *body])


def write(sections, recipes, versions):
    """The text of the page."""
    parts = ["# Results", "Made by `python -m reporting.results report` from the files beside it. An agent's name is "
             "that of its script, and says what differs from the script's defaults, which are the paper's settings, and "
             "which games it learned from, if not from those of the table, each in as many environments."]
    parts += [f"The {name}: `{flags}`." for name, flags in recipes.items()]
    parts += [tables.NOTE]
    for section in sections:
        parts += section.parts()
    lines = {}
    for section in sections:
        for run in section.runs:
            name, record = run.path.name, run.records[0]
            lines.setdefault(name, [run.model, str(record["seed"]), millions(record["step"]),
                                    record["distribution_mode"], record["version"], f"[{name}]({name}/)"])
    parts += ["## Runs", "A run's folder has its command lines and arguments (arguments.json), the return of each "
              "level and its learning curve. Agents that differ in flags may be of different versions of the script, too."]
    parts.append(markdown(["agent", "seed", "steps", "mode", "version", "run"], list(lines.values())))
    parts += [f"Versions {' and '.join(group['codes'])} count as one: {group['why']}" for group in versions]
    parts = [part if part.startswith(("|", "#", "!")) else wrap(part) for part in parts]
    return "\n\n".join(parts) + "\n"


def wrap(text):
    return textwrap.fill(escape(text), 120, break_long_words=False, break_on_hyphens=False)
