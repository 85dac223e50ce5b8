#!/usr/bin/env bash
# procgen-mirror 0.10.7 (Linux, x86-64, Python 3.11): of the engine's 15 actions, a game tells apart 4 to 11. Which ones it
# tells apart is its own: a diagonal is a step to the side in fruitbot, plunder, leaper, maze and miner, and one downwards is
# in climber, jumper and ninja.
# So a uniform policy is far from uniform in what it does: in leaper it does nothing with 7 of 15 actions, goes left or
# right with 3 each, and up, which alone leads to the goal, with 1. In plunder it fires with 1. An entropy over actions
# counts the same deed several times.
#
# Seen on 1 December 2026: from 150 states of each game in easy mode, each action was tried, followed by doing nothing
# twice. Actions are the same if frames, reward and end of episode were, from all states. Random play does not reach all
# states, so that a game may tell apart more than is seen here, but not fewer. Coinrun is left out: down matters there, in
# so few states that random play seldom meets one.
#
# Fails if a game's groups change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q procgen-mirror==0.10.7 gym==0.26.2 numpy==1.26.4 2>/dev/null
cat >tell.py <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import gym_notices.notices
import numpy as np

gym_notices.notices.notices.clear()
from procgen import ProcgenGym3Env

GROUPS = {  # for each of the 15 actions, the first that does the same, in hexadecimal digits
    "bigfish": "012345678444444", "bossfight": "012345678944444", "caveflyer": "012345678944444",
    "chaser": "012345678444444", "climber": "002335668333333", "dodgeball": "012345678944444",
    "fruitbot": "000333666933333", "heist": "012345678444444", "jumper": "002335668333333",
    "leaper": "000345666444444", "maze": "000345666444444", "miner": "000345666444444",
    "ninja": "0023356689abc99", "plunder": "000333666933333", "starpilot": "0123456789a9999"}


def act(engine, action):
    engine.act(np.array([action], dtype=np.int32))
    reward, obs, done = engine.observe()
    return reward.tobytes() + obs["rgb"].tobytes() + done.tobytes()


def groups(game, states=150):
    engine = ProcgenGym3Env(1, game, num_threads=0, rand_seed=3, start_level=7, distribution_mode="easy")
    draw, same = np.random.default_rng(0), np.ones((15, 15), bool)
    for _ in range(states):
        for _ in range(draw.integers(1, 12)):
            act(engine, draw.integers(15))
        state = engine.callmethod("get_state")
        seen = []
        for action in range(15):
            engine.callmethod("set_state", state)
            seen.append([act(engine, action), act(engine, 4), act(engine, 4)])
        engine.callmethod("set_state", state)
        same &= np.array([[one == other for other in seen] for one in seen])
    return "".join(f"{np.flatnonzero(row)[0]:x}" for row in same)


for game, expected in GROUPS.items():
    found = groups(game)
    print(f"{game}: {len(set(found))} of 15, {found}", flush=True)
    assert found == expected, game
PYTHON
venv/bin/python tell.py
