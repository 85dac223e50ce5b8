"""What TensorBoard shows of runs that were killed and resumed: its server, as users start it, and its Python reader."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch.utils.tensorboard import SummaryWriter

import impala_procgen_srwm as script
from housekeeping.log import cut_log

SCRIPT = Path(__file__).parent.parent / "impala_procgen_srwm.py"
TINY = "--no-cuda --env leaper --num-actors 1 --num-envs 2 --unroll-length 5 --batch-size 2 --log-interval 0".split()


class Server:
    """`tensorboard --logdir runs`, and what its page of scalars would draw."""

    def __init__(self, folder):
        words = ["--logdir", "runs", "--port", "0", "--reload_interval", "1"]  # seconds
        self.process = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *words], cwd=folder, text=True,
                                        stderr=subprocess.PIPE)
        self.address = next(filter(None, (re.search(r"http://\S+", line) for line in self.process.stderr)))[0]

    def get(self, page, **query):
        query = urllib.parse.urlencode(query)
        with urllib.request.urlopen(f"{self.address}data/plugin/scalars/{page}?{query}") as answer:
            return json.load(answer)

    def curves(self):
        """{tag: [(step, value), ...]} of the only run."""
        return {tag: [(step, value) for _, step, value in self.get("scalars", run=run, tag=tag)]
                for run, tags in self.get("tags").items() for tag in tags}

    def wait_until(self, condition):
        end = time.time() + 60
        while not condition(self.curves()):
            assert time.time() < end, self.curves()
            time.sleep(0.2)


def log(run):
    """The same of TensorBoard's reader in Python."""
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
            for tag in accumulator.Tags()["scalars"]}


def start(folder, *words, limit=None):
    """Starts a run, whose files may have `limit` bytes each. It waits after some fifty lines that nobody reads, so
    that it logs fewer points than the 1,000 of which the server draws all."""
    before = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.Popen([sys.executable, SCRIPT, *TINY, *map(str, words)], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=before,
                            env=os.environ | dict(OMP_NUM_THREADS="1"), pipesize=4096)


def finish(process, status=0):
    out, error = process.communicate(timeout=300)  # a busy machine's
    assert process.returncode == status, error
    return out


def steps(curve):
    return [step for step, _ in curve]


def events(run):
    """What the run's files hold, in their order, whatever a reader makes of it: [(step, tag), ...]."""
    for path in sorted(run.glob("*tfevents*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            yield from ((event.step, value.tag) for value in event.summary.value)


def write(folder, steps):
    """An events file with two curves, of which the second has no point at the first step. Returns its path."""
    before = set(folder.glob("*"))
    with SummaryWriter(folder, purge_step=steps[0]) as writer:
        for step in steps:
            for tag in ("SPS", "loss")[: 1 + (step > steps[0])]:
                writer.add_scalar(tag, step, step)
    (path,) = set(folder.glob("*")) - before
    return path.rename(folder / f"events.out.tfevents.{len(before)}")  # two of one second may not be in order


def test_what_a_checkpoint_does_not_know_is_cut_off_and_the_last_entry_found(tmp_path):
    write(tmp_path, [10, 20, 30, 40])
    write(tmp_path, [50, 60])
    step, entry = cut_log(tmp_path, 35)
    assert list(events(tmp_path)) == [(10, "SPS"), (20, "SPS"), (20, "loss"), (30, "SPS"), (30, "loss")]
    assert step == 30 and [(event.step, event.summary.value[0].tag) for event in entry] == [(30, "SPS"), (30, "loss")]


def test_an_entry_at_the_checkpoint_s_step_is_kept(tmp_path):
    write(tmp_path, [10, 20, 30])
    assert cut_log(tmp_path, 30)[0] == 30
    assert log(tmp_path)["SPS"] == [(10, 10), (20, 20), (30, 30)]


@pytest.mark.parametrize("cut", [1, 5, 20, 30])  # bytes, fewer than a record has
def test_a_record_that_a_kill_cut_in_half_hides_none_before_or_after_it(cut, tmp_path):
    path = write(tmp_path, [10, 20])
    os.truncate(path, path.stat().st_size - cut)
    write(tmp_path, [30, 40])
    step, entry = cut_log(tmp_path, 30)
    assert step == 30 and len(entry) == 1
    assert list(events(tmp_path)) == [(10, "SPS"), (20, "SPS"), (30, "SPS")]


def test_a_folder_without_events_has_nothing_to_cut_off(tmp_path):
    (tmp_path / "events.out.tfevents.1").touch()  # as a full disk leaves it
    assert cut_log(tmp_path, 30) == (31, [])


def test_a_run_that_goes_on_from_an_older_checkpoint_logs_on_from_there(train, command):
    run = train("--total-steps", 80, "--save-extra-checkpoint", 40)
    before = log(run)
    command(script, "--resume", run / "checkpoint_40.pt", "--total-steps", 100)
    after = log(run)
    for tag, curve in after.items():
        assert steps(curve) == [step for step in (20, 40, 60, 80, 100) if step >= curve[0][0]]
        assert curve[:2] == before.get(tag, [])[:2] or curve[0][0] > 40
    assert [step for step, tag in events(run) if tag == "SPS"] == [20, 40, 40, 60, 80, 100]


@pytest.mark.slow
def test_on_a_full_disk_a_run_goes_on_without_its_log_and_without_what_was_lost(tmp_path):
    """No file may grow here."""
    finish(start(tmp_path, "--total-steps", 60, "--save-extra-checkpoint", 40))
    (run,) = tmp_path.glob("runs/*")
    before = log(run)["SPS"]
    out = finish(start(tmp_path, "--resume", run / "checkpoint_40.pt", "--total-steps", 100, limit=0), status=1)
    assert "the log could not be written, training goes on: [Errno 27]" in out and "\nstep 100 of 100" in out
    assert log(run)["SPS"] == before[:4]
    finish(start(tmp_path, "--resume", run / "checkpoint_40.pt", "--total-steps", 60))
    assert steps(log(run)["SPS"]) == steps(before) and log(run)["SPS"][:4] == before[:4]


@pytest.mark.slow
def test_after_kills_tensorboard_draws_only_what_the_run_goes_on_from(tmp_path):
    """Two kills after the same checkpoint, one of which cuts the last record in half. Drawn by a server that has seen
    all, by a new one, and by the reader in Python."""
    assert "saved" in finish(start(tmp_path, "--total-steps", 300))  # by then an episode has ended: all tags are there
    (run,) = tmp_path.glob("runs/*")
    curves, old = log(run), Server(tmp_path)
    assert len(curves["SPS"]) == 30 and "return/mean" in curves
    for kill in range(2):
        process = start(tmp_path, "--resume", run, "--total-steps", 1_000_000, "--save-interval", 1000)
        old.wait_until(lambda seen: steps(seen["SPS"])[-1] > 400)  # of which nothing is saved
        process.send_signal(signal.SIGKILL)
        finish(process, -signal.SIGKILL)
        newest = max(run.glob("*tfevents*"))
        os.truncate(newest, newest.stat().st_size - 3 * kill)
    finish(start(tmp_path, "--resume", run, "--total-steps", 340, "--log-interval", 1000))  # one entry
    after = log(run)
    new = Server(tmp_path)
    new.wait_until(lambda seen: steps(seen.get("SPS", [(0, 0)]))[-1] == 340)
    old.wait_until(lambda seen: steps(seen["SPS"])[-1] == 340)
    for tag, curve in curves.items():
        assert after[tag][: len(curve)] == curve and steps(after[tag][len(curve) :]) == [340]
    assert new.curves() == old.curves() == after
