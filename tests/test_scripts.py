"""The six scripts: one text outside the model section, and each of them trains, resumes and is scored."""

import ast
import difflib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FRUITBOT

import impala_procgen_srwm
from housekeeping import checkpoints
from reporting import playing, runs

ROOT = Path(__file__).parent.parent
SCRIPTS = [f"impala_procgen_{name}" for name in ("delta", "fake_sr", "ff", "lstm", "sr_delta", "srwm")]


def shared_text(stem):
    """A script without its model section and its docstring's title, and under a name that all share."""
    text = (ROOT / f"{stem}.py").read_text()
    before, model, after = re.split(r"\n# =+ model: .*\n|\n# =+ end of the model =+\n", text)
    assert "class ModelArgs" in model and "class Agent(nn.Module)" in model
    return [line.replace(stem, "SCRIPT") for line in (before + after).splitlines()[1:]]


@pytest.mark.parametrize("stem", SCRIPTS)
def test_scripts_are_one_text_outside_the_model(stem):
    diff = list(difflib.unified_diff(shared_text("impala_procgen_srwm"), shared_text(stem), "impala_procgen_srwm", stem, n=1))
    assert not diff, "\n".join(["the scripts have drifted apart:", *diff])


@pytest.mark.parametrize("stem", SCRIPTS)
def test_each_script_tells_its_story_in_at_most_560_lines_none_of_them_long(stem):
    """It has at most 1,000 in all, and 54,000 bytes; no function has more than 60 lines."""
    text = (ROOT / f"{stem}.py").read_text()
    story, rule, _ = re.split(r"\n(# =+ housekeeping: .*)\n", text)
    assert len(story.rstrip().splitlines()) <= 560 and "\ndef train(" in story and "\ndef main(" not in story
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) <= 1000 and len(text.encode()) <= 54_000
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 60


@pytest.mark.parametrize("stem", [pytest.param(stem, marks=[] if stem.endswith("_srwm") else pytest.mark.slow)
                                  for stem in SCRIPTS])
def test_each_script_trains_resumes_and_is_scored(stem, train, score, command, tmp_path):
    script = importlib.import_module(stem)
    run = train("--total-steps", 60, script=script)
    command(script, "--resume", run, "--total-steps", 100)
    checkpoint = checkpoints.load_checkpoint(run / "checkpoint.pt", f"{stem}.py")
    assert checkpoint["step"] == 100
    score("--num-levels", 1, *FRUITBOT)
    assert (run / "evaluation_fruitbot_easy_0_1.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stem", SCRIPTS)
def test_each_script_trains_in_the_memory_distribution(stem, train):
    words = "--distribution-mode memory --multi-env 4 --num-levels 500 --total-steps 40".split()
    assert (train(*words, script=importlib.import_module(stem)) / "checkpoint.pt").exists()


def test_a_checkpoint_of_another_script_is_refused(trained, command, refused, capsys):
    other = importlib.import_module("impala_procgen_ff")
    capsys.readouterr()
    refused(lambda: command(other, "--resume", trained), "belongs to impala_procgen_srwm.py")


def apply(diff, text):
    """Applies a diff without line numbers, whose hunks are parted by lines of three dots."""
    for hunk in diff.split(" ...\n"):
        old, new = ("".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in signs) for signs in (" -", " +"))
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.mark.slow
def test_the_readme_s_ablation_in_a_user_s_copy_trains_and_is_scored(monkeypatch, train, score, tmp_path):
    """my_ablation.py, found by its name beside evaluate.py."""
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    copy = apply(diff, Path(impala_procgen_srwm.__file__).read_text())
    (tmp_path / "my_ablation.py").write_text(copy)
    monkeypatch.setattr(runs, "HOME", tmp_path)
    script = runs.import_script("my_ablation.py")
    run = train("--total-steps", 60, script=script)
    assert "layers.0.gate.weight" in torch.load(run / "checkpoint.pt")["model"]
    assert run.name.startswith("my_ablation__1__")
    assert torch.load(run / "checkpoint.pt")["script"] == "my_ablation.py"
    score("--num-levels", 2, *FRUITBOT)
    assert (run / "evaluation_fruitbot_easy_0_2.json").exists()


def test_a_copy_that_changes_its_environments_is_scored_on_those(own_copy):
    options = dict(use_backgrounds=False, restrict_themes=True)
    script = own_copy("rand_seed=seed % 2**31,", "rand_seed=seed % 2**31, use_backgrounds=False, restrict_themes=True,")
    args = script.Args(cuda=False)
    mine = playing.make_level(script, args, "starpilot", 3).observe()[1]["rgb"]
    engine = script.ProcgenGym3Env(1, "starpilot", num_levels=1, start_level=3, distribution_mode="easy", **options)
    usual = playing.make_level(impala_procgen_srwm, args, "starpilot", 3).observe()[1]["rgb"]
    assert (mine == engine.observe()[1]["rgb"]).all() and not (mine == usual).all()


@pytest.mark.slow
def test_a_copy_that_changes_its_normalization_is_scored_by_it(own_copy, train, score, tmp_path):
    ranges = '\nRETURN_RANGE = {"bigfish": {"easy": (0, 10)}, "fruitbot": {}}'
    run = train("--total-steps", 20, script=own_copy("\nMAX_SKIPPED", ranges + "\nMAX_SKIPPED"))
    score("--num-levels", 1, "--env", "bigfish")
    found = json.loads((run / "evaluation_bigfish_easy_0_1.json").read_text())["games"]["bigfish"]
    assert found["normalized"] == found["mean_return"] / 10


@pytest.mark.slow
def test_one_script_and_evaluate_are_enough(train, tmp_path):
    run = train("--total-steps", 20, script=importlib.import_module("impala_procgen_lstm"))
    for name in ("impala_procgen_lstm.py", "evaluate.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("housekeeping", "reporting", "srwm_cuda"):
        (tmp_path / name).symlink_to(ROOT / name)
    words = [sys.executable, "evaluate.py", run, "--num-levels", "1", "--no-cuda", *FRUITBOT]
    end = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert end.returncode == 0 and "lstm" in end.stdout, end.stderr


@pytest.mark.slow
@pytest.mark.slow
def test_scripts_find_their_modules_where_python_does_not_look_beside_them(tmp_path):
    for name in ("impala_procgen_ff.py", "evaluate.py"):
        end = subprocess.run([sys.executable, ROOT / name, "--help"], cwd=tmp_path, capture_output=True, text=True,
                             env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": ""})
        assert end.returncode == 0, end.stderr


@pytest.mark.slow
def test_a_run_is_tied_to_the_text_of_its_script(own_copy, train, score, command, capsys, tmp_path):
    """Its folder has a copy; a change is told when it is resumed or scored, and makes another model."""
    first = train("--total-steps", 20, script=own_copy("return h + self.out", "return 1 * h + self.out"))
    text = (tmp_path / "my_ablation.py").read_text()
    assert (first / "my_ablation.py").read_text() == text
    capsys.readouterr()
    score(first, "--num-levels", 1, *FRUITBOT)
    assert "note" not in capsys.readouterr().err
    script = own_copy("return h + self.out", "return 2 * h + self.out")
    second = train("--total-steps", 20, "--seed", 2, script=script)
    capsys.readouterr()
    score(first, second, "--num-levels", 1, *FRUITBOT)
    out, error = capsys.readouterr()
    note = f"note: {first}/checkpoint.pt was trained with another version of my_ablation.py"
    assert error.count(note) == 1 == error.count("note")
    assert len(set(re.findall("my_ablation code ([0-9a-f]{8})", out))) == 2
    assert (first / "my_ablation.py").read_text() == text
    command(script, "--resume", first, "--total-steps", 40)
    assert f"my_ablation.py has changed since it trained {first}" in capsys.readouterr().out
    assert (first / "my_ablation.py").read_text() == (tmp_path / "my_ablation.py").read_text() != text
    command(script, "--resume", first, "--total-steps", 60)
    assert "has changed" not in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("stem", SCRIPTS)
def test_each_script_trains_on_the_gpu(stem, command, tmp_path):
    words = "--cuda --multi-env 2 --num-actors 2 --num-envs 8 --batch-size 8 --total-steps 4000".split()
    script = importlib.import_module(stem)
    command(script, *words)
    (run,) = (tmp_path / "runs").iterdir()
    assert checkpoints.load_checkpoint(run / "checkpoint.pt", f"{stem}.py")["step"] == 4000
