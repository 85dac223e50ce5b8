"""Benchmarks leave alone what is a user's, and say what they need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
from benchmarks import training

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_without_a_gpu_the_kernels_benchmark_ends_in_one_line():
    ended = subprocess.run([sys.executable, ROOT / "benchmarks" / "kernels.py"], capture_output=True, text=True,
                           env=os.environ | dict(CUDA_VISIBLE_DEVICES=""))
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == "kernels.py: error: the kernels run on a CUDA GPU, and there is none\n"


def started(*words):
    command = [sys.executable, ROOT / "benchmarks" / "engine.py", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="for which there is no procgen")
def test_of_processes_that_play_those_forked_after_an_engine_take_the_least_memory():
    """And the fork server's, when it has an engine: the pictures are there once, 350 MB, and not three times."""
    ended = started("--processes", "3", "--num-envs", "6", "--turns", "1")
    assert ended.stderr == "" and ended.returncode == 0
    rows = [line.strip("| ").split(" | ") for line in ended.stdout.splitlines()[2:]]
    memory = {way: float(cells[-1]) for way, *cells in rows}
    once = {way for way, each in memory.items() if each < 0.6}
    assert len(memory) == 5 and once == {"forked after a first engine", "from a fork server with an engine"}
    assert all(each > 0.9 for way, each in memory.items() if way not in once)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="for which there is no procgen")
@pytest.mark.parametrize("words, said", [
    ("--processes 0", "--processes must be positive, got 0"), ("--turns -1", "--turns must be positive, got -1"),
    ("--num-envs 8", "--num-envs must be a positive multiple of 6, the number of games, got 8")])
def test_the_engine_s_benchmark_names_an_argument_that_is_wrong(words, said):
    ended = started(*words.split())
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.endswith(f"engine.py: error: {said}\n")


@pytest.mark.slow
def test_a_benchmark_s_runs_are_not_the_newest_to_evaluate(monkeypatch, tmp_path):
    """Wherever it is started: here a run that ends at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "FOLDER", tmp_path / "benchmarks")
    (tmp_path / "benchmarks").mkdir()
    run = training.Run(0, "srwm --no-cuda --num-actors 1 --num-envs 6 --unroll-length 5 --batch-size 4 --total-steps 20", 1, 1)
    assert run.process.wait(timeout=100) == 0
    run.reader.join()
    (made,) = tmp_path.rglob("checkpoint.pt")
    assert made.parent.parent == tmp_path / "benchmarks" / "runs" and run.exp_name in made.parent.name
    with pytest.raises(ValueError, match="no checkpoint under runs/"):
        evaluate.find_runs([])


@pytest.mark.parametrize("python, ends", [("3.10", True), ("3.11", False), ("3.13", False), ("3.14", True)])
def test_the_first_requirement_ends_the_installation_of_other_pythons(python, ends):
    """It is a file that is not there, whose name says which they are: before anything is downloaded."""
    first = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#"))
    file, _, marker = first.split("  #")[0].partition(" @ ")[2].partition(" ; ")
    assert file.startswith("file:///only-for-python-3.11-3.12-3.13") and not Path(file.removeprefix("file://")).exists()
    assert eval(marker, dict(python_version=python)) == ends
