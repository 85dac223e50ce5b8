#!/usr/bin/env bash
# EnvPool 1.2.5 (Linux, x86-64, Python 3.11; its ProcGen needs Qt 5, which PyQt5-Qt5 5.15.19 brings here): for ProcGen,
# max_episode_steps ends no episode. It only changes what an end is called: truncated instead of terminated, if the episode
# was longer. Whoever bootstraps a value at truncations then does so after deaths.
#
# Seen on 29 November 2026: 64 environments of bigfish, 600 random steps: the same 319 episodes with and without a limit of
# 20 steps; without it all terminated, with it 4 terminated and 315 truncated. The frame that comes with an end is the
# last of the old episode, otherwise than in ProcGen itself, and the next step plays nothing.
#
# Fails if a limit ends an episode, or if ends are called otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q envpool==1.2.5 PyQt5-Qt5==5.15.19 2>/dev/null
cat >play.py <<'PYTHON'
import envpool
import numpy as np


def play(game, num, steps, **options):
    """Rewards, terminated and truncated of each step, and the frames."""
    envs = envpool.make(f"{game}Easy-v0", "gymnasium", num_envs=num, num_threads=1, seed=7, channel_first=False, **options)
    random, frames, outcomes = np.random.RandomState(0), [envs.reset()[0].copy()], []
    for _ in range(steps):
        obs, *outcome, _ = envs.step(random.randint(0, 15, num).astype(np.int32))
        frames.append(obs.copy())
        outcomes.append([np.array(x, dtype=float) for x in outcome])
    rewards, terminated, truncated = np.array(outcomes).transpose(1, 0, 2)
    return rewards, terminated, truncated, frames


rewards, terminated, truncated, _ = play("Bigfish", 64, 600)
limited_rewards, limited_terminated, limited_truncated, _ = play("Bigfish", 64, 600, max_episode_steps=20)
print(f"without a limit {terminated.sum():.0f} terminated and {truncated.sum():.0f} truncated; with one of 20 steps "
      f"{limited_terminated.sum():.0f} and {limited_truncated.sum():.0f}")
assert terminated.sum() > 100 and not truncated.any() and limited_truncated.sum() > limited_terminated.sum()
assert np.array_equal(rewards, limited_rewards), "the limit ends episodes"
assert np.array_equal(terminated, limited_terminated + limited_truncated), "the limit ends episodes"

_, terminated, _, frames = play("Starpilot", 1, 200, num_levels=1, start_level=5)
end = int(np.flatnonzero(terminated[:, 0])[0]) + 1
assert not np.array_equal(frames[end], frames[0]) and np.array_equal(frames[end + 1], frames[0]), "an end's frame is another"
print("the frame at an end is of the old episode, the next one is the level's first")
PYTHON
LD_LIBRARY_PATH=$(echo venv/lib/python3*/site-packages/PyQt5/Qt5/lib) venv/bin/python play.py
