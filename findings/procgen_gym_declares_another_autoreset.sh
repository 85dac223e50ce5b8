#!/usr/bin/env bash
# procgen-gym 0.1.1 with Gymnasium 1.4.0 (Linux, x86-64, Python 3.13): its vector environments declare the autoreset
# mode NEXT_STEP, but do SAME_STEP: the frame that comes with an end is already the first of the next episode. Wrappers that
# believe the declaration leave a step out. Besides, `reset` neither begins an episode nor uses its seed.
#
# Seen on 29 November 2026: of 396 random episodes of chaser in 32 environments, RecordEpisodeStatistics said of 364 that
# they were one step shorter than they were, which is all but the first of each environment, and a mean return of 0.616
# instead of 0.653. `gym.make_vec(..., vectorization_mode="sync", rand_seed=1)` gives all environments the same row of levels.
# After two steps, `reset(seed=3)` returns the frame as it stands.
#
# Fails if any of that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.13 -m venv venv
venv/bin/pip install -q procgen-gym==0.1.1 gymnasium==1.4.0 2>/dev/null
cat >play.py <<'PYTHON'
import gymnasium as gym
import numpy as np
import procgen_gym  # noqa: F401
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from procgen_gym.env import ProcgenVecEnv

easy = dict(num_levels=200, start_level=0, distribution_mode="easy")
envs = RecordEpisodeStatistics(ProcgenVecEnv(32, "chaser", rand_seed=1, num_threads=0, **easy))
assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP, "another mode is declared"
envs.reset()
random, returns, lengths, episodes = np.random.RandomState(0), np.zeros(32), np.zeros(32), []
for _ in range(1500):
    _, reward, done, _, info = envs.step(random.randint(0, 15, 32))
    returns, lengths = returns + reward, lengths + 1
    for n in np.flatnonzero(done):
        episodes.append([returns[n], lengths[n], info["episode"]["r"][n], info["episode"]["l"][n]])
        returns[n] = lengths[n] = 0
played_return, played_length, said_return, said_length = np.array(episodes).T
short = int((said_length == played_length - 1).sum())
print(f"{len(episodes)} episodes, {short} said to be one step shorter; mean return {played_return.mean():.3f}, said to be "
      f"{said_return.mean():.3f}")
assert short == len(episodes) - 32 and said_return.mean() < played_return.mean()

envs = gym.make_vec("procgen_gym/procgen-maze-v0", num_envs=4, vectorization_mode="sync", rand_seed=1, **easy)
levels = envs.reset()[1]["level_seed"].tolist()
print(f"first levels of four environments: {levels}")
assert len(set(levels)) == 1, "the environments have levels of their own"

env = gym.make("procgen_gym/procgen-bigfish-v0", rand_seed=1, **easy)
first = env.reset(seed=3)[0]
for _ in range(2):
    now = env.step(7)[0]
again = env.reset(seed=3)[0]
assert np.array_equal(again, now) and not np.array_equal(again, first), "reset begins an episode"
print("reset returns the frame as it stands")
PYTHON
venv/bin/python play.py
