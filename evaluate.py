"""Scores a checkpoint: plays each level of a split exactly once per game and reports the mean returns.

    python evaluate.py --start-level 1000                    newest checkpoint under runs/, levels 1000 to 1199
    python evaluate.py --checkpoint runs/NAME/checkpoint.pt --env maze heist --no-greedy

The agent is that of the script which the checkpoint names: any impala_procgen_*.py, or your own copy beside this file.
The paper's splits have 200 levels each: training --start-level 0; tests 1000, 1200 and 1400.
"""

import importlib.util
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from impala_procgen_srwm import (
    RETURN_RANGE,
    check_games,
    check_numbers,
    command_line,
    load_checkpoint,
    load_weights,
    make_envs,
)


@dataclass
class Args:
    checkpoint: Path | None = None
    """the checkpoint to score (None: the newest runs/*/checkpoint.pt)"""
    start_level: int = 0
    """first level of the split"""
    num_levels: int = 200
    """levels in the split, each played once per game (exploration has one fixed level)"""
    distribution_mode: str | None = None
    """easy, hard, extreme, memory or exploration (None: the checkpoint's own)"""
    env: tuple[str, ...] = ()
    """games to play (none: the checkpoint's own)"""
    greedy: bool = True
    """take the most probable action; --no-greedy samples"""
    seed: int = 1
    """seed of the sampled actions"""
    cuda: bool = torch.cuda.is_available()
    """compute on the GPU"""


def import_script(name):
    """The training script `name` beside this file, as a module. ValueError if there is none of that name."""
    path = Path(__file__).parent / name
    if Path(name).name != name or path.suffix != ".py" or not path.is_file():
        raise ValueError(f"the checkpoint's script, {name}, is not a Python file beside {Path(__file__).name}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Levels:
    """One environment for each (game, level), stepped by several threads."""

    def __init__(self, pairs, args):
        def make(pair):
            game, level = pair
            return make_envs(replace(args, start_level=level, num_levels=1), [game], num=1, seed=0)

        self.threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.pool = ThreadPoolExecutor(self.threads)
        self.envs = list(self.pool.map(make, pairs))

    def step(self, actions=None):
        """Acts, if there are actions, and observes. Returns rewards (B,), frames (B, 64, 64, 3) and dones (B,)."""

        def step_some(first):
            seen = []
            for n in range(first, len(self.envs), self.threads):
                if actions is not None:
                    self.envs[n].act(actions[n : n + 1])
                reward, obs, done = self.envs[n].observe()
                seen.append((n, reward[0], obs["rgb"][0], done[0]))
            return seen

        seen = sorted(entry for part in self.pool.map(step_some, range(self.threads)) for entry in part)
        return tuple(np.stack(column) for column in list(zip(*seen))[1:])

    def keep(self, indices):
        self.envs = [self.envs[n] for n in indices]


@torch.no_grad()
def play(agent, args, pairs, greedy, seed, device):
    """Plays one episode of each (game, level). Returns their returns, in the order of the pairs."""
    levels, returns = Levels(pairs, args), np.zeros(len(pairs))
    generator = torch.Generator(device).manual_seed(seed)
    state, playing, begin, printed = agent.initial_state(len(pairs)), np.arange(len(pairs)), time.time(), 0.0
    reward, frames, _ = levels.step()
    done, step = True, 0
    while len(playing) > 0:
        if not args.carry_state and step % args.unroll_length == 0:
            state = tuple(torch.zeros_like(part) for part in state)
        inputs = (torch.from_numpy(x)[None].to(device) for x in (frames, reward, np.full(len(playing), done)))
        logits, _, state = agent(*inputs, state)
        scores = logits[0]
        if not greedy:  # the first clock to ring is a sample of the softmax
            scores = scores.softmax(-1) / torch.empty_like(scores).exponential_(generator=generator)
        action = scores.argmax(-1).int().cpu().numpy()
        reward, frames, ended = levels.step(action)
        returns[playing] += reward
        done, step = False, step + 1
        if ended.any():
            stay = np.flatnonzero(~ended)
            levels.keep(stay)
            playing, reward, frames = playing[stay], reward[stay], frames[stay]
            state = tuple(part[torch.from_numpy(stay).to(device)] for part in state)
        if time.time() - printed > 5:
            printed = time.time()
            print(f"{len(pairs) - len(playing)} of {len(pairs)} episodes ended, step {step}, {printed - begin:.0f} s",
                  file=sys.stderr, flush=True)
    return returns


def table(results):
    """The results as lines of text: a row for each game, and their mean."""
    def cell(value):
        return f"{'-' if value is None else format(value, '.3f'):>12}"

    lines = [f"{'game':<12}{'mean return':>12}{'std. error':>12}{'normalized':>12}"]
    for game, row in (results["games"] | {"mean": results["mean"]}).items():
        lines.append(f"{game:<12}" + "".join(cell(row.get(key)) for key in ("mean_return", "standard_error", "normalized")))
    return "\n".join(lines)


def summarize(returns, distribution_mode):
    """Statistics of the returns {game: [one of each level]}, as they go into the JSON file."""
    games = {}
    for game, values in returns.items():
        mean, error = np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
        low, high = RETURN_RANGE[game].get(distribution_mode, (None, None))
        normalized = None if low is None else (mean - low) / (high - low)
        games[game] = dict(mean_return=mean, standard_error=error, normalized=normalized, returns=values)
    mean = {key: np.mean([row[key] for row in games.values()]) for key in ("mean_return", "normalized")
            if None not in [row[key] for row in games.values()]}
    return dict(games=games, mean=mean)


def prepare(args):
    """What the arguments mean. Returns the checkpoint and its path, the agent, the arguments that it was trained with but with
    the split to play, and the games. Raises ValueError for what is not allowed."""
    check_numbers(args)
    if args.num_levels < 1:
        raise ValueError("--num-levels must be positive, got 0")
    path = args.checkpoint
    if path is None:
        found = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise ValueError("--checkpoint is missing, and there is none under runs/")
        path = found[-1]
    elif path.is_dir():
        path = path / "checkpoint.pt"
    checkpoint = load_checkpoint(path, script=None)
    script = import_script(checkpoint["script"])
    known = {field.name for field in fields(script.Args)}
    saved = {name: value for name, value in checkpoint["args"].items() if name in known}
    here = dict(cuda=args.cuda, bf16=None, compile=False, resume=None, num_actors=None, num_envs=None)  # for this machine
    trained, games = script.complete(script.Args(**saved | here))
    split = replace(trained, distribution_mode=args.distribution_mode or trained.distribution_mode,
                    start_level=args.start_level, num_levels=args.num_levels)
    games = args.env or games
    check_games(games, split)
    if split.distribution_mode == "exploration":
        split.num_levels = 1
    agent = script.Agent(split).to("cuda" if args.cuda else "cpu")
    load_weights(agent, checkpoint)
    make_envs(split, games, len(games), seed=0)  # whatever ails the engine shows here
    return path, checkpoint, agent, split, games


def evaluate(args, path, checkpoint, agent, split, games):
    """Plays the split, prints the table and writes the JSON file."""
    first, count, mode = split.start_level, split.num_levels, split.distribution_mode
    print(f"{path} ({checkpoint['step']:,} steps), {mode}, levels {first} to {first + count - 1}, "
          f"{'greedy' if args.greedy else 'sampled'} actions", flush=True)
    pairs = [(game, first + level) for game in games for level in range(count)]
    device = torch.device("cuda" if args.cuda else "cpu")
    returns = play(agent, split, pairs, args.greedy, args.seed, device).reshape(len(games), -1)
    results = summarize(dict(zip(games, returns.tolist())), mode)
    results |= dict(run=path.parent.name, step=checkpoint["step"], distribution_mode=mode, start_level=first,
                    num_levels=count, greedy=args.greedy, seed=args.seed)
    target = path.with_name(f"evaluation_{mode}_{first}_{count}{'' if args.greedy else '_sampled'}.json")
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(f"written to {target}")


def main():
    try:
        args = command_line(Args(), __doc__)
        prepared = prepare(args)
    except ValueError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    evaluate(args, *prepared)


if __name__ == "__main__":
    main()
