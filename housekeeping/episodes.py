"""Episodes that actors have played: their returns, and what is logged of them."""

import math
from collections import deque

import numpy as np
import torch


class Episodes:
    """The last 100 returns and lengths of each game."""

    def __init__(self, games, saved=None):
        self.games = list(games)  # of an actor's environments, from the first on; some may be there more than once
        self.recent = {game: deque((saved or {}).get(game, ()), maxlen=100) for game in games}

    def add(self, game, episode_return, length):
        self.recent[game].append((float(episode_return), int(length)))

    def add_unroll(self, rewards, dones, totals):
        """Adds the episodes that ended in an unroll, rewards and dones (T, B), whose environment n plays game n modulo their
        number. Totals (3, B): return and length of each environment's episode before it, and how many episodes it has
        ended; returns those after it."""
        games, ends = self.games, np.zeros_like(totals[:2])  # sums when an environment's last episode ended
        sums = np.stack([rewards, np.ones_like(rewards)], axis=1).cumsum(0, dtype=float) + totals[:2]  # (T, 2, B)
        for t, n in np.argwhere(dones):
            self.add(games[n % len(games)], *(sums[t, :, n] - ends[:, n]))
            ends[:, n] = sums[t, :, n]
        return np.concatenate([sums[-1] - ends, totals[2:] + dones.sum(0)])

    def scales_and_limits(self, args):
        """(2, B), for each environment's game: what to multiply its rewards by, one over its spread with --reward-clipping
        normalize, and the entropy up to which it earns a bonus."""
        scales = [1 / self.spread(game) if args.reward_clipping == "normalize" else 1 for game in self.games]
        limits = [dict(args.entropy_limits).get(game, math.inf) for game in self.games]
        return torch.tensor([scales, limits]).repeat(1, args.num_envs // len(self.games))

    def full(self):
        return all(len(episodes) == episodes.maxlen for episodes in self.recent.values())

    def saved(self):
        return {game: list(episodes) for game, episodes in self.recent.items()}

    def spread(self, game):
        """Standard deviation of the game's returns; 1 while fewer than ten are known, or all are
        the same."""
        returns = [value for value, _ in list(self.recent[game])]  # a copy: actors append
        return (np.std(returns) or 1.0) if len(returns) >= 10 else 1.0

    def scalars(self, mode, ranges):
        """{tag: number}: mean return, length and, where the mode has a range, normalized return of each game, and their
        means over games once all have ended one.

        Args:
            mode: the distribution mode.
            ranges: {game: {mode: (low, high)}}, the returns that are normalized to 0 and 1.
        """
        scalars = {}
        for game, recent in self.saved().items():
            if recent:
                value, scalars[f"length/{game}"] = np.mean(recent, axis=0).tolist()
                scalars[f"return/{game}"] = value
                if mode in ranges[game]:
                    low, high = ranges[game][mode]
                    scalars[f"normalized_return/{game}"] = (value - low) / (high - low)
        for kind in ("return", "normalized_return", "length"):
            values = [value for name, value in scalars.items() if name.startswith(f"{kind}/")]
            if len(values) == len(self.recent):
                scalars[f"{kind}/mean"] = np.mean(values).item()
        return scalars


def have_ended(pool):
    """How many environments of a pool's actors have ended an episode since the run began, or was resumed; and of how many."""
    ended = np.concatenate([actor.totals[2] > 0 for actor in pool.actors])
    return ended.sum(), len(ended)


def each_has_ended(pool):
    """Whether all have. A mean before that is one of the episodes that end first: another kind, such as won mazes."""
    ended, number = have_ended(pool)
    return ended == number
