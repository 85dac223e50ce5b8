#!/usr/bin/env bash
# procgen-mirror 0.10.7 (Linux, x86-64, Python 3.11): a level's number is the seed of a Mersenne Twister, the same for all
# games, from which each game takes what it needs, in its own order. So how hard a level is can be told without the engine:
# with numpy.random.RandomState(level), the third number of 32 bits modulo 7 is the size of an easy maze (3, 5, ..., 15
# cells), modulo 15 that of one in memory mode (3 to 31), and the fifth modulo 4 the lanes of cars of an easy level of
# leaper. And the levels of two games with the same number are not independent: the fifth number also gives what jumper
# draws of four kinds, plunder of six and starpilot of twenty (whatever they use it for).
#
# Seen on 30 November 2026 on levels 0 to 199 and 1000 to 1099, each without exception.
#
# Fails if one of these levels is drawn otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q procgen-mirror==0.10.7 gym==0.26.2 numpy==1.26.4 2>/dev/null
cat >luck.py <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import gym_notices.notices
import numpy as np

gym_notices.notices.notices.clear()
from procgen import ProcgenGym3Env


def word(game, mode, level, place):
    """A number of 32 bits of an engine's state, counted from its end."""
    options = dict(num_threads=0, rand_seed=1, distribution_mode=mode, num_levels=1, start_level=level)
    (state,) = ProcgenGym3Env(1, game, **options).get_state()
    return int.from_bytes(state[len(state) - 4 * place :][:4], "little")


levels = [*range(200), *range(1000, 1100)]
numbers = np.array([np.random.RandomState(level).randint(0, 2**32, 8, dtype=np.uint32) for level in levels])
third, fifth = numbers[:, 2], numbers[:, 4]
drawn = {  # where in the state it stands, and what the level's number says
    ("maze", "easy", 3): 3 + 2 * (third % 7), ("maze", "memory", 3): 3 + 2 * (third % 15),
    ("leaper", "easy", 2): 3 + 2 * (fifth % 4), ("jumper", "easy", 3): fifth % 4, ("plunder", "easy", 22): fifth % 6,
    ("starpilot", "easy", 15): 11 + fifth % 20}
for (game, mode, place), said in drawn.items():
    seen = np.array([word(game, mode, level, place) for level in levels])
    print(f"{game}, {mode}: {sorted(set(seen.tolist()))}, as the number says in {(seen == said).sum()} of {len(levels)} levels")
    assert (seen == said).all()
PYTHON
venv/bin/python luck.py
