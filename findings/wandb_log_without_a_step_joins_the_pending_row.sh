#!/usr/bin/env bash
# wandb 0.31.0 (Python 3.11): a call of log without a step, between calls with steps, makes no row of its own. Its values go
# into the row that is pending, and take the place of values of the same name there.
#
# Seen on 29 November 2026: log({"loss": 1, "SPS": 5}, step=100), log({"mine": 7, "loss": 2}), log({"loss": 3}, step=200) give two
# rows: step 100 with loss 2, SPS 5 and mine 7, and step 200. So in a copy of a script, pass `step` too, or other names.
#
# Fails if the call without a step makes a row of its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q wandb==0.31.0 2>/dev/null
cat >log.py <<'PYTHON'
import json
from pathlib import Path

import wandb
from wandb.proto.wandb_internal_pb2 import Record

run = wandb.init(project="rows", mode="offline", settings=wandb.Settings(silent=True, x_disable_stats=True))
run.log({"loss": 1, "SPS": 5}, step=100)
run.log({"mine": 7, "loss": 2})
run.log({"loss": 3}, step=200)
run.finish()
wandb.teardown()  # waits until all is written
(file,) = Path("wandb").glob("offline-run-*/*.wandb")
data, position, rows = file.read_bytes(), 7, []
assert len(data) < 32768, "records are in pieces"
while position < len(data):  # each has a checksum of 4 bytes, its length in 2 and its kind in 1
    size = int.from_bytes(data[position + 4 : position + 6], "little")
    record, position = Record.FromString(data[position + 7 : position + 7 + size]), position + 7 + size
    if record.HasField("history"):
        values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        rows.append((record.history.step.num, {key: value for key, value in values.items() if key[0] != "_"}))
print(rows)
assert rows == [(100, {"loss": 2, "SPS": 5, "mine": 7}), (200, {"loss": 3})]
PYTHON
venv/bin/python log.py
