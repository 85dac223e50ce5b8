#!/usr/bin/env bash
# tensorboard 2.21.0 (Linux, Python 3.11): a writer of event files, also the one in PyTorch's SummaryWriter, remembers the
# first error of its file and raises it at each call from then on. After a disk was full for a moment, nothing is written
# any more, though there is room again, and the message still says that there is none. So whoever catches the error to let
# a training run go on has to make a new writer, which begins another file.
#
# Seen on 30 November 2026: one event is written; then the file may not grow, and two events raise OSError; then it may
# again, and two more events raise the same error. The file holds the first one alone. A new writer in the same folder
# writes at once. (The limit of a file's size stands for the full disk.)
#
# Fails if a writer writes again after an error, or if a new one does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q tensorboard==2.21.0 numpy==1.26.4 setuptools==80.9.0 2>/dev/null
cat >writer.py <<'PYTHON'
import os
import resource
import signal
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # too large a file is an error, and not the end of the process


def write(writer, step):
    try:
        writer.add_event(Event(step=step))
        writer.flush()
    except OSError as error:
        return error.strerror
    return "written"


def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


writer, said = EventFileWriter("log"), []
said.append(write(writer, 1))
(path,) = Path("log").iterdir()
limit(path.stat().st_size)
said += [write(writer, step) for step in (2, 3)]
limit(resource.RLIM_INFINITY)
said += [write(writer, step) for step in (4, 5)]
another = EventFileWriter("log", filename_suffix=".new")
said.append(write(another, 6))
files = sorted(Path("log").iterdir(), key=lambda file: file.suffix == ".new")
steps = [[Event.FromString(record).step for record in RawEventFileLoader(str(file)).Load()] for file in files]
print("events 1 to 6:", said, "\nsteps in the files:", steps, flush=True)
full = "File too large"
os._exit(said != ["written", full, full, full, full, "written"] or steps != [[0, 1], [0, 6]])  # 0: of each file's head
PYTHON
venv/bin/python writer.py 2>/dev/null
