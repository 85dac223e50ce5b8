#!/usr/bin/env bash
# tensorboard 2.21.0 with tensorboard-data-server 0.7.2 (Linux, x86-64, Python 3.11): `tensorboard --logdir`, whose data
# server is written in Rust, ignores purge_step of SummaryWriter. A run that was killed after its checkpoint and resumed
# is drawn with points that no longer belong to it, while EventAccumulator and `--load_fast false` leave them out.
#
# Seen on 29 November 2026: a run logs at steps 10, 20, ..., 100, is killed, goes on from step 50 with purge_step=51,
# and logs at 80 and 90. EventAccumulator shows 10 to 50, 80 and 90. The default server shows all of 10 to 100 until the
# tag is logged again, and then 10 to 70, 80 and 90. It takes back what a tag has at and after each new step, tag by
# tag, and knows no session starts: a tag that is not logged again keeps all its lost points. This is so in a server
# that was started after the resume, too. What helps: cut the file off at the checkpoint's step (the server reads on,
# also if it runs), and begin the next file with a copy of the last entry that is left. Then a server that runs takes
# back what it had read, of the tags in that entry.
#
# Fails if the default server no longer shows the lost points, or if cutting no longer helps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q tensorboard==2.21.0 tensorboard-data-server==0.7.2 2>/dev/null
cat >measure.py <<'PYTHON'
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


def write(folder, purge_step, steps):
    """What SummaryWriter(folder, purge_step=purge_step) writes, and a scalar at each step."""
    writer = EventFileWriter(folder)
    writer.add_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START), wall_time=time.time()))
    for step in steps:
        summary = Summary(value=[Summary.Value(tag="loss", simple_value=step)])
        writer.add_event(Event(step=step, summary=summary, wall_time=time.time()))
    writer.close()


def cut(folder, step):
    for path in Path(folder).iterdir():
        size = 0
        for record in RawEventFileLoader(str(path)).Load():
            if Event.FromString(record).step > step:
                os.truncate(path, size)
                break
            size += len(record) + 16


def shown(folder, words=(), begin=lambda: None, enough=0):
    """What a server shows that is started, and then `begin` called, once it shows a step as large as `enough`."""
    options = ["--logdir", folder, "--port", "0", "--reload_interval", "1", *words]
    server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *options], stderr=subprocess.PIPE, text=True)
    address = next(filter(None, (re.search(r"http://\S+", line) for line in server.stderr)))[0]
    page = f"{address}data/plugin/scalars/scalars?run=.&tag=loss"

    def steps():
        for _ in range(100):
            try:
                found = [step for _, step, _ in json.load(urllib.request.urlopen(page))]
                if max(found, default=0) >= enough:
                    return found
            except OSError:  # it has not read the files yet
                pass
            time.sleep(0.1)
        raise TimeoutError

    steps()
    begin()
    time.sleep(4)  # a few reloads
    try:
        return steps()
    finally:
        server.terminate()
        server.wait()


def killed(folder):
    write(folder, 1, range(10, 101, 10))
    time.sleep(1.1)  # or files may have their names of the same second
    return folder


kept, lost = [10, 20, 30, 40, 50, 80, 90], [60, 70]
folder = killed("purged")
write(folder, 51, [80, 90])
accumulator = EventAccumulator(folder).Reload()
assert [event.step for event in accumulator.Scalars("loss")] == kept
assert shown(folder, ["--load_fast", "false"], enough=90) == kept
default = shown(folder, enough=90)
print("purge_step=51, the default server:", default)
assert default == sorted(kept + lost), "the default server knows purge_step now"

folder = killed("not_logged_again")
write(folder, 51, [])
assert shown(folder, enough=100) == list(range(10, 101, 10)), "the default server knows purge_step now"


def resume():
    cut(folder, 50)
    write(folder, 50, [50, 80, 90])  # with the last entry that is left


folder = killed("running")
running = shown(folder, begin=resume, enough=90)
print("cut off, with the last entry repeated: a server that runs shows", running)
assert running == kept and shown(folder, enough=90) == kept, "cutting no longer helps"
assert [event.step for event in EventAccumulator(folder).Reload().Scalars("loss")] == kept
PYTHON
venv/bin/python measure.py 2>&1 | grep -v "^TensorFlow installation"
