#!/usr/bin/env bash
# procgen-mirror 0.10.7 (Linux, x86-64, Python 3.11): sixteen games of the same size of frame, but a step of one takes several
# times as long as of another, and an environment several times as much memory. Which ones they are does not show: a level of
# maze, which stands still, costs more time than one of starpilot, and one of coinrun takes more memory than all others.
#
# Seen on 30 November 2026.
#
# Fails if bossfight's step takes less than twice as long as bigfish's, if maze's is not longer than starpilot's, or if
# coinrun takes less than three times as much memory as dodgeball.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q procgen-mirror==0.10.7 gym==0.26.2 numpy==1.26.4 2>/dev/null
cat >costs.py <<'PYTHON'
import os
import re
import statistics
import time
import warnings

warnings.simplefilter("ignore")
import gym_notices.notices
import numpy as np

gym_notices.notices.notices.clear()
from procgen import ProcgenGym3Env

GAMES = ("bigfish bossfight caveflyer chaser climber coinrun dodgeball fruitbot heist jumper leaper maze miner ninja plunder "
         "starpilot").split()


def private_kilobytes():
    text = open("/proc/self/smaps_rollup").read()
    return sum(int(size) for size in re.findall(r"^Private_\w+: +(\d+)", text, re.MULTILINE))


def make(num, game):
    return ProcgenGym3Env(num, game, num_threads=0, rand_seed=1, distribution_mode="easy")


def play(engine, steps):
    random = np.random.RandomState(0)
    for _ in range(steps):
        engine.act(random.randint(0, 15, engine.num).astype(np.int32))
        engine.observe()


def seconds(engine):
    begin = time.process_time()
    play(engine, 20)
    return time.process_time() - begin


def kilobytes(game, num):
    """What a process takes more after it has played 30 steps in so many environments."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        before, engine = private_kilobytes(), make(num, game)
        play(engine, 30)
        os.write(writer, str(private_kilobytes() - before).encode())
        os._exit(0)
    os.wait()
    return int(os.read(reader, 100))


pictures = make(1, "maze")  # which the first engine of a process loads
memory = {game: (kilobytes(game, 80) - kilobytes(game, 16)) / 64 for game in GAMES}
engines = {game: make(16, game) for game in GAMES}
turns = [{game: seconds(engine) for game, engine in engines.items()} for _ in range(9)]
ratio = {game: statistics.median(turn[game] / turn["bigfish"] for turn in turns) for game in GAMES}
print("time of a step, bigfish 1:", ", ".join(f"{game} {ratio[game]:.1f}" for game in sorted(GAMES, key=ratio.get)))
print("kB of an environment:", ", ".join(f"{game} {memory[game]:.0f}" for game in sorted(GAMES, key=memory.get)))
assert ratio["bossfight"] > 2 and ratio["maze"] > ratio["starpilot"]
assert memory["coinrun"] > 3 * memory["dodgeball"]
PYTHON
venv/bin/python costs.py
