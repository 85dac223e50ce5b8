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
