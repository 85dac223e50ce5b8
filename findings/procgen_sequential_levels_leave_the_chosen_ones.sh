#!/usr/bin/env bash
# procgen-mirror 0.10.7 (Linux, x86-64, Python 3.11): with use_sequential_levels=True, a level that is completed gives no
# done, so an agent's memory and its return go on into the next level. That level's number is 997 higher, whatever
# num_levels says, so that a training set of 200 levels is left with the first success.
#
# Seen on 29 November 2026: 20 environments of coinrun, levels 0 to 199, always right and up, 600 steps: 119 levels
# completed, none of them with done, all 119 next levels outside the chosen ones. Without the option: 122, all with done,
# and all next levels among the chosen ones.
#
# Fails if a completed level gives done with the option, or if the next one is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q procgen-mirror==0.10.7 gym==0.26.2 numpy==1.26.4 2>/dev/null
cat >levels.py <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import gym_notices.notices
import numpy as np

gym_notices.notices.notices.clear()
from procgen import ProcgenGym3Env


def completed(**options):
    """Number of the level, number of the next and done, of all levels that were completed."""
    engine, seen = ProcgenGym3Env(20, "coinrun", num_threads=0, rand_seed=1, distribution_mode="easy", num_levels=200,
                                  start_level=0, **options), []
    for _ in range(600):
        engine.act(np.full(20, 8, dtype=np.int32))
        reward, _, done = engine.observe()
        if reward.any():
            seen += [(info["prev_level_seed"], info["level_seed"], ended)
                     for info, ended in zip(engine.get_info(), done.tolist()) if info["prev_level_complete"]]
    print(f"{options}: {len(seen)} levels completed, {sum(ended for *_, ended in seen)} with done, "
          f"{sum(next_level >= 200 for _, next_level, _ in seen)} followed by a level outside the chosen ones")
    return seen


usual, sequential = completed(), completed(use_sequential_levels=True)
assert len(usual) > 50 and all(ended and next_level < 200 for _, next_level, ended in usual)
assert len(sequential) > 50 and all(not ended and next_level == level + 997 for level, next_level, ended in sequential)
PYTHON
venv/bin/python levels.py
