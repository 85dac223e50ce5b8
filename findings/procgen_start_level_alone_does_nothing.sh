#!/usr/bin/env bash
# procgen-mirror 0.10.7 (Linux, x86-64, Python 3.11): with num_levels=0, which means no limit, start_level is ignored. So
# "all levels from 1000 on", as held-out levels, are not that: levels are drawn from all numbers below 2^31, on rare occasion
# one of training, and which ones come depends on rand_seed alone. With num_levels=1000 they are 1000 to 1999.
#
# Seen on 1 December 2026: the first levels of 1,000 environments of maze are the same for start_level 0, 1000 and 10^9,
# 478 of them are below 10^9, and none is below 1000, but another rand_seed gives others.
#
# Fails if start_level matters without num_levels, or if it does not with it.
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

gym_notices.notices.notices.clear()
from procgen import ProcgenGym3Env


def first_levels(start_level, num_levels=0, rand_seed=1):
    engine = ProcgenGym3Env(1000, "maze", num_threads=0, rand_seed=rand_seed, distribution_mode="easy",
                            num_levels=num_levels, start_level=start_level)
    return [info["level_seed"] for info in engine.get_info()]


unlimited = {start: first_levels(start) for start in (0, 1000, 10**9)}
other, limited = first_levels(0, rand_seed=2), first_levels(1000, 1000)
for start, levels in unlimited.items():
    print(f"num_levels=0, start_level={start}: {levels[:3]} ...; {sum(level < 10**9 for level in levels)} of "
          f"{len(levels)} below 10^9, {sum(level < 1000 for level in levels)} below 1000")
print(f"the same with another rand_seed: {other[:3]} ...")
print(f"num_levels=1000, start_level=1000: {limited[:3]} ..., from {min(limited)} to {max(limited)}")
assert unlimited[0] == unlimited[1000] == unlimited[10**9] != other
assert sum(level < 10**9 for level in unlimited[10**9]) > 300
assert 1000 <= min(limited) < max(limited) < 2000
PYTHON
venv/bin/python levels.py
