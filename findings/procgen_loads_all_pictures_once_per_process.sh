#!/usr/bin/env bash
# procgen-mirror 0.10.7 (Linux, x86-64, Python 3.11): the first engine of a process loads the pictures of all sixteen games,
# whichever game is asked for, and keeps them when it is closed. That is most of the time and memory that an engine costs.
#
# Seen on 29 November 2026 on two cores of an AMD EPYC: a first engine, of one maze, takes 350 MB and 1.8 seconds of processor
# time; a second one, of sixteen environments of another game, 2 MB and less than a hundredth of a second. The first engine of
# a process that is forked after that takes a hundredth of a second. Whoever starts many processes of environments with
# `spawn`, or before an engine was made, pays for each: sixteen of them took 22 to 27 seconds and 6 GB, and 1.1 seconds and
# 0.9 GB when forked after an engine.
#
# Fails if a first engine no longer costs ten times a second one, or if forked processes have to load the pictures again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q procgen-mirror==0.10.7 gym==0.26.2 numpy==1.26.4 2>/dev/null
cat >measure.py <<'PYTHON'
import os
import re
import time
import warnings

warnings.simplefilter("ignore")
import gym_notices.notices

gym_notices.notices.notices.clear()
from procgen import ProcgenGym3Env


def private_megabytes():
    text = open("/proc/self/smaps_rollup").read()
    return sum(int(size) for size in re.findall(r"^Private_\w+: +(\d+)", text, re.MULTILINE)) / 1024


def cost(num, game):
    memory, begin = private_megabytes(), time.process_time()
    engine = ProcgenGym3Env(num, game, num_threads=0, rand_seed=1)
    engine.observe()
    return time.process_time() - begin, private_megabytes() - memory, engine


first = cost(1, "maze")
second = cost(16, "bigfish")
print(f"first engine: {first[0]:.2f} s, {first[1]:.0f} MB; second: {second[0]:.2f} s, {second[1]:.0f} MB")
reader, writer = os.pipe()
if os.fork() == 0:
    seconds, _, _ = cost(16, "starpilot")
    os.write(writer, str(seconds).encode())
    os._exit(0)
forked = float(os.read(reader, 100))
os.wait()
print(f"the first engine of a forked process: {forked:.2f} s")
assert first[1] > 300 and first[0] > 10 * second[0], "a first engine is no longer dear"
assert first[0] > 10 * forked, "a forked process loads the pictures again"
PYTHON
venv/bin/python measure.py
