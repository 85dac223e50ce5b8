#!/usr/bin/env bash
# procgen-mirror 0.10.7 (Linux, x86-64, Python 3.11): a state of the engine (callmethod("get_state")) holds more than where
# things are. Given to an engine of other options with set_state, it brings along the mode, the set of levels, and how
# frames are drawn: from then on that engine plays as the one that the state is from, also in the episodes that follow. So
# who starts agents of "new levels" or of "hard" from a kept state plays the old levels, or easy ones, ever after. Nothing
# says so, and of the options tried below one, restrict_themes, does not come along.
#
# Seen on 1 December 2026: engines of levels 900 to 902 that were given a state of level 10 to 12 played 10, 11, 10, as the
# engine that the state is from does. Engines of one level with another mode, background, centre, velocity, assets or
# number of levels drew the same 61 frames as that engine, and others without the state; with restrict_themes they did not.
#
# Fails if an engine keeps an option of those, or if restrict_themes comes along.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q procgen-mirror==0.10.7 gym==0.26.2 numpy==1.26.4 2>/dev/null
cat >states.py <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import gym_notices.notices
import numpy as np

gym_notices.notices.notices.clear()
from procgen import ProcgenGym3Env


def make(game, rand_seed=1, **options):
    given = dict(distribution_mode="easy", num_levels=1, start_level=10) | options
    return ProcgenGym3Env(1, game, num_threads=0, rand_seed=rand_seed, **given)


def play(engine, steps):
    """The frames that random actions, always the same, meet, and the numbers of the levels."""
    actions, frames, levels = np.random.default_rng(3).integers(15, size=(steps, 1), dtype=np.int32), [], []
    for action in [None, *actions]:
        if action is not None:
            engine.act(action)
        _, observation, first = engine.observe()
        frames.append(observation["rgb"].tobytes())
        if first[0]:
            levels.append(engine.get_info()[0]["level_seed"])
    return frames, levels


ours, theirs = dict(num_levels=3, start_level=10), dict(num_levels=3, start_level=900)
origin = make("starpilot", **ours)
state, moved = origin.callmethod("get_state"), make("starpilot", rand_seed=9, **theirs)
moved.callmethod("set_state", state)
levels = [play(engine, 400)[1] for engine in (origin, make("starpilot", rand_seed=9, **theirs), moved)]
print(f"levels 10 to 12: {levels[0]}; levels 900 to 902: {levels[1]}; these with a state of the first: {levels[2]}")
assert min(levels[1]) >= 900 and len(levels[0]) > 2
assert levels[2][-len(levels[0][1:]) :] == levels[0][1:] and max(levels[2]) <= 12

for game, options, comes_along in (
    ("plunder", dict(distribution_mode="hard"), True),
    ("bigfish", dict(use_backgrounds=False), True),
    ("coinrun", dict(center_agent=False), True),
    ("coinrun", dict(paint_vel_info=True), True),
    ("coinrun", dict(use_monochrome_assets=True), True),
    ("coinrun", dict(num_levels=0), True),
    ("coinrun", dict(restrict_themes=True), False),
):
    origin = make(game)
    state, moved = origin.callmethod("get_state"), make(game, **options)
    moved.callmethod("set_state", state)
    as_origin, as_itself, frames = (play(engine, 60)[0] for engine in (origin, make(game, **options), moved))
    print(f"{game}, {options}: as the engine that the state is from: {frames == as_origin}; as by itself: "
          f"{frames == as_itself}")
    assert as_origin != as_itself and (frames == as_origin) is comes_along
PYTHON
venv/bin/python states.py
