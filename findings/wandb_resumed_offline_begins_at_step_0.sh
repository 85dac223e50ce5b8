#!/usr/bin/env bash
# wandb 0.31.0 (Python 3.11): a run that is resumed offline does not know that it is. init with the id of a run that was
# logged to the same folder a moment before, and resume="must", neither fails nor finds it: step is 0, resumed is False,
# and there are two folders. So what a program asks of W&B to find out where it was (run.step, run.resumed) is right
# online and wrong offline, and a lower step than the last is not refused.
#
# Seen on 30 November 2026: steps 10, 20 and 30 are logged; resumed, the run says step 0 and takes step 5, and a call
# without a step after that says 6. An id that was never used is "resumed" with "must" as well.
#
# Fails if a resumed run knows its step, if "must" refuses, or if step 5 is left out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q wandb==0.31.0 2>/dev/null
cat >resume.py <<'PYTHON'
from pathlib import Path

import wandb


def init(id, resume):
    settings = wandb.Settings(silent=True, x_disable_stats=True)
    return wandb.init(project="resumed", id=id, resume=resume, mode="offline", settings=settings)


run = init("one", "allow")
for step in (10, 20, 30):
    run.log({"loss": step}, step=step)
assert run.step == 30
run.finish()

run = init("one", "must")
print(f"resumed: step {run.step}, starting_step {run.starting_step}, resumed {run.resumed}")
assert run.step == 0 and run.starting_step == 0 and not run.resumed, "a run resumed offline knows its step"
run.log({"loss": 5}, step=5)
run.log({"loss": 6})
print(f"after step 5 and a call without a step: {run.step}")
assert run.step == 6, "the lower step was left out"
run.finish()
assert len(list(Path("wandb").glob("offline-run-*-one"))) == 2
never = init("never_used", "must")
assert not never.resumed
never.finish()
wandb.teardown()
PYTHON
venv/bin/python resume.py
