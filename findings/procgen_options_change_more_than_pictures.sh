#!/usr/bin/env bash
# procgen-mirror 0.10.7 (Linux, x86-64, Python 3.11): two options that sound like pictures alone change how a game plays, and
# two that sound like they matter do nothing in many games. use_generated_assets=True changes rewards or ends in all 16
# games; restrict_themes=True in bigfish, bossfight and fruitbot, since the size of a thing is that of its picture.
# center_agent=False and paint_vel_info=True change no byte of any frame in ten and in five games, and
# center_agent none in four of the six games of memory mode.
#
# Seen on 29 and 30 November 2026 with 200 random steps of 16 environments of each game, all with one seed, in easy mode unless
# another is named.
#
# Fails if any game is no longer in the group that is named for it below.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q procgen-mirror==0.10.7 gym==0.26.2 numpy==1.26.4 2>/dev/null
cat >options.py <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import gym_notices.notices
import numpy as np

gym_notices.notices.notices.clear()
from procgen import ProcgenGym3Env

GAMES = ("bigfish bossfight caveflyer chaser climber coinrun dodgeball fruitbot heist jumper leaper maze miner ninja plunder "
         "starpilot").split()


def play(game, distribution_mode="easy", **options):
    engine = ProcgenGym3Env(16, game, num_threads=0, rand_seed=11, distribution_mode=distribution_mode, **options)
    random, outcomes, frames = np.random.RandomState(3), [], []
    for _ in range(200):
        reward, obs, done = engine.observe()
        outcomes.append([reward.copy(), done.copy()])
        frames.append(obs["rgb"].copy())
        engine.act(random.randint(0, 15, 16).astype(np.int32))
    return np.array(outcomes), np.array(frames)


def compare(options):
    """The games in which an option changes rewards or ends, and those in which it changes nothing."""
    changed, same = set(), set()
    for game in GAMES:
        (outcomes, frames), (other_outcomes, other_frames) = usual[game], play(game, **options)
        if (outcomes != other_outcomes).any():
            changed.add(game)
        elif (frames == other_frames).all():
            same.add(game)
    print(f"{options}: other rewards or ends in {len(changed)} games {sorted(changed)}; nothing in {sorted(same)}")
    return changed, same


usual = {game: play(game) for game in GAMES}
assert compare(dict(use_generated_assets=True)) == (set(GAMES), set())
still = {"maze", "miner", "chaser", "heist"}
assert compare(dict(restrict_themes=True)) == ({"bigfish", "bossfight", "fruitbot"}, still | {"plunder", "caveflyer"})
moving = {"fruitbot", "caveflyer", "climber", "coinrun", "jumper", "ninja"}
assert compare(dict(center_agent=False)) == (set(), set(GAMES) - moving)
assert compare(dict(paint_vel_info=True)) == (set(), still | {"plunder"})
assert compare(dict(use_backgrounds=False)) == compare(dict(use_monochrome_assets=True)) == (set(), set())

GAMES = "caveflyer dodgeball heist jumper maze miner".split()
usual = {game: play(game, "memory") for game in GAMES}
in_memory_mode = compare(dict(distribution_mode="memory", center_agent=False))
assert in_memory_mode == (set(), set(GAMES) - {"caveflyer", "jumper"})
PYTHON
venv/bin/python options.py
