"""A run is what it says: resuming, fine-tuning, best checkpoints, and who may write to a run's folder."""

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import housekeeping
import impala_procgen_ff
import impala_procgen_srwm as script
import srwm_cuda
from housekeeping import checkpoints

SCRIPT = Path(script.__file__)
TINY = "--no-cuda --env leaper --num-actors 1 --num-envs 2 --unroll-length 5 --batch-size 2 --log-interval 0".split()


def read(path):
    return checkpoints.load_checkpoint(path / "checkpoint.pt" if path.is_dir() else path, None)


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


# Resuming


def test_a_finished_run_says_so_and_nothing_is_written(trained, command, capsys, tmp_path):
    before = contents(tmp_path)
    capsys.readouterr()
    command(script, "--resume", trained)
    assert capsys.readouterr().out == f"{trained} is finished, at step 20 of 20: nothing to do\n"
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_another_experiment_is_not_what_a_run_goes_on_with(trained, command, refused, capsys, tmp_path):
    """Be it finished or not."""
    before = contents(tmp_path)
    capsys.readouterr()
    for words in ("--env maze", "--env maze leaper", "--multi-env 3", "--distribution-mode hard", "--num-levels 100",
                  "--start-level 1", "--seed 2", "--exp-name ft", "--reward-clipping none", "--no-carry-state",
                  "--hidden-size 64", "--num-head 4", "--num-layers 1", "--bptt-length 1",
                  "--seed 3 --total-steps 20"):  # the last: of a finished run
        flag, _, value = words.removesuffix(" --total-steps 20").partition(" ")
        refused(partial(command, script, "--resume", trained, "--total-steps", 40, *words.split()),
                f"{flag.replace('--no-', '--')} cannot become {value or False} in", "--init-from")
    assert contents(tmp_path) == before


def test_no_game_is_not_what_a_run_goes_on_with(trained, command, refused, capsys):
    capsys.readouterr()
    refused(partial(command, script, "--resume", trained, "--total-steps", 40, "--env"), "--env cannot become none in")


def test_a_link_that_leads_nowhere_is_no_place_for_runs(command, refused, tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "nowhere")
    refused(lambda: command(script, *TINY), "runs must be a folder, or a link to one")


def test_without_wandb_a_run_is_not_tracked_there_and_says_why(train, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train("--total-steps", 20, "--track")
    assert "training goes on without Weights & Biases: import of wandb halted" in capsys.readouterr().out


@pytest.mark.slow
def test_a_longer_schedule_is_told_when_a_run_goes_on_with_it(trained, command, capsys):
    command(script, "--resume", trained, "--total-steps", 40)
    told = "with --total-steps 40 instead of 20, the learning rate goes on at 50% of its start, not at 0%"
    assert told in capsys.readouterr().out
    command(script, "--resume", trained)
    assert "learning rate" not in capsys.readouterr().out


@pytest.mark.slow
def test_six_games_may_be_named_or_left_out(train, command):
    run = train("--total-steps", 20, "--multi-env", "None", "--num-envs", 6)
    command(script, "--resume", run, "--total-steps", 40, "--multi-env", 6)
    assert read(run)["step"] == 40


@pytest.mark.slow
def test_a_run_goes_on_from_any_of_its_checkpoints(train, command, tmp_path):
    run = train("--total-steps", 100, "--save-extra-checkpoint", 40)
    command(script, "--resume", run / "checkpoint_40.pt", "--total-steps", 80)
    checkpoint = read(run)
    assert checkpoint["step"] == 80 and checkpoint["optimizer"]["state"][0]["step"] == 4
    assert len(list(tmp_path.glob("runs/*"))) == 1


def test_auto_takes_the_newest_unfinished_run_of_the_same_arguments_or_begins_one(train, command, tmp_path):
    def steps():
        return sorted(read(run)["step"] for run in tmp_path.glob("runs/*"))

    train("--total-steps", 40, "--resume", "auto")
    assert steps() == [40]
    train("--total-steps", 40, "--resume", "auto")  # the first is finished
    assert steps() == [40, 40]
    older, newer = sorted(tmp_path.glob("runs/*"), key=lambda run: (run / "checkpoint.pt").stat().st_mtime)
    for run in (older, newer):
        torch.save(torch.load(run / "checkpoint.pt") | {"step": 20}, run / "checkpoint.pt")
    assert train("--total-steps", 40, "--resume", "auto") is None
    assert (read(older)["step"], read(newer)["step"]) == (20, 40)
    train("--total-steps", 40, "--resume", "auto", "--num-levels", 5)
    train("--total-steps", 40, "--resume", "auto", "--seed", 2)
    assert steps() == [20, 40, 40, 40]


def test_auto_leaves_a_run_to_the_process_that_trains_it(trained, train):
    torch.save(torch.load(trained / "checkpoint.pt") | {"step": 10}, trained / "checkpoint.pt")
    with open(trained / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert train("--total-steps", 20, "--resume", "auto") is not None
    assert read(trained)["step"] == 10


@pytest.mark.slow
def test_of_two_processes_on_one_run_the_second_is_refused(tmp_path):
    def start(*words):
        return subprocess.Popen([sys.executable, SCRIPT, *TINY, *map(str, words)], cwd=tmp_path, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | dict(OMP_NUM_THREADS="1"))

    first = start("--total-steps", 1_000_000, "--save-interval", 0)
    while not first.stdout.readline().startswith("step"):
        pass
    (run,) = tmp_path.glob("runs/*")
    while not (run / "checkpoint.pt").exists():
        first.stdout.readline()
    second = start("--resume", run)
    out, error = second.communicate(timeout=60)
    assert second.returncode == 2 and f"{run} is in use: another process trains there" in error and len(error.splitlines()) == 1
    first.send_signal(signal.SIGKILL)
    first.communicate()
    step = read(run)["step"]
    third = start("--resume", run, "--total-steps", step + 10)  # a killed process keeps nobody off
    assert third.wait(timeout=60) == 0 and read(run)["step"] == step + 10


@pytest.mark.slow
def test_a_checkpoint_keeps_what_trained_each_part_of_its_run_and_of_those_it_began_with(train, command):
    """Arguments, script and srwm_cuda, from which step on."""
    run = train("--total-steps", 40)
    command(script, "--resume", run, "--total-steps", 80, "--learning-rate", 0.003)
    first, second = read(run)["history"]
    assert (first["step"], second["step"]) == (0, 40)
    changed = {name for name, value in first["args"].items() if value != second["args"][name]}
    assert changed == {"total_steps", "learning_rate"} and second["args"] == read(run)["args"]
    assert first["sha256"] == second["sha256"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    assert first["srwm_cuda"] == second["srwm_cuda"] == srwm_cuda.SHA256 and first["processes"] == 1
    assert first["housekeeping"] == second["housekeeping"] == housekeeping.SHA256
    child = read(train("--total-steps", 20, "--init-from", run))
    assert [part["step"] for part in child["history"]] == [0] and child["before"] == [[first, second]]


@pytest.mark.slow
def test_tensorboard_shows_the_arguments_of_each_part_of_a_run(train, command):
    run = train("--total-steps", 40)
    command(script, "--resume", run, "--total-steps", 80, "--learning-rate", 0.003)
    texts = EventAccumulator(str(run)).Reload().Tensors("arguments/text_summary")
    shown = {text.step: text.tensor_proto.string_val[0].decode() for text in texts}
    assert shown.keys() == {0, 40}
    assert "- learning_rate: 0.0006\n" in shown[0] and "- learning_rate: 0.003\n" in shown[40]


@pytest.mark.slow
def test_a_checkpoint_of_a_version_that_kept_the_newest_arguments_alone_goes_on(train, command):
    run = train("--total-steps", 40)
    checkpoint = torch.load(run / "checkpoint.pt")
    (part,) = checkpoint.pop("history")
    older = dict(checkpoint["args"], learning_rate=0.003)
    torch.save(checkpoint | dict(sha256=part["sha256"], before=[older]), run / "checkpoint.pt")
    command(script, "--resume", run, "--total-steps", 80)
    first, second = read(run)["history"]
    assert first == dict(step=0, args=part["args"], sha256=part["sha256"]) and second["step"] == 40
    assert read(run)["before"] == [[dict(step=0, args=older)]]


# Fine-tuning


def test_a_run_begins_with_the_weights_of_another_which_stays_as_it_is(train, tmp_path):
    parent = train("--total-steps", 40, "--hidden-size", 32, "--num-head", 2, "--num-layers", 1)
    before = contents(parent)
    run = train("--total-steps", 20, "--init-from", parent, "--exp-name", "ft", "--learning-rate", 0, "--seed", 7)
    assert contents(parent) == before and run.name.startswith("ft__7__")
    old, new = read(parent), read(run)
    assert new["step"] == 20 and new["optimizer"]["state"][0]["step"] == 1
    assert new["args"]["hidden_size"] == 32 and new["args"]["init_from"] == str(parent)
    assert all(torch.equal(old["model"][name], new["model"][name]) for name in old["model"])


@pytest.mark.slow
def test_a_fine_tuned_run_can_be_resumed_and_found(train, command):
    parent = train("--total-steps", 40, "--hidden-size", 32)
    words = ["--init-from", parent / "checkpoint.pt", "--exp-name", "ft", "--resume", "auto"]
    run = train("--total-steps", 40, *words)
    torch.save(torch.load(run / "checkpoint.pt") | {"step": 20}, run / "checkpoint.pt")
    assert train("--total-steps", 40, *words) is None
    assert read(run)["step"] == 40
    command(script, "--resume", run, "--total-steps", 60)
    assert read(run)["step"] == 60


@pytest.mark.parametrize("words, expected", [
    (["--hidden-size", 64], "other sizes"), (["--resume", "runs"], "--resume and --init-from exclude each other")])
def test_weights_that_do_not_fit_are_refused(words, expected, trained, command, refused, capsys, tmp_path):
    before = contents(tmp_path)
    capsys.readouterr()
    refused(lambda: command(script, *SMALL, "--init-from", trained, *words), expected)
    refused(lambda: command(impala_procgen_ff, *SMALL, "--init-from", trained), "other sizes")
    assert contents(tmp_path) == before


# The best checkpoint, and the extra one


@pytest.fixture
def validation(monkeypatch):
    """Lets every log entry have the next of the given validation returns."""
    values, begin = [], script.Run.open

    def open_and_plant(run, stop):
        begin(run, stop)
        run.valid_episodes.full = lambda: True
        run.valid_episodes.scalars = lambda *_: {"normalized_return/mean": values.pop(0)} if values else {}

    monkeypatch.setattr(script.Run, "open", open_and_plant)
    monkeypatch.setattr(script, "each_has_ended", lambda pool: True)
    return values


@pytest.mark.slow
def test_the_best_checkpoint_never_gets_worse(train, command, validation):
    validation += [0.5, 0.7, 0.6]
    run = train("--total-steps", 60)
    assert (read(run / "best.pt")["best"], read(run / "best.pt")["step"]) == (0.7, 40)
    validation += [0.6, 0.65, 0.8, 0.6]
    command(script, "--resume", run, "--total-steps", 100)  # whose checkpoint knows nothing of the best
    assert read(run / "best.pt")["step"] == 40
    command(script, "--resume", run, "--total-steps", 140)
    assert (read(run / "best.pt")["best"], read(run / "best.pt")["step"]) == (0.8, 120)


class FullDisk:
    """A file that is a link to /dev/full, to which nothing can be written, until so many failures were told."""

    def __init__(self, path, failures, monkeypatch):
        self.path, self.failures, self.say = path.with_suffix(".tmp"), failures, checkpoints.say
        self.path.symlink_to("/dev/full")
        monkeypatch.setattr(checkpoints, "say", self.hear)

    def hear(self, text, *rest, **options):
        self.say(text, *rest, **options)
        if "could not be written" in text:
            assert not self.path.is_symlink()  # what was written is no use, and takes space
            self.failures -= 1
            if self.failures > 0:
                self.path.symlink_to("/dev/full")


@pytest.mark.slow
def test_a_best_checkpoint_that_could_not_be_written_is_tried_again(trained, command, validation, monkeypatch):
    FullDisk(trained / "best.pt", 1, monkeypatch)
    validation += [0.7, 0.6]
    command(script, "--resume", trained, "--total-steps", 60)
    assert (read(trained / "best.pt")["best"], read(trained / "best.pt")["step"]) == (0.6, 60)


@pytest.mark.slow
def test_an_extra_checkpoint_that_could_not_be_written_is_tried_again(trained, command, monkeypatch):
    FullDisk(trained / "checkpoint_40.pt", 1, monkeypatch)
    command(script, "--resume", trained, "--total-steps", 80, "--save-extra-checkpoint", 40, "--save-interval", 0)
    assert read(trained / "checkpoint_60.pt")["step"] == 60
    assert not (trained / "checkpoint_80.pt").exists() and not (trained / "checkpoint_40.pt").exists()


@pytest.mark.parametrize("name", ["best", "checkpoint_40"])
def test_a_run_that_ends_without_one_of_its_checkpoints_ends_with_status_1(name, trained, command, validation,
                                                                                   monkeypatch):
    FullDisk(trained / name, 10, monkeypatch)
    validation += [0.7]
    with pytest.raises(SystemExit) as end:
        command(script, "--resume", trained, "--total-steps", 40, "--save-extra-checkpoint", 40)
    assert end.value.code == 1 and read(trained)["step"] == 40


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_then_its_name_is(train, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def note_sync(number):
        fsync(number)
        done.append(os.readlink(f"/proc/self/fd/{number}"))

    def note_replace(old, new):
        replace(old, new)
        done.append("renamed")

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    run = train("--total-steps", 20)
    assert done == [str(run / "checkpoint.tmp"), "renamed", str(run)]


@pytest.mark.slow
def test_where_a_folder_cannot_be_synchronized_no_file_stays_open(train, monkeypatch):
    fsync = os.fsync

    def refuse_folders(number):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError("not here")
        fsync(number)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    run = train("--total-steps", 100, "--save-interval", 0)
    opened = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    assert read(run)["step"] == 100 and str(run) not in opened


# Stopping


@pytest.mark.slow
def test_a_signal_is_followed_by_one_update_at_most(train, monkeypatch):
    """Wherever in an update it comes: here at its end."""
    update, calls = script.Learner.update, []

    def signalled(learner, *arguments):
        result = update(learner, *arguments)
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(0.2)  # in which the handler runs
        return result

    monkeypatch.setattr(script.Learner, "update", signalled)
    run = train("--total-steps", 1_000_000)
    assert len(calls) == 3 and read(run)["step"] == 60


# Terminals, closed streams, other programs


@pytest.mark.slow
def test_closed_streams_do_not_end_a_run_nor_does_a_poor_character_set(tmp_path):
    for redirection, variables in ((">&- 2>&- <&-", {}), ("> out.txt", dict(PYTHONIOENCODING="ascii"))):
        folder = tmp_path / variables.get("PYTHONIOENCODING", "closed \u00fc")
        folder.mkdir()
        words = " ".join([sys.executable, str(SCRIPT), *TINY, "--total-steps 20 --exp-name \u00fcbung", redirection])
        end = subprocess.run(words, shell=True, cwd=folder, env=os.environ | dict(OMP_NUM_THREADS="1") | variables)
        assert end.returncode == 0 and len(list(folder.glob("runs/*/checkpoint.pt"))) == 1


@pytest.mark.slow
def test_another_program_may_call_main_also_in_a_thread(train, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train("--total-steps", 20)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, "--total-steps", 20, "--seed", 2).result() is not None


def test_a_folder_that_cannot_be_written_to_is_refused(trained, command, refused, capsys, tmp_path):
    (trained / "lock").unlink()
    (trained / "lock").mkdir()  # for root, too, nothing to write to
    capsys.readouterr()
    refused(lambda: command(script, "--resume", trained, "--total-steps", 40), "Is a directory", f"{trained}/lock")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    (tmp_path / "runs").touch()
    refused(lambda: command(script, *TINY), "runs")
