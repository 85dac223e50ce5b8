"""What policies that cannot see reach: random actions, and each of the 15 actions forever. As a Markdown table.

    python benchmarks/blind.py                        all games in easy mode, levels 0 to 199 and 1000 to 1599
    python benchmarks/blind.py --env maze coinrun     these games alone
    python benchmarks/blind.py --num-levels 20        of each of the four splits of the paper, 20 levels

The best action is the one with the highest mean return on the training levels. What is said of the test levels does not
choose it. Each level is played once, as by evaluate.py. One process a core.
"""

import argparse
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import impala_procgen_srwm as script  # noqa: E402
from housekeeping.engine import GAMES  # noqa: E402

TESTS = (1000, 1200, 1400)  # first levels of the paper's test splits
ACTIONS = ("left down", "left", "left up", "down", "nothing", "up", "right down", "right", "right up",
           "D", "A", "W", "S", "Q", "E")
NOTHING, RANDOM = ACTIONS.index("nothing"), len(ACTIONS)


def play(game, level, policy):
    """Return and length of one episode."""
    envs = script.make_envs(replace(script.Args(), start_level=level, num_levels=1), [game], 1, seed=0)
    random, action = np.random.default_rng([list(script.RETURN_RANGE).index(game), level]), np.array([policy], np.int32)
    total, length, done = 0.0, 0, False
    while not done:
        if policy == RANDOM:
            action[0] = random.integers(RANDOM)
        envs.act(action)
        (reward,), _, (done,) = envs.observe()
        total, length = total + reward, length + 1
    return total, length


def scores(pool, games, policies, levels):
    """{(game, policy): [mean return, mean length]} for the policies of each game, {game: policies}."""
    jobs = [(game, level, policy) for game in games for policy in policies[game] for level in levels]
    played = np.array(pool.starmap(play, jobs, chunksize=10)).reshape(-1, len(levels), 2).mean(axis=1)
    return dict(zip([(game, policy) for game in games for policy in policies[game]], played.tolist()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", choices=GAMES["easy"], default=GAMES["easy"], metavar="GAME")
    parser.add_argument("--num-levels", type=int, default=200)
    args = parser.parse_args()
    script.make_envs(script.Args(), ["maze"], 1, seed=0)  # loads the pictures once, for all processes that are forked
    with get_context("fork").Pool(script.num_cores()) as pool:
        train = scores(pool, args.env, dict.fromkeys(args.env, range(RANDOM + 1)), range(args.num_levels))
        best = {game: max(range(RANDOM), key=lambda policy: train[game, policy][0]) for game in args.env}
        tested = {game: [RANDOM, best[game]] for game in args.env}
        test = scores(pool, args.env, tested, [first + n for first in TESTS for n in range(args.num_levels)])
    print("| game | random, train | test | nothing, train | best action | train | test | its steps |")
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    normalized = np.zeros((len(args.env), 5))
    for game, row in zip(args.env, normalized):
        low, high = script.RETURN_RANGE[game]["easy"]
        shown = (train, RANDOM), (test, RANDOM), (train, NOTHING), (train, best[game]), (test, best[game])
        returns = [result[game, policy][0] for result, policy in shown]
        row[:] = (np.array(returns) - low) / (high - low)
        cells = [f"{value:.2f} ({score:.3f})" for value, score in zip(returns, row)]
        cells.insert(3, ACTIONS[best[game]])
        print("|", " | ".join([game, *cells, f"{train[game, best[game]][1]:,.0f}"]), "|")
    cells = [f"{score:.3f}" for score in normalized.mean(axis=0)]
    print("|", " | ".join(["normalized mean", *cells[:3], "", *cells[3:], ""]), "|")


if __name__ == "__main__":
    main()
