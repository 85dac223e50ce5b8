#!/usr/bin/env bash
# EnvPool 1.2.5 plays ProcGen with an engine of its own build (Linux, x86-64, Python 3.11; it needs Qt 5, which
# PyQt5-Qt5 5.15.19 brings here). Its levels are ProcGen's, and their first frames those of OpenAI's package,
# procgen 0.10.7, byte for byte but for a few bytes of one frame of dodgeball; procgen-mirror 0.10.7 draws coinrun and
# five other games otherwise than both. A step of EnvPool's takes more processor time.
#
# Seen on 30 November 2026 in easy mode, 96 environments of each of the 16 games with seed 7, levels 0 to 199. A step
# of bigfish, of all threads, medians of seven turns on two cores of an AMD EPYC that others used too: 32 microseconds
# and 24, ratio 1.28 (1.15 to 1.59); in two other runs, one while much else ran there, 1.40 (1.23 to 1.75) and 1.57
# (1.39 to 2.32).
#
# Fails if levels differ, if five frames or more differ from OpenAI's, if one of bigfish, fruitbot, maze, leaper, plunder
# or starpilot does from either package's, or if EnvPool's step takes less than 1.05 times the processor time of
# procgen-mirror's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv with-envpool && python3 -m venv with-procgen
with-envpool/bin/pip install -q envpool==1.2.5 PyQt5-Qt5==5.15.19 2>/dev/null
with-procgen/bin/pip install -q procgen-mirror==0.10.7 gym==0.26.2 numpy==1.26.4 2>/dev/null
with-procgen/bin/pip install -q --target procgen==0.10.7 --no-deps --only-binary :all: --ignore-requires-python \
  --python-version 3.10 procgen==0.10.7 2>/dev/null
cat >play.py <<'PYTHON'
import sys
import time
import warnings

import numpy as np

warnings.simplefilter("ignore")
GAMES = ("bigfish bossfight caveflyer chaser climber coinrun dodgeball fruitbot heist jumper leaper maze miner ninja "
         "plunder starpilot").split()


def make(game):
    """Returns the first frames and levels of 96 environments, and what takes a step in them."""
    levels = dict(num_levels=200, start_level=0)
    if sys.argv[1] == "envpool":
        import envpool

        envs = envpool.make(f"{game.capitalize()}Easy-v0", "gymnasium", num_envs=96, num_threads=1, seed=7,
                            channel_first=False, **levels)
        frames, info = envs.reset()
        return frames, info["level_seed"], envs.step
    import gym_notices.notices

    gym_notices.notices.notices.clear()
    from procgen import ProcgenGym3Env

    engine = ProcgenGym3Env(96, game, distribution_mode="easy", num_threads=0, rand_seed=7, **levels)

    def step(actions):
        engine.act(actions)
        engine.observe()

    return engine.observe()[1]["rgb"], [info["level_seed"] for info in engine.get_info()], step


def microseconds(step, count):
    """Processor time of a step of one environment, of all threads."""
    random, begin = np.random.RandomState(0), time.process_time()
    for _ in range(count):
        step(random.randint(0, 15, 96).astype(np.int32))
    return (time.process_time() - begin) / count / 96 * 1e6


if __name__ == "__main__" and sys.argv[2] == "first":
    frames, levels, _ = zip(*map(make, GAMES))
    np.savez(sys.argv[1], frames=frames, levels=levels)
elif __name__ == "__main__":
    _, _, step = make("bigfish")
    microseconds(step, 20)  # these do not count
    print(microseconds(step, 400))
PYTHON
envpool() {
  LD_LIBRARY_PATH=$(echo with-envpool/lib/python3*/site-packages/PyQt5/Qt5/lib) \
    with-envpool/bin/python play.py envpool $1 2>/dev/null
}
envpool first
with-procgen/bin/python play.py procgen-mirror first
PYTHONPATH=procgen==0.10.7 with-procgen/bin/python play.py procgen first
for turn in 1 2 3 4 5 6 7; do
  envpool time >>envpool.txt
  with-procgen/bin/python play.py procgen-mirror time >>procgen.txt
done
cat >compare.py <<'PYTHON'
import numpy as np
from play import GAMES

SIX = "bigfish fruitbot maze leaper plunder starpilot".split()
envpool, mirror, original = (np.load(f"{name}.npz") for name in ("envpool", "procgen-mirror", "procgen"))
assert (envpool["levels"] == original["levels"]).all(), "EnvPool draws other levels"
for name, package in (("procgen", original), ("procgen-mirror", mirror)):
    differ = (envpool["frames"] != package["frames"]).any(axis=(2, 3, 4)).sum(axis=1)
    print(f"of 96 first frames of each game, {name} draws differently:",
          {game: int(n) for game, n in zip(GAMES, differ) if n})
    if package is original:
        assert differ.sum() < 5, "EnvPool draws other frames than OpenAI's package"
    assert not differ[[GAMES.index(game) for game in SIX]].any()
times = np.loadtxt("envpool.txt"), np.loadtxt("procgen.txt")
ratio = np.median(times[0] / times[1])
print(f"microseconds of a step, bigfish: EnvPool {np.median(times[0]):.1f}, procgen-mirror {np.median(times[1]):.1f}; "
      f"ratio {ratio:.2f} ({min(times[0] / times[1]):.2f} to {max(times[0] / times[1]):.2f})")
assert ratio > 1.05, "EnvPool's step is no longer dearer"
PYTHON
with-procgen/bin/python compare.py
