#!/usr/bin/env bash
# rliable 1.2.0 with arch 7.2.0 (Linux, x86-64, Python 3.11), as `pip install rliable` gives it, beside pandas 3.1.1: it does
# not import. With pandas 2.3.3 it does, and then
# - get_interval_estimates takes random_state and does not use it: the numbers come from NumPy's global generator;
# - its bootstrap draws the runs of each game apart. Where one agent plays all games, a run that went well may have gone well
#   in all of them, and then the interval of the mean over games is too narrow.
#
# Seen on 29 November 2026: ten runs of six games, all six of a run with the same score: the interval is 2.4 times as narrow
# as that of a bootstrap that draws whole runs, the root of six being 2.45. Two calls with one random_state differ.
#
# Fails if it imports beside pandas 3.1.1, if random_state makes two calls equal, or if the interval is not narrower.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q rliable==1.2.0 arch==7.2.0 pandas==3.1.1 2>/dev/null
if venv/bin/python -c "import rliable.library" 2>/dev/null; then
  echo "it imports beside pandas 3.1.1"
  exit 1
fi
venv/bin/pip install -q pandas==2.3.3 2>/dev/null
cat >interval.py <<'PYTHON'
import numpy as np
from rliable import library

luck = np.random.default_rng(0).normal(size=(10, 1))
scores = {"agent": np.repeat(luck, 6, axis=1)}  # runs, games


def width(seed):
    _, intervals = library.get_interval_estimates(scores, np.mean, reps=5000, random_state=np.random.RandomState(seed))
    (low,), (high,) = intervals["agent"]
    return high - low


runs = np.random.default_rng(1).integers(0, 10, (5000, 10))
low, high = np.quantile(luck[runs, 0].mean(axis=1), [0.025, 0.975])
first, second = width(1), width(1)
print(f"widths: whole runs {high - low:.3f}, rliable {first:.3f} and, with the same random_state, {second:.3f}; "
      f"{(high - low) / first:.2f} times as narrow")
assert first != second, "random_state is used"
assert (high - low) / first > 1.5, "it draws whole runs"
PYTHON
venv/bin/python interval.py
