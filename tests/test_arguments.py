"""What is not allowed is refused with status 2 and one line that names the argument, before anything is written."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import first_fast

import evaluate
import impala_procgen_srwm as script
from housekeeping import arguments, engine, processes
from reporting import runs

ROOT = Path(__file__).parent.parent


def test_a_checkpoint_may_have_a_single_game_as_it_once_was():
    saved = arguments.to_plain(script.Args())
    for plain, env in ((None, None), ("maze", ("maze",)), (["maze", "leaper"], ("maze", "leaper"))):
        assert script.from_plain(saved | dict(env=plain)).env == env


def test_arguments_of_games_are_printed_as_they_are_typed(monkeypatch):
    """Of a checkpoint, which holds them as lists; and one with lists of other lengths is refused."""
    limits = dict(entropy_limits=(("leaper", 0.8), ("maze", 1.5)), noop_max=(("leaper", 40),))
    saved = arguments.to_plain(script.Args(env=("maze", "leaper"), **limits))
    flags = runs.flags_of(saved, script)
    assert flags == dict(env="--env maze leaper", entropy_limits="--entropy-limits leaper 0.8 maze 1.5",
                         noop_max="--noop-max leaper 40")
    monkeypatch.setattr(sys, "argv", ["script", *" ".join(flags.values()).split()])
    assert script.command_line(script.Args()) == script.from_plain(saved) == script.Args(env=("maze", "leaper"), **limits)
    with pytest.raises(ValueError, match="leaper is not 2 values"):
        script.from_plain(saved | dict(entropy_limits=[["leaper"]]))


@pytest.mark.parametrize("words, expected", [
    ("--env pong", "--env must be one of bigfish,"),
    ("--env bigfish --distribution-mode memory", "--env must be one of dodgeball,"),
    ("--env maze --distribution-mode extreme", "--env must be one of leaper,"),
    ("--env maze --multi-env 2", "--env and --multi-env exclude each other"),
    ("--env maze pong", "--env must be one of bigfish,"),
    ("--env", "--env must name a game, got none"),
    ("--env maze leaper maze --num-envs 32", "--num-envs must be a multiple of 3, the length of the list of games, got 32"),
    ("--multi-env 17", "--multi-env must be at most 16"),
    ("--multi-env 7 --distribution-mode memory", "--multi-env must be at most 6"),
    ("--multi-env 0", "--multi-env must be positive"),
    ("--multi-env 6 --num-envs 32", "--num-envs must be a multiple of 6"),
    ("--num-envs 0", "--num-envs must be positive"),
    ("--num-actors 0", "--num-actors must be positive"),
    ("--num-servers 0", "--num-servers must be positive"),
    ("--num-actors 1 --num-envs 6 --batch-size 7", "--batch-size must be at most 6"),
    ("--batch-size 0", "--batch-size must be positive"),
    ("--unroll-length -1", "--unroll-length must be positive"),
    ("--total-steps 0", "--total-steps must be positive"),
    ("--bptt-length 0", "--bptt-length must be positive"),
    ("--num-layers 0", "--num-layers must be positive"),
    ("--num-head 3", "--num-head must divide --hidden-size 128"),
    ("--start-level 5 --num-levels 0", "--start-level needs --num-levels"),
    ("--start-level -1", "--start-level must be at least 0"),
    ("--num-levels -5", "--num-levels must be at least 0"),
    ("--start-level 2147483647", "--start-level plus --num-levels must be less than"),
    ("--seed 99999999999", "--seed must be at least 0 and at most 2147483647"),
    ("--learning-rate nan", "--learning-rate must be at least 0"),
    ("--learning-rate inf", "--learning-rate must be at least 0"),
    ("--discounting 1.01", "--discounting must be at least 0 and at most 1, got 1.01"),
    ("--epsilon 0", "--epsilon must be positive"),
    ("--grad-norm-clipping 0", "--grad-norm-clipping must be positive"),
    ("--valid-num-levels 10 --valid-start-level 195", "--valid-start-level must begin levels that are not trained on, got 195"),
    ("--valid-num-levels 10 --num-levels 0", "--valid-start-level must begin levels that are not trained on"),
    ("--entropy-limits leaper -1", "--entropy-limits must be at least 0 and at most 2147483647, got -1.0"),
    ("--entropy-limits maze 1 leaper nan", "--entropy-limits must be at least 0 and at most 2147483647, got nan"),
    ("--env leaper maze leaper --entropy-limits plunder 1",
     "--entropy-limits must name games that are learned (leaper, maze), got plunder"),
    ("--entropy-limits leaper 1 leaper 2", "--entropy-limits must name a game once, got leaper twice"),
    ("--noop-max leaper -1", "--noop-max must be at least 0 and at most 2147483647, got -1"),
    ("--noop-max heist 1", "--noop-max must name games that are learned (bigfish, fruitbot, maze, leaper, plunder, starpilot)"),
    ("--noop-max maze 1 leaper 5 maze 1", "--noop-max must name a game once, got maze twice"),
    ("--exp-name a/b", "--exp-name must be a folder's name"),
    ("--exp-name \xff\x1b", "--exp-name must be a folder's name"),
    (f"--exp-name {300 * 'a'}", "--exp-name must be a folder's name"),
    ("--resume nowhere", "nowhere: no such file"),
])
def test_bad_arguments_are_refused(words, expected, command, refused, tmp_path):
    refused(lambda: command(script, "--no-cuda", *words.split()), "impala_procgen_srwm.py: error: ", expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words, expected", [
    ("--distribution-mode exploration", "'easy', 'hard', 'extreme', 'memory'"),
    ("--reward-clipping sometimes", "'abs_one', 'normalize', 'none'"),
    ("--entropy-limits leaper", "--entropy-limits"), ("--noop-max leaper 1.5", "GAME INT ..."),
    ("--seed one", "--seed"), ("--learning-rat 1", "--learning-rate"), ("--gamma 0.9", "--gamma"),
])
def test_what_cannot_be_parsed_is_refused_by_tyro_which_names_what_is_allowed(words, expected, command, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        command(script, "--no-cuda", *words.split())
    assert end.value.code == 2 and expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", first_fast("--total_steps=6E1", "--total-steps 6e1", "--total-steps=6e1"))
def test_steps_may_be_written_as_1e6(words, train):
    assert torch.load(train(*words.split()) / "checkpoint.pt")["args"]["total_steps"] == 60


@pytest.mark.slow
def test_a_run_goes_on_beyond_two_to_the_31_steps(trained, command):
    torch.save(torch.load(trained / "checkpoint.pt") | {"step": 3 * 10**9}, trained / "checkpoint.pt")
    command(script, "--resume", trained, "--total-steps", 3 * 10**9 + 20)
    assert torch.load(trained / "checkpoint.pt")["step"] == 3 * 10**9 + 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_without_a_gpu_is_refused(command, refused, trained):
    refused(lambda: command(script, "--cuda"), "--cuda needs a GPU")
    refused(lambda: command(evaluate, "--cuda"), "--cuda needs a GPU")


@pytest.mark.parametrize("variables, named", [
    (dict(RANK="1", MASTER_ADDR="localhost", MASTER_PORT="1"), "WORLD_SIZE is ''"), (dict(WORLD_SIZE="2"), "MASTER_ADDR is ''"),
    (dict(WORLD_SIZE="", RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1"), "WORLD_SIZE is ''"),
    (dict(RANK="0", WORLD_SIZE="two", MASTER_ADDR="localhost", MASTER_PORT="1"), "WORLD_SIZE is 'two'"),
    (dict(RANK="0", LOCAL_RANK="", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="1"), "LOCAL_RANK is ''"),
])
def test_half_of_torchrun_s_variables_are_refused(variables, named, command, refused, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(lambda: command(script, "--no-cuda"), f"error: {named} in the environment, where torchrun sets it")


@pytest.mark.parametrize("words, expected", [
    ("--deterministic False --carry-state=false", (False, False)), ("--deterministic=True", (True, True)),
    ("--no-carry_state --deterministic true", (True, False)), ("--carry_state False", (False, False)),
])
def test_switches_may_be_written_as_sweeps_write_them(words, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["impala_procgen_srwm.py", *words.split()])
    args = script.command_line(script.Args())
    assert (args.deterministic, args.carry_state) == expected


def test_an_extra_checkpoint_beyond_the_end_is_refused(command, refused):
    refused(lambda: command(script, "--no-cuda", "--total-steps", 100, "--save-extra-checkpoint", 101),
            "--save-extra-checkpoint must be at most --total-steps 100, got 101")


V1 = "12:cpuset:/\n4:cpu,cpuacct:/a/b\n0::/\n"


@pytest.mark.parametrize("group, files, expected", [
    ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),  # in a container
    ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
    ("0::/job/step\n", {"job/cpu.max": "150000 100000\n", "job/step/cpu.max": "800000 100000\n"}, 2),  # the lowest limit counts
    ("0::/../job\n", {"cpu.max": "50000 100000\n"}, 1),
    (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 3),
    (V1, {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n"}, 64),
    (V1, {}, 64),
    (None, {}, 64),  # no Linux
])
def test_the_cores_of_a_container_are_those_that_it_may_use(group, files, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda process: range(64), raising=False)
    if group:
        files = {f"sys/fs/cgroup/{path}": text for path, text in files.items()} | {"proc/self/cgroup": group}
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert processes.num_cores(root=tmp_path) == expected


@pytest.mark.slow
def test_the_engine_plays_every_game_of_every_mode_and_no_other():
    """In a process of its own, since the engine aborts on a game that lacks the mode."""
    program = """
import numpy as np, impala_procgen_srwm as script
from housekeeping.engine import GAMES
for mode, games in GAMES.items():
    args = script.Args(distribution_mode=mode, env=tuple(games))
    assert script.check_games(args) == games
    envs = script.make_envs(args, games, 2 * len(games), seed=1)
    envs.act(np.zeros(2 * len(games), dtype=np.int32))
    assert envs.observe()[1]["rgb"].shape == (2 * len(games), 64, 64, 3), mode
"""
    end = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert end.returncode == 0 and end.stderr == "", end.stderr


def test_help_is_the_manual_and_starts_without_the_notice_of_gym():
    """It begins with the script's first words, and each argument is there with its sentence."""
    end = subprocess.run([sys.executable, "impala_procgen_srwm.py", "--help"], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | dict(COLUMNS="80"))
    assert end.returncode == 0 and end.stderr == "" and script.__doc__.splitlines()[0] in end.stdout
    assert "--unroll-length" in end.stdout and "steps T of an unroll" in end.stdout
    assert all(re.search(rf"\b{game}[,)]", end.stdout) for game in script.RETURN_RANGE)  # what --env may name
    for field in fields(script.Args):
        assert re.search(rf"--{field.name.replace('_', '-')}\b[^(]*\n?[^-]*\w", end.stdout), field.name


@pytest.mark.parametrize("name", first_fast("evaluate", *sorted(path.stem for path in ROOT.glob("impala_procgen_*.py"))))
def test_help_fits_a_terminal_of_80_columns(name):
    """In a real one, of which the command is the only program."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen([sys.executable, f"{name}.py", "--help"], cwd=ROOT, stdin=writer, stdout=writer,
                               stderr=writer, env=environment | dict(TERM="xterm"))
    os.close(writer)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while some := os.read(reader, 2**16):
            shown += some
    os.close(reader)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).splitlines()
    assert process.wait() == 0 and len(lines) > 50 and max(map(len, lines)) <= 80, max(lines, key=len)


def test_a_missing_system_library_is_named_with_its_debian_package(command, refused, monkeypatch):
    def no_engine(*args, **options):
        raise OSError("libGL.so.1: cannot open shared object file: no such file or directory")

    monkeypatch.setattr(engine._Engine, "__init__", no_engine)
    refused(lambda: command(script, "--no-cuda"), "libGL.so.1", "apt install libgl1 libglib2.0-0")
