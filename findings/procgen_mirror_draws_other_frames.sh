#!/usr/bin/env bash
# Three packages have the engine of ProcGen (Linux, x86-64, Python 3.11): procgen 0.10.7, OpenAI's own, and
# procgen-gym 0.1.1, which run under other Pythons than their wheels say; and procgen-mirror 0.10.7. They play the same, but
# procgen-mirror draws other frames in some games, because it brings an older Qt. The other two draw the same bytes.
#
# Seen on 29 and 30 November 2026 in the first frames of levels 0 to 99: procgen-mirror differs in easy mode in coinrun (80
# of 100), ninja (12), caveflyer (4), climber (4), bossfight (4) and jumper (2), in memory mode in caveflyer (2), jumper (2)
# and miner (1). Rewards and ends of random play are the same in all three packages.
#
# Fails if procgen and procgen-gym differ anywhere, if procgen-mirror does not differ in coinrun, ninja and caveflyer, or
# differs in bigfish, fruitbot, maze, leaper, plunder or starpilot, all in easy mode.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q procgen-mirror==0.10.7 gymnasium==1.4.0 gym==0.26.2 numpy==1.26.4 2>/dev/null
for package in "3.10 procgen==0.10.7" "3.13 procgen-gym==0.1.1"; do
  venv/bin/pip install -q --target "${package#* }" --no-deps --only-binary :all: --ignore-requires-python \
    --python-version $package 2>/dev/null
done
cat >play.py <<'PYTHON'
import sys
import warnings

warnings.simplefilter("ignore")
import gym_notices.notices
import numpy as np

gym_notices.notices.notices.clear()
GAMES = ("bigfish bossfight caveflyer chaser climber coinrun dodgeball fruitbot heist jumper leaper maze miner ninja plunder "
         "starpilot").split()
PAIRS = [(game, "easy") for game in GAMES]
PAIRS += [(game, "memory") for game in ("caveflyer", "dodgeball", "heist", "jumper", "maze", "miner")]
frames, played = [], []
for game, mode in PAIRS:
    options = dict(distribution_mode=mode, num_threads=0, rand_seed=1)
    for level in range(101):
        which = dict(num_levels=1, start_level=level) if level < 100 else dict(num_levels=0)  # the last one is played
        if sys.argv[1] == "procgen-gym":
            from procgen_gym.env import ProcgenVecEnv

            engine = ProcgenVecEnv(4 if level == 100 else 1, game, **which, **options)
            frame = engine.reset()[0]
        else:
            from procgen import ProcgenGym3Env

            engine = ProcgenGym3Env(4 if level == 100 else 1, game, **which, **options)
            frame = engine.observe()[1]["rgb"]
        if level < 100:
            frames.append(frame[0].copy())
    random = np.random.RandomState(0)
    for _ in range(200):
        actions = random.randint(0, 15, 4).astype(np.int32)
        if sys.argv[1] == "procgen-gym":
            _, reward, done, _, _ = engine.step(actions)
        else:
            engine.act(actions)
            reward, _, done = engine.observe()
        played.append([reward.copy(), done.copy()])
np.savez(sys.argv[1], frames=np.array(frames).reshape(len(PAIRS), 100, -1), played=np.array(played, dtype=float))
PYTHON
venv/bin/python play.py procgen-mirror
PYTHONPATH=procgen-gym==0.1.1 venv/bin/python play.py procgen-gym
PYTHONPATH=procgen==0.10.7 venv/bin/python play.py procgen
cat >compare.py <<'PYTHON'
import numpy as np
from play import PAIRS

mirror, gym, original = (np.load(f"{name}.npz") for name in ("procgen-mirror", "procgen-gym", "procgen"))
differ = dict(zip(PAIRS, (mirror["frames"] != original["frames"]).any(axis=2).sum(axis=1).tolist()))
print("first frames of 100 levels that procgen-mirror draws differently:", {pair: n for pair, n in differ.items() if n})
assert (gym["frames"] == original["frames"]).all(), "procgen-gym draws other frames than procgen"
assert (gym["played"] == original["played"]).all() and (mirror["played"] == original["played"]).all()
assert all(differ[game, "easy"] for game in ("coinrun", "ninja", "caveflyer")), "procgen-mirror draws what procgen does"
assert not any(differ[game, "easy"] for game in ("bigfish", "fruitbot", "maze", "leaper", "plunder", "starpilot"))
PYTHON
sed -i '/^frames/,$d' play.py
venv/bin/python compare.py
