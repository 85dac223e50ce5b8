"""The six scripts: one text outside the model section, and each of them trains, resumes and is scored."""

import difflib
import importlib
import re
from pathlib import Path

import pytest
import torch

import evaluate
import impala_procgen_srwm

ROOT = Path(__file__).parent.parent
SCRIPTS = [f"impala_procgen_{name}" for name in ("delta", "fake_sr", "ff", "lstm", "sr_delta", "srwm")]


def shared_text(stem):
    """A script without its model section and its docstring's title, and under a name that all share."""
    text = (ROOT / f"{stem}.py").read_text()
    before, model, after = re.split(r"\n# =+ model: .*\n|\n# =+ end of the model =+\n", text)
    assert "class Args(TrainingArgs)" in model and "class Agent(nn.Module)" in model
    return [line.replace(stem, "SCRIPT") for line in (before + after).splitlines()[1:]]


@pytest.mark.parametrize("stem", SCRIPTS)
def test_scripts_are_one_text_outside_the_model(stem):
    diff = list(difflib.unified_diff(shared_text("impala_procgen_srwm"), shared_text(stem), "impala_procgen_srwm", stem, n=1))
    assert not diff, "\n".join(["the scripts have drifted apart:", *diff])


@pytest.mark.parametrize("stem", SCRIPTS)
def test_each_script_trains_resumes_and_is_scored(stem, train, score, command, tmp_path):
    script = importlib.import_module(stem)
    run = train("--total-steps", 60, script=script)
    command(script, "--resume", run, "--total-steps", 100)
    checkpoint = script.load_checkpoint(run / "checkpoint.pt", f"{stem}.py")
    assert checkpoint["step"] == 100
    score("--num-levels", 1)
    assert (run / "evaluation_easy_0_1.json").exists()


@pytest.mark.parametrize("stem", SCRIPTS)
def test_each_script_trains_in_the_memory_distribution(stem, train):
    words = "--distribution-mode memory --multi-env 4 --num-levels 500 --total-steps 40".split()
    assert (train(*words, script=importlib.import_module(stem)) / "checkpoint.pt").exists()


def test_a_checkpoint_of_another_script_is_refused(train, command, refused, capsys):
    run = train("--total-steps", 20)
    capsys.readouterr()
    refused(lambda: command(importlib.import_module("impala_procgen_ff"), "--resume", run), "belongs to impala_procgen_srwm.py")


def apply(diff, text):
    """Applies a diff without line numbers, whose hunks are parted by lines of three dots."""
    for hunk in diff.split(" ...\n"):
        old, new = ("".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in signs) for signs in (" -", " +"))
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_the_readme_s_ablation_in_a_user_s_copy_trains_and_is_scored(monkeypatch, train, score, tmp_path):
    """my_ablation.py, found by its name beside evaluate.py."""
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    copy = apply(diff, Path(impala_procgen_srwm.__file__).read_text())
    (tmp_path / "my_ablation.py").write_text(copy)
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "evaluate.py"))
    script = evaluate.import_script("my_ablation.py")
    run = train("--total-steps", 60, script=script)
    assert "layers.0.gate.weight" in torch.load(run / "checkpoint.pt")["model"]
    assert run.name.startswith("my_ablation__1__")
    assert torch.load(run / "checkpoint.pt")["script"] == "my_ablation.py"
    score("--num-levels", 2)
    assert (run / "evaluation_easy_0_2.json").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("stem", SCRIPTS)
def test_each_script_trains_on_the_gpu(stem, command, tmp_path):
    words = "--cuda --multi-env 2 --num-actors 2 --num-envs 8 --batch-size 8 --total-steps 4000".split()
    script = importlib.import_module(stem)
    command(script, *words)
    (run,) = (tmp_path / "runs").iterdir()
    assert script.load_checkpoint(run / "checkpoint.pt", f"{stem}.py")["step"] == 4000
