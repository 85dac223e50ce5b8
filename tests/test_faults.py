"""Runs that are killed, starved, damaged or unlucky: what is lost, and what is said."""

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import impala_procgen_srwm as script
from housekeeping import checkpoints, processes

SCRIPT = Path(__file__).parent.parent / "impala_procgen_srwm.py"
TINY = "--no-cuda --env leaper --num-actors 1 --num-envs 2 --unroll-length 5 --batch-size 2 --log-interval 0".split()
STEPS = 10  # of an update with these


def start(folder, *words, start_new_session=False, **variables):
    words = [sys.executable, SCRIPT, *TINY, *map(str, words)]
    environment = os.environ | dict(OMP_NUM_THREADS="1") | variables  # two of these run at once on two cores
    return subprocess.Popen(words, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
                            start_new_session=start_new_session)


def wait_for(process, beginning):
    """Reads the process's lines until one begins so."""
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(process.communicate())


def read(path):
    return checkpoints.load_checkpoint(path, SCRIPT.name)


def log(run):
    """What TensorBoard shows: {tag: [(step, value), ...]}."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def kill_and_resume(folder, seed, kills):
    """Starts a run and kills it again and again, by turns with each signal. Returns its folder and the steps of its checkpoint
    after each kill."""
    rng, resume, steps = random.Random(seed), [], [0]
    for kill in range(kills):
        process = start(folder, "--total-steps", 1_000_000, "--save-interval", rng.choice([0, 0.1]), *resume)
        assert "environments" in process.stdout.readline()
        (run,) = (folder / "runs").iterdir()
        if kill % 5 != 4:  # every fifth may be killed before it trains
            wait_for(process, "step")
        while kill == 0 and not (run / "checkpoint.pt").exists():
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        number, begin = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT][kill % 3], time.time()
        process.send_signal(number)
        out, error = process.communicate(timeout=30)
        assert time.time() - begin < 20 and error == "", error  # ten seconds, and as much for a busy machine
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0), (kill, out)
        checkpoint = read(run / "checkpoint.pt")
        assert checkpoint["step"] >= steps[-1]
        assert checkpoint["optimizer"]["state"][0]["step"] == checkpoint["step"] / STEPS
        steps.append(checkpoint["step"])
        resume = ["--resume", run]
    return run, steps


@pytest.mark.slow
def test_killed_at_any_moment_a_run_loses_no_more_than_what_came_after_its_checkpoint(tmp_path):
    """Twenty kills of two runs: the checkpoint is always whole and never older than before; curve, schedule and optimizer have
    no seam."""
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(kill_and_resume, folders, (0, 1), (10, 10)))
    for folder, (run, steps) in zip(folders, results):
        assert len(set(steps)) > 5 and len(list((folder / "runs").iterdir())) == 1
        last = start(folder, "--total-steps", steps[-1] + STEPS, "--resume", run)
        assert last.communicate(timeout=60)[1] == "" and last.returncode == 0
        rates = log(run)["learning_rate"]
        assert rates[-1][0] == steps[-1] + STEPS
        before = 0
        for step, rate in rates[:-1]:  # an entry is of one update; of two before a checkpoint, which waits for the newest
            assert step - before in (STEPS, 2 * STEPS)
            assert rate == pytest.approx(6e-4 * (1 - (before + step - STEPS) / 2 / 1_000_000), rel=1e-5)
            before = step


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    """Here after the first was heard, in a process that takes its time to stop."""
    program = """
import time, impala_procgen_srwm as script
stop = script.Stop()
stop.training = True
script.answer_signals([stop.hear, stop.hear])
print("ready", flush=True)
stop.wait()
print("stopping", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=SCRIPT.parent, text=True, stdout=subprocess.PIPE)
    for beginning in ("ready", "stopping"):
        wait_for(process, beginning)
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT


def test_a_full_disk_at_checkpoint_time_does_not_end_training(trained, command, capsys):
    (trained / "checkpoint.tmp").symlink_to("/dev/full")  # to which nothing can be written
    command(script, "--resume", trained, "--total-steps", 60, "--save-interval", 0)
    assert "checkpoint.pt could not be written: [Errno 28] No space left on device" in capsys.readouterr().err
    assert read(trained / "checkpoint.pt")["step"] == 60


@pytest.mark.slow
def test_a_full_disk_under_the_log_does_not_end_training(tmp_path):
    """Nor does it under standard output. Here each file may have 5,000 bytes, of which a checkpoint needs more."""
    words = [sys.executable, SCRIPT, *TINY, "--total-steps", "300"]
    with open("/dev/full", "w") as full:
        end = subprocess.run(words, cwd=tmp_path, text=True, stdout=full, stderr=subprocess.PIPE, timeout=120,
                             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000)))
    assert end.returncode == 1 and "checkpoint.pt could not be written" in end.stderr, end.stderr
    (run,) = (tmp_path / "runs").iterdir()
    gaps = {later[0] - step[0] for entries in log(run).values() for step, later in zip(entries, entries[1:])}
    assert gaps == {10, 20}  # only what would be written when the disk is found full is lost
    assert log(run)["SPS"][-1][0] >= 290 and not list(run.glob("*.tmp"))


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_any_more_is_saved(tmp_path):
    """As of `python impala_procgen_srwm.py | tee log`, where Ctrl-C ends tee too."""
    process = start(tmp_path, "--total-steps", 1_000_000)
    wait_for(process, "step")
    process.stdout.close()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0 and "Traceback" not in process.stderr.read()
    (run,) = (tmp_path / "runs").iterdir()
    assert read(run / "checkpoint.pt")["step"] > 0


@pytest.mark.slow
def test_a_signal_that_arrives_several_times_is_one(tmp_path):
    process = start(tmp_path, "--total-steps", 1_000_000)
    wait_for(process, "step")
    for _ in range(10):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 0 and error == "" and "saved runs" in out


def test_the_last_checkpoint_is_written_before_anything_that_may_take_long_or_fail(train, monkeypatch, tmp_path):
    def fail(logger):
        raise RuntimeError("no network")

    monkeypatch.setattr(script.Log, "close", fail)
    with pytest.raises(RuntimeError, match="no network"):
        train("--total-steps", 100)
    (run,) = tmp_path.glob("runs/*")
    assert read(run / "checkpoint.pt")["step"] == 100


def test_a_full_disk_at_the_end_keeps_the_old_checkpoint_and_says_so(trained, command, capsys):
    (trained / "checkpoint.tmp").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as end:
        command(script, "--resume", trained, "--total-steps", 40)
    assert end.value.code == 1 and "No space left on device" in capsys.readouterr().err
    assert read(trained / "checkpoint.pt")["step"] == 20


def test_a_run_goes_on_without_an_update_that_is_not_finite_and_with_a_new_matrix_for_one_that_diverged(train, monkeypatch,
                                                                                                      capsys):
    """Both are planted, and counted in the log."""
    get, play, unrolls, plays = script.ActorPool.get, script.Actor.play, [], []

    def get_third_without_end(pool):
        unrolls.append(get(pool))
        if len(unrolls) == 3:
            unrolls[-1].state[0][0] = float("nan")
        return unrolls[-1]

    def play_from_far_away(actor, unroll, free):
        plays.append(actor)
        if len(plays) == 3:
            actor.state[0][0, 0] = 1e6
        return play(actor, unroll, free)

    monkeypatch.setattr(script.ActorPool, "get", get_third_without_end)
    monkeypatch.setattr(script.Actor, "play", play_from_far_away)
    run = train("--total-steps", 200, "--deterministic")
    scalars = log(run)
    assert len(scalars["loss/total"]) == 9 and scalars["skipped_updates"][0][1] == 0
    assert scalars["skipped_updates"][-1] == (200, 1) and scalars["reset_states"][-1] == (200, 1)
    assert " | skipped updates: 1 | reset states: 1" in capsys.readouterr().out
    assert all(parameter.isfinite().all() for parameter in read(run / "checkpoint.pt")["model"].values())


@pytest.mark.slow
def test_many_updates_in_a_row_that_are_not_finite_stop_the_run_and_keep_the_last_good_checkpoint(trained, command):
    with pytest.raises(SystemExit, match="the last checkpoint is kept: 50 updates in a row, .*, are not finite: .*loss/policy"):
        command(script, "--resume", trained, "--total-steps", 2000, "--learning-rate", 1e9, "--save-interval", 0)
    checkpoint = read(trained / "checkpoint.pt")
    assert all(parameter.isfinite().all() for parameter in checkpoint["model"].values())


@pytest.mark.parametrize("method, deterministic", [
    ("act", False), *(pytest.param(*words, marks=pytest.mark.slow) for words in (("act", True), ("observe", False)))])
@pytest.mark.parametrize("start_level", [0, pytest.param(500, marks=pytest.mark.slow)], ids=["training", "validation"])
def test_stuck_environments_end_the_run(start_level, method, deterministic, train, monkeypatch):
    make_envs, trainer = script.make_envs, os.getpid()

    def make_stuck_envs(args, *rest, **options):
        envs, calls = make_envs(args, *rest, **options), []
        function = getattr(envs, method)

        def get_stuck(*words):
            calls.append(1)
            if len(calls) == 4:
                time.sleep(1000)
            return function(*words)

        if args.start_level == start_level and os.getpid() != trainer:
            setattr(envs, method, get_stuck)
        return envs

    monkeypatch.setattr(script, "make_envs", make_stuck_envs)
    monkeypatch.setattr(processes, "STUCK_AFTER", 1)
    begin = time.time()
    with pytest.raises(SystemExit, match=r"checkpoint is kept: process \d of the engine has not answered for 1 seconds"):
        train("--total-steps", 20_000, "--valid-num-levels", 5, *["--deterministic"] * deterministic)
    assert time.time() - begin < 40


def children(pid):
    return [int(number) for task in Path(f"/proc/{pid}/task").iterdir() for number in (task / "children").read_text().split()]


def runs(pid):
    """Whether there is such a process, and not only its exit status, which a container's first process may never ask for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_ended(pids, seconds):
    """That no such process runs any more after so many seconds."""
    end = time.time() + seconds
    while any(map(runs, pids)) and time.time() < end:
        time.sleep(0.01)
    assert not [pid for pid in pids if runs(pid)]


@pytest.mark.slow
@pytest.mark.parametrize("word", ["", "--deterministic"])
def test_a_process_of_the_engine_that_is_killed_ends_the_run_in_one_line(word, tmp_path):
    process = start(tmp_path, "--total-steps", 10_000_000, "--save-interval", 0, "--num-servers", 2, *word.split())
    for _ in range(5):
        wait_for(process, "step")
    engine, begin = children(process.pid), time.time()
    assert len(engine) == 2
    os.kill(engine[1], signal.SIGKILL)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 1 and time.time() - begin < 10
    assert error.count("\n") == 1 and "the last checkpoint is kept: process 1 of the engine ended by SIGKILL" in error
    (run,) = (tmp_path / "runs").iterdir()
    assert read(run / "checkpoint.pt")["step"] > 0
    assert_ended(engine, 2)


def test_a_process_of_the_engine_that_is_stopped_ends_the_run_in_one_line(train, monkeypatch, capfd):
    begin, stopped = script.ActorPool.start, []

    def begin_and_stop_later(pool):
        begin(pool)
        stopped.extend(pool.engine.workers.pids)
        threading.Timer(0.5, os.kill, [stopped[1], signal.SIGSTOP]).start()

    monkeypatch.setattr(script.ActorPool, "start", begin_and_stop_later)
    monkeypatch.setattr(processes, "STUCK_AFTER", 1)
    with pytest.raises(SystemExit, match="checkpoint is kept: process 1 of the engine has not answered for 1 seconds"):
        train("--total-steps", 10_000_000, "--num-servers", 2)
    assert capfd.readouterr().err == ""  # the line itself is Python's, as it exits
    assert len(stopped) == 2
    assert_ended(stopped, 2)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stream_that_waits_for_an_engine_that_died_or_hangs_does_not_keep_the_run(number, tmp_path):
    words = "--cuda --multi-env 2 --num-actors 2 --num-envs 16 --batch-size 8 --num-servers 2 --log-interval 0".split()
    program = "import impala_procgen_srwm as s; s.processes.STUCK_AFTER = 3; s.main()"
    environment = os.environ | dict(PYTHONPATH=f"{SCRIPT.parent}:{':'.join(sys.path)}")
    process = subprocess.Popen([sys.executable, "-c", program, *words], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=environment)
    wait_for(process, "step")
    engine, begin = children(process.pid), time.time()
    os.kill(engine[0], number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 1 and time.time() - begin < 20 and "process 0 of the engine" in error
    assert_ended(engine, 2)


@pytest.mark.slow
def test_a_trainer_that_is_killed_leaves_no_process(tmp_path):
    process = start(tmp_path, "--total-steps", 10_000_000, "--num-servers", 2, "--valid-num-levels", 5)
    wait_for(process, "step")
    engine = children(process.pid)
    assert len(engine) == 3  # one of the validation
    os.kill(engine[0], signal.SIGSTOP)  # also one that hangs
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert_ended(engine, 2)


@pytest.mark.slow
def test_ctrl_c_reaches_the_whole_group_and_the_run_is_saved(tmp_path):
    process = start(tmp_path, "--total-steps", 10_000_000, "--num-servers", 2, start_new_session=True)
    wait_for(process, "step")
    engine = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 0 and error == "" and "saved runs" in out
    assert_ended(engine, 2)


def test_memory_that_is_too_small_is_explained(train, monkeypatch):
    def no_memory(learner):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(script.Learner, "backward", no_memory)
    with pytest.raises(SystemExit, match="lower --num-envs or --num-actors .* or --batch-size .*Tried to allocate 2.00 GiB"):
        train("--total-steps", 100)
    with pytest.raises(SystemExit, match="too little memory; lower .*can't allocate memory"):
        train("--unroll-length", 2_000_000_000)  # more than any computer has


@pytest.mark.gpu
def test_a_gpu_that_is_too_small_is_explained(command):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 200e6) / total)
    try:
        with pytest.raises(SystemExit, match="lower --num-envs or --num-actors .* or --batch-size"):
            command(script, *"--cuda --num-actors 1 --num-envs 96 --batch-size 96".split())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def tracked(folder):
    """The steps in the files that W&B writes offline, in their order, whose blocks are those of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    steps = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, position, part = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if (left := 32768 - position % 32768) < 7:  # too few bytes for a head: checksum, length, kind
                position += left
                continue
            size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
            part, position = part + data[position + 7 : position + 7 + size], position + 7 + size
            if kind in (1, 4):  # a whole record, or the last part of one
                record, part = Record.FromString(part), b""
                if record.HasField("history"):
                    steps.append(record.history.step.num)
    return steps


@pytest.mark.slow
def test_weights_and_biases_gets_each_entry_of_a_run_that_goes_on_too(tmp_path):
    """And TensorBoard finds one run, whose files are not W&B's."""
    first = start(tmp_path, "--track", "--total-steps", 40, WANDB_MODE="offline")
    out, error = first.communicate(timeout=120)
    assert first.returncode == 0, error
    (run,) = tmp_path.glob("runs/*")
    resumed = start(tmp_path, "--resume", run, "--total-steps", 80, WANDB_MODE="offline")
    out, error = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, error
    logged = [step for step, _ in log(run)["SPS"]]
    assert tracked(tmp_path) == logged and logged[-1] == 80
    assert {path.parent for path in tmp_path.rglob("*tfevents*")} == {run}


@pytest.mark.slow
def test_training_goes_on_where_weights_and_biases_is_out_of_reach(tmp_path):
    nowhere = dict(WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40, WANDB_INIT_TIMEOUT="1")
    out, error = start(tmp_path, "--track", "--total-steps", 40, **nowhere).communicate(timeout=120)
    assert "checkpoint.pt at step 40" in out and "training goes on without Weights & Biases" in out, error


@pytest.mark.slow
def test_training_goes_on_without_the_process_of_weights_and_biases(tmp_path):
    process = start(tmp_path, "--track", "--log-interval", 0.2, WANDB_MODE="offline")
    wait_for(process, "step")
    (run,) = tmp_path.glob("runs/*")
    for child in children(process.pid):
        if b"wandb" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(child, signal.SIGKILL)
    wait_for(process, "training goes on without Weights & Biases")
    for _ in range(3):
        wait_for(process, "step")
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "saved" in out and "could not" not in out, error
    assert SCRIPT.name not in error  # wandb itself, which leaves when Python ends, may complain
    assert len(list(run.glob("events*"))) == 1


def test_a_checkpoint_with_any_bit_flipped_is_refused_or_the_same(trained, tmp_path):
    whole, exact = bytearray((trained / "checkpoint.pt").read_bytes()), read(trained / "checkpoint.pt")
    rng, refused = random.Random(0), 0
    for flip in range(60):
        position, bit = rng.randrange(len(whole) if flip % 2 else 2000), 1 << rng.randrange(8)
        whole[position] ^= bit
        (tmp_path / "flipped.pt").write_bytes(whole)
        whole[position] ^= bit
        try:
            checkpoint = read(tmp_path / "flipped.pt")
        except ValueError as error:
            assert "is not a whole checkpoint" in str(error)
            refused += 1
        else:
            assert checkpoint["step"] == exact["step"] and checkpoint["args"] == exact["args"]
            assert all(torch.equal(checkpoint["model"][name], exact["model"][name]) for name in exact["model"])
    assert refused > 50


@pytest.mark.slow
@pytest.mark.parametrize("cuda", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_two_deterministic_runs_are_the_same_bit_for_bit(cuda, tmp_path):
    """In processes of their own; another seed gives another run."""
    words = "--multi-env 2 --num-actors 2 --num-envs 12 --unroll-length 5 --batch-size 8 --total-steps 800".split()
    words += ["--noop-max", "fruitbot", "9"]

    def model(name, seed):
        options = ["--deterministic", "--seed", str(seed), "--exp-name", name, "--cuda" if cuda else "--no-cuda"]
        environment = os.environ | dict(OMP_NUM_THREADS="1")
        subprocess.run([sys.executable, SCRIPT, *words, *options], cwd=tmp_path, check=True, timeout=300, env=environment)
        (run,) = (tmp_path / "runs").glob(f"{name}__*")
        checkpoint = read(run / "checkpoint.pt")
        assert checkpoint["optimizer"]["state"][0]["step"] == 20
        return checkpoint["model"]

    with ThreadPoolExecutor() as pool:
        models = list(pool.map(model, ("first", "second", "other"), (3, 3, 4)))
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not all(torch.equal(models[0][name], models[2][name]) for name in models[0])


@pytest.mark.slow
def test_a_signal_before_training_ends_the_process_with_status_0(tmp_path):
    for process, number in [(start(tmp_path), number) for number in (signal.SIGINT, signal.SIGTERM)]:
        assert "environments" in process.stdout.readline()
        process.send_signal(number)
        out, error = process.communicate(timeout=20)
        assert process.returncode == 0 and error == "" and ("nothing to save" in out or "saved" in out)
