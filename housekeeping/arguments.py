"""Arguments in a dataclass: types that know their range, the command line, and what a checkpoint holds of them."""

import re
import shutil
import sys
import textwrap
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import tyro


@dataclass(frozen=True)
class Range:
    """From `least`, or above it if it is not `included`, to `most`."""

    least: float
    most: float = 2**31 - 1  # what procgen's engine takes
    included: bool = True

    def __contains__(self, value):
        return (self.least <= value if self.included else self.least < value) and value <= self.most

    def __str__(self):
        positive = self.least == (1 if self.included else 0)
        return f"{'positive' if positive else f'at least {self.least}'} and at most {self.most}"


Count = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
Amount = Annotated[float, Range(0)]
PositiveAmount = Annotated[float, Range(0, included=False)]
Fraction = Annotated[float, Range(0, 1)]
Amounts = Annotated[tuple[tuple[str, float], ...], Range(0), tyro.conf.arg(  # of some games
    metavar="GAME FLOAT ...", help_behavior_hint="(as in: leaper 0.8 maze 1; other games: none)")]
Counts = Annotated[tuple[tuple[str, int], ...], Range(0), tyro.conf.arg(
    metavar="GAME INT ...", help_behavior_hint="(as in: leaper 40 maze 5; other games: 0)")]
Steps = Annotated[int, Range(1, 10**15), tyro.constructors.PrimitiveConstructorSpec(
    1, "INT", lambda words: int(min(float(words[0]), 1e16)), lambda value: isinstance(value, int),
    lambda value: [str(value)])]  # may be written as 1e6


def flag(name):
    return f"--{name.replace('_', '-')}"


def leaves(value):
    """The value, or of a list all values in it, also those in lists in it: each is a word of the command line."""
    return [leaf for each in value for leaf in leaves(each)] if isinstance(value, (tuple, list)) else [value]


def as_typed(value):
    """An argument's value as messages show it: a list as its words, with spaces between them."""
    return " ".join(map(str, leaves(value))) or "none" if isinstance(value, (tuple, list)) else value


def check_values(args):
    """Raises ValueError for a number out of its type's range or a choice that is not allowed, wherever it comes from."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        for kind in get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]:
            if get_origin(kind) is Literal and value is not None and value not in get_args(kind):
                raise ValueError(f"{flag(name)} must be one of {', '.join(get_args(kind))}, got {value}")
            for part in getattr(kind, "__metadata__", ()):
                numbers = [x for x in leaves(value) if not isinstance(x, (str, NoneType))] if isinstance(part, Range) else []
                if wrong := [x for x in numbers if x not in part]:
                    raise ValueError(f"{flag(name)} must be {part}, got {wrong[0]}")


def check_named_games(args, games):
    """Raises ValueError unless amounts and counts of games are of games that are learned, of each at most one."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        names = [game for game, _ in getattr(args, name)] if hint in (Amounts, Counts) else []
        if unknown := [game for game in names if game not in games]:
            allowed = ", ".join(dict.fromkeys(games))
            raise ValueError(f"{flag(name)} must name games that are learned ({allowed}), got {unknown[0]}")
        if twice := [game for game in names if names.count(game) > 1]:
            raise ValueError(f"{flag(name)} must name a game once, got {twice[0]} twice")


def command_line(kind, default, description):
    """Arguments of that dataclass from the command line, those that it does not name from `default`."""
    switches = "|".join(field.name.replace("_", "[-_]") for field in fields(kind) if field.type is bool)
    text = "\0".join(sys.argv[1:])  # --cuda False and --cuda=False, as sweeps write them, become --no-cuda
    for value, prefix in (("true", ""), ("false", "no-")):
        text = re.sub(rf"(?<![^\0])--({switches})[=\0]{value}(?![^\0])", rf"--{prefix}\1", text, flags=re.I)
    return tyro.cli(kind, default=default, args=text.split("\0") if text else [], description=for_terminal(description))


def for_terminal(text):
    """A description whose paragraphs, but for indented ones, have lines that fit the terminal, if there is one."""
    if not (sys.stdout and sys.stdout.isatty()):
        return text
    width = shutil.get_terminal_size().columns
    # tyro joins lines but those that do not begin with a letter: these begin with what changes no color.
    return "\n\n".join(part if part.startswith(" ") else "\n\033[0m".join(textwrap.wrap(part, width))
                       for part in text.split("\n\n"))


def to_plain(value):
    """Arguments, or the value of one, as what a checkpoint may hold. Raises ValueError for a type of no such form."""
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_plain(each) for each in value]
    if not isinstance(value, (bool, int, float, str, Path, Enum, NoneType)):
        raise ValueError(f"a checkpoint cannot hold an argument of type {type(value).__name__}")
    return value.name if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value


def from_plain(plain, kind):
    """What `to_plain` made plain, again of its type. What is no argument any more is left out."""
    if is_dataclass(kind):
        kinds = {field.name: get_type_hints(kind)[field.name] for field in fields(kind) if field.init}
        try:
            return kind(**{name: from_plain(plain[name], kinds[name]) for name in plain.keys() & kinds.keys()})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the checkpoint has an argument that its script cannot have: {error}") from None
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if plain is None else from_plain(plain, next(part for part in parts if part is not NoneType))
    if origin in (tuple, list):
        one_kind, plain = origin is list or ... in parts, [plain] if isinstance(plain, str) else plain  # --env was one
        kinds = parts[:1] * len(plain) if one_kind else parts
        if len(plain) != len(kinds):
            raise TypeError(f"{as_typed(plain)} is not {len(kinds)} values")
        return origin(map(from_plain, plain, kinds))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind[plain]
    return Path(plain) if kind is Path else plain
