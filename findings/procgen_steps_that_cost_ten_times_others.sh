#!/usr/bin/env bash
# procgen-mirror 0.10.7 (Linux, x86-64, Python 3.11): what a step costs depends on the game, on the level, and on an option
# that only adds a picture for people. A vector waits for its slowest environment, and a mean over games hides it.
#
# Seen on 29 November 2026, processor time by turns, on two occasions: a step of bossfight takes 3 and 4 times as long as one
# of bigfish; one of caveflyer's level 17 9 and 12 times as long as one of its level 0; and with render_mode="rgb_array"
# (512 x 512) a step of bigfish takes 32 and 50 times as long.
#
# Fails if these are less than 2, 4 and 15.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q procgen-mirror==0.10.7 gym==0.26.2 numpy==1.26.4 2>/dev/null
cat >costs.py <<'PYTHON'
import statistics
import time
import warnings

warnings.simplefilter("ignore")
import gym_notices.notices
import numpy as np

gym_notices.notices.notices.clear()
from procgen import ProcgenGym3Env


def make(game, **options):
    return ProcgenGym3Env(16, game, num_threads=0, rand_seed=1, distribution_mode="easy", **options)


def seconds(engine):
    begin, random = time.process_time(), np.random.RandomState(0)
    for _ in range(20):
        engine.act(random.randint(0, 15, 16).astype(np.int32))
        engine.observe()
    return time.process_time() - begin


def ratio(dear, cheap):
    return statistics.median(seconds(dear) / seconds(cheap) for _ in range(7))


game = ratio(make("bossfight"), make("bigfish"))
level = ratio(*(make("caveflyer", num_levels=1, start_level=level) for level in (17, 0)))
picture = ratio(make("bigfish", render_mode="rgb_array"), make("bigfish"))
print(f"bossfight to bigfish {game:.1f}, level 17 to level 0 of caveflyer {level:.1f}, with pictures to without {picture:.1f}")
assert game > 2 and level > 4 and picture > 15
PYTHON
venv/bin/python costs.py
