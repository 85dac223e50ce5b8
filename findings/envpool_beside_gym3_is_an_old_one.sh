#!/usr/bin/env bash
# EnvPool and gym3 0.3.3, on which procgen is built (Linux, x86-64, Python 3.11; Qt 5 comes from PyQt5-Qt5 5.15.19): gym3 wants
# glfw below 2, newer EnvPools want a newer one. So `pip install envpool gym3` takes EnvPool 1.0.1, without a word. For one
# seed that one draws other levels than ProcGen, while EnvPool 1.2.5 draws ProcGen's.
#
# Seen on 29 November 2026: the first levels of six environments of maze with seed 7 and 200 levels are
# 143 93 178 63 187 61 in ProcGen and in EnvPool 1.2.5, and 15 123 70 137 41 163 in 1.0.1. The levels themselves are the same.
#
# Fails if pip takes 1.2.5 or newer beside gym3, or if the two draw the same levels.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >levels.py <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import envpool

levels = envpool.make("MazeEasy-v0", "gymnasium", num_envs=6, seed=7, num_levels=200, start_level=0).reset()[1]["level_seed"]
print(envpool.__version__, *levels.tolist())
PYTHON
for packages in "envpool gym3==0.3.3 gym==0.26.2 numpy==1.26.4" envpool==1.2.5; do
  rm -rf venv && python3 -m venv venv
  venv/bin/pip install -q $packages PyQt5-Qt5==5.15.19 2>/dev/null
  LD_LIBRARY_PATH=$(echo venv/lib/python3*/site-packages/PyQt5/Qt5/lib) venv/bin/python levels.py 2>/dev/null | tee -a seen.txt
done
grep -q "^1\.0\.1 " seen.txt || { echo "pip no longer takes EnvPool 1.0.1"; exit 1; }
grep -q "^1\.0\.1 143 93" seen.txt && { echo "EnvPool 1.0.1 draws ProcGen's levels"; exit 1; }
grep -qx "1.2.5 143 93 178 63 187 61" seen.txt
