#!/usr/bin/env bash
# tyro 1.0.17 (Python 3.11): wraps the sentence of each argument where the terminal ends, but not the description of the
# program. It even joins its lines into one, those that begin with a letter: lines that were wrapped by hand come out as
# one, which a terminal cuts inside words. A line that begins with anything else, such as a space, keeps its break.
#
# Seen on 30 November 2026, 60 columns: a description of two lines of 43 and 42 characters is a line of 86, a third line
# that begins with a space is one by itself, and no line of the box below has more than 60.
#
# Fails if the two lines stay apart, if the third is joined, or if the box is wider than the terminal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q tyro==1.0.17 2>/dev/null
cat >program.py <<'PYTHON'
from dataclasses import dataclass

import tyro


@dataclass
class Args:
    steps: int = 1  # how many steps of all environments together are to be learned from before the program ends


tyro.cli(Args, description="Learns to play a game from pictures, and to\nplay it well on levels that are new to it.\n as code")
PYTHON
COLUMNS=60 venv/bin/python program.py --help >help.txt
cat help.txt
grep -q "pictures, and to play it well" help.txt || { echo "lines are not joined"; exit 1; }
grep -q "^ as code" help.txt || { echo "a line that begins with a space is joined"; exit 1; }
venv/bin/python -c "
lines = [line.rstrip() for line in open('help.txt', encoding='utf-8')]
box = [line for line in lines if line and line[0] in '╭│╰']
print('longest line:', max(map(len, lines)), '; of the box:', max(map(len, box)))
assert max(map(len, lines)) > 60 >= max(map(len, box))"
