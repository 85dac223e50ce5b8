#!/usr/bin/env bash
# procgen-mirror 0.10.7 (Linux, x86-64, Python 3.11): the engine has 15 actions, 0 to 14, and refuses no other. -1 ends the
# episode at once, with done, and begins another level. 15 and more do what 14 does: nothing in most games, and a shot in
# starpilot.
#
# Seen on 29 November 2026 in four games: after -1, all of 8 environments are at another level, with reward 0; 15, 17 and
# 100 lead to the same frames as 14. So an agent with a wrong number of actions trains without an error.
#
# Fails if -1 no longer ends an episode, or if 15, 17 or 100 do anything else than 14, or are refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q procgen-mirror==0.10.7 gym==0.26.2 numpy==1.26.4 2>/dev/null
cat >act.py <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import gym_notices.notices
import numpy as np

gym_notices.notices.notices.clear()
from procgen import ProcgenGym3Env


def act(game, action):
    engine = ProcgenGym3Env(8, game, num_threads=0, rand_seed=1, distribution_mode="easy")
    engine.observe()
    before = [info["level_seed"] for info in engine.get_info()]
    engine.act(np.full(8, action, dtype=np.int32))
    reward, obs, done = engine.observe()
    moved = [info["level_seed"] != level for info, level in zip(engine.get_info(), before)]
    return reward.copy(), obs["rgb"].copy(), done.copy(), np.array(moved)


for game in ("bigfish", "maze", "leaper", "starpilot"):
    reward, _, done, moved = act(game, -1)
    print(f"{game}: -1 ends {done.sum()} of 8 episodes, {moved.sum()} are at another level, rewards {reward.sum()}")
    assert done.all() and moved.all() and not reward.any()
    last = act(game, 14)
    for action in (15, 17, 100):
        assert all(map(np.array_equal, act(game, action), last)), f"{game}: {action} is not what 14 is"
    nothing = all(map(np.array_equal, act(game, 4), last))
    print(f"{game}: 15, 17 and 100 do what 14 does, which {'is nothing' if nothing else 'is not nothing'}")
PYTHON
venv/bin/python act.py
