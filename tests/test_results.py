"""What is kept of finished runs, the tables and plots of it, and agents to play with."""

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import first_fast
from torch.utils.tensorboard import SummaryWriter

import evaluate
import impala_procgen_srwm
from reporting import page, playing, results, runs, tables

ROOT = Path(__file__).parent.parent
AGENT = "srwm --unroll-length 5 --batch-size 4"  # as the report calls the agent that is trained here
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


@pytest.fixture(scope="module")
def scored_once(trained_once, tmp_path_factory):
    run = shutil.copytree(trained_once, tmp_path_factory.mktemp("scored_once") / trained_once.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(playing, "SLOTS", {"cpu": 4})
        patch.setattr(playing, "VECTOR", {"cpu": 2})
        words = "--splits train 1000 --num-levels 1 --no-cuda --bf16 False"  # which some CPUs would not choose
        patch.setattr(sys, "argv", [evaluate.__file__, str(run), *words.split()])
        evaluate.main()
    return run


@pytest.fixture
def scored(scored_once, command, tmp_path):
    """A run with the scores of one training and one test level of each game, under runs/ in the test's own folder."""
    return shutil.copytree(scored_once, tmp_path / "runs" / scored_once.name)


def a_seed(run, seed, script_version):
    """A copy of a scored run as if it were another seed's, trained with another version of the script."""
    copy = run.with_name(f"seed_{seed}")
    copy.mkdir()
    checkpoint = torch.load(run / "checkpoint.pt")
    torch.save(checkpoint | dict(args=checkpoint["args"] | dict(seed=seed)), copy / "checkpoint.pt")
    for path in run.glob("evaluation*"):
        record = json.loads(path.read_text())
        record |= dict(seed=seed, code=script_version, flags=record["flags"] | dict(seed=f"--seed {seed}"))
        (copy / path.name).write_text(json.dumps(record))
    return copy


def test_what_is_kept_of_a_run_is_its_command_line_arguments_scores_and_curve(scored, command):
    with SummaryWriter(scored) as writer:
        for step in range(1000):
            writer.add_scalar("return/bigfish", step / 8, 10 * step)
    command(results, "add", scored)
    kept = Path("results", scored.name)
    arguments = json.loads((kept / "arguments.json").read_text())
    assert arguments["args"] == torch.load(scored / "checkpoint.pt")["args"] and arguments["step"] == 20
    flags = "--multi-env 2 --num-actors 2 --num-envs 4 --total-steps 20 --unroll-length 5 --batch-size 4"
    words = {"python", "impala_procgen_srwm.py", "--log-interval", "0.0", *flags.split()}
    (typed,) = arguments["commands"]
    assert set(typed["command"].split()) == words and typed["step"] == 0
    for name in ("evaluation_easy_0_1.json", "evaluation_easy_1000_1.json"):
        assert json.loads((kept / name).read_text()) == json.loads((scored / name).read_text())
    steps, values = results.read_curve(kept / "curve.csv")["return/bigfish"]
    assert len(steps) == 200 and (steps[0], steps[-1]) == (0, 9990) and (values == steps / 80).all()
    assert sum(path.stat().st_size for path in kept.iterdir()) < 20_000


@pytest.mark.slow
def test_what_is_kept_of_a_resumed_run_has_the_command_of_each_part(train, command, score):
    run = train("--total-steps", 20, "--learning-rate", 0.003)
    command(impala_procgen_srwm, "--resume", run, "--total-steps", 40, "--learning-rate", 6e-4)
    score(run, "--num-levels", 1)
    command(results, "add", run)
    first, second = json.loads(Path("results", run.name, "arguments.json").read_text())["commands"]
    assert "--learning-rate 0.003" in first["command"] and first["step"] == 0
    assert second == dict(step=20, command=f"python impala_procgen_srwm.py --resume runs/{run.name} "
                                           "--total-steps 40 --learning-rate 0.0006")


def test_a_single_game_as_older_checkpoints_hold_it_is_no_other_one_after_a_resume(trained):
    checkpoint = torch.load(trained / "checkpoint.pt")
    (part,) = checkpoint["history"]
    checkpoint["history"] = [dict(step=step, args=part["args"] | dict(multi_env=None, env=env))
                             for step, env in ((0, "maze"), (20, ["maze"]))]
    first, second = runs.commands(checkpoint, impala_procgen_srwm, "NAME")
    assert first["command"].endswith(" --batch-size 4") and " --env maze " in first["command"]
    assert second["command"] == "python impala_procgen_srwm.py --resume runs/NAME"


def test_a_curve_keeps_the_steps_at_which_a_game_had_no_episode_empty(tmp_path):
    curves = {"return/maze": np.array([[5, 10], [1.0, 2.0]]), "return/leaper": np.array([[10], [0.5]]),
              "SPS": np.ones((2, 2))}
    results.write_curve(tmp_path / "curve.csv", curves)
    assert (tmp_path / "curve.csv").read_text() == "step,return/maze,return/leaper\n5,1,\n10,2,0.5\n"
    found = results.read_curve(tmp_path / "curve.csv")
    assert {tag: curve.tolist() for tag, curve in found.items()} == {
        "return/maze": [[5, 10], [1, 2]], "return/leaper": [[10], [0.5]]}


def test_a_curve_of_which_thinning_left_nothing_is_none(tmp_path):
    curves = {"return/maze": np.array([np.arange(1000)] * 2), "valid_return/maze": np.array([[1, 2], [3, 3]])}
    results.write_curve(tmp_path / "curve.csv", curves)
    assert list(results.read_curve(tmp_path / "curve.csv")) == ["return/maze"]


def tables_on(page):
    """Its tables, as lists of lists of words."""
    found = [[]]
    for line in page.splitlines():
        if line.startswith("|"):
            found[-1].append([word.strip() for word in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[head, *body] for head, rule, *body in filter(None, found)]


@pytest.mark.slow
@needs_matplotlib
def test_the_report_s_numbers_are_those_of_evaluate_py(scored, score, command, capsys):
    score(scored, "--splits", "train", "1000", "--num-levels", 1, "--format", "markdown")
    games, every = tables_on(capsys.readouterr().out)
    command(results, "add", scored)
    command(results, "report")
    written = Path("results/README.md").read_text()
    scores, returns, kept = tables_on(written)
    (normalized,) = [line for line in every if line[0] == "normalized"]
    assert scores == [["agent", "steps", "seeds", "training levels", "test levels"], [AGENT, "20", "1", *normalized[3:5]]]
    means = [" / ".join(cell.split(" ")[0] for cell in line[3:5]) for line in games[1:]]
    assert returns == [["agent", "bigfish", "fruitbot"], [AGENT, *means]]
    own = json.loads((scored / "evaluation_easy_0_1.json").read_text())["code"]
    assert kept[1] == [AGENT, "1", "20", "easy", own, f"[{scored.name}]({scored.name}/)"]
    _, *numbers = csv.reader(Path("results/easy_greedy.csv").read_text().splitlines())
    assert "(easy_greedy.csv)" in written and ["bigfish", "return", AGENT, "", "1", *games[1][3:6]] in numbers
    assert ["all", "normalized", AGENT, "", "1", *normalized[3:]] in numbers
    assert "(easy_greedy.png)" in written and Path("results/easy_greedy.png").stat().st_size > 10_000


def about(script="srwm", **flags):
    """What a record says of a run with these flags, as far as it matters to its name."""
    flags = {name: f"--{name.replace('_', '-')} {value}" for name, value in flags.items()}
    return dict(script=f"impala_procgen_{script}.py", code="a", flags=flags, init_from=[], trained_games=["maze"],
                games=["maze"], file="checkpoint", validation=None)


@pytest.mark.parametrize("records, names", [
    ([about(entropy_cost=0.1)] * 2, ["srwm --entropy-cost 0.1"] * 2),  # evaluate.py says what differs alone
    ([about(total_steps=100), about("lstm", total_steps=100)], ["srwm", "lstm"]),
    ([about(total_steps=100), about()], ["srwm --total-steps 100", "srwm"]),
    ([about(distribution_mode="memory", num_levels=500)], ["srwm"]),
    ([about(batch_size=64, discounting=0.9, momentum=1, seed=2)], ["srwm, mine --momentum 1"]),
    ([about(batch_size=64)], ["srwm --batch-size 64"]),
    ([about(batch_size=64, discounting=0.9) | dict(parts=[dict(until=5, flags={}, code="a")])],
     ["srwm --batch-size 64 --discounting 0.9 (until step 5 without --batch-size without --discounting)"]),
    ([about(), about() | dict(code="b")], ["srwm code a", "srwm code b"]),
    ([about(), about() | dict(housekeeping="b")], ["srwm", "srwm housekeeping b"]),
    ([about(), about(momentum=1) | dict(code="b")], ["srwm", "srwm --momentum 1"]),  # of one version each
    ([about(total_steps=5), about(), about() | dict(code="b")], ["srwm --total-steps 5", "srwm code a", "srwm code b"]),
    ([about(gamma=1) | dict(parts=[dict(until=5, flags=dict(gamma="--gamma 1"), code="b")])], ["srwm --gamma 1"]),
    ([about() | dict(init_from=[about(exp_name="--a") | dict(games=["maze"], exp_name="x", code="b")])],
     ["srwm --init-from x (maze)"]),
    ([about(env="maze leaper maze", gamma=0) | dict(trained_games=["maze", "leaper", "maze"], games=["leaper", "maze"])],
     ["srwm, shares"]),
    ([about(env="leaper leaper maze", gamma=0) | dict(trained_games=["leaper", "leaper", "maze"], games=["leaper"])],
     ["srwm 2 x leaper, maze --gamma 0"]),
    ([about(batch_size=64, env="maze maze leaper", gamma=0)], ["srwm, both"]),
    ([about(momentum=1) | dict(trained_games=["maze", "leaper", "maze"], games=["leaper", "maze"])] * 2,
     ["srwm leaper, 2 x maze --momentum 1"] * 2),
    ([about(distribution_mode="memory") | dict(trained_games=["heist", "dodgeball"], games=["dodgeball", "heist"])],
     ["srwm"]),
])
def test_agents_are_named_by_what_differs_from_the_paper_s_settings(records, names):
    recipes = {"mine": "--batch-size 64 --discounting 0.9", "shares": "--env leaper maze maze --gamma 0",
               "both": "--gamma 0 --env maze leaper maze --batch-size 64"}
    assert tables.name_agents(records, recipes) == names


def scores(model, steps, value, seed=1, returns=(5, 10)):
    """A run that got `value` on each level of one training and one test split of a game with this range of returns."""
    record = dict(script=f"{model}.py", code="", flags={}, init_from=[], trained_games=["maze"], file="checkpoint",
                  validation=None, seed=seed, step=steps, distribution_mode="easy", num_levels=2, greedy=True, bf16=False)
    game = dict(maze=dict(range=returns, returns=[value, value]))
    records = [record | dict(start_level=first, column=column, games=game, mean=dict(mean_return=value))
               for first, column in ((0, "train"), (1000, "test"))]
    return results.Scored(Path(f"{model}_{seed}"), records, model)


def section(*runs, published=()):
    return page.Section("easy", list(runs), tables.tabulate(list(runs)), published)


def test_agents_of_as_many_steps_share_a_picture_and_are_compared_with_the_srwm():
    found = section(scores("lstm", 10**6, 9.0), scores("srwm", 10**6, 8.0), scores("ff", 2 * 10**6, 7.0),
                    scores("delta", 10**6, 6.5))
    assert found.pictures() == {"easy_2M.png": ["ff"], "easy_1M.png": ["lstm", "srwm", "delta"]}
    (differences,) = [tables_on(table) for table in map(found.differences, found.groups()) if table]
    assert [line[:2] for line in differences[0]] == [
        ["minus srwm", "training levels"], ["lstm", "0.200 [0.200, 0.200]"], ["delta", "-0.300 [-0.300, -0.300]"]]
    assert differences[0][1][3] == "0.000 [0.000, 0.000]"
    assert len([line for line in found.numbers().splitlines() if "difference" in line]) == 6


def test_steps_of_a_last_batch_beyond_a_million_make_no_other_group():
    found = section(scores("lstm", 3 * 10**8 + 2400, 9.0), scores("srwm", 3 * 10**8, 8.0), scores("ff", 301 * 10**6, 7.0))
    assert found.groups() == [["ff"], ["lstm", "srwm"]]
    words = {20: "20", 400_000: "400,000", 1_002_000: "1,002,000", 999_999: "1 M", 10**9 + 5: "1,000 M"}
    assert {steps: page.millions(steps) for steps in words} == words


def test_a_difference_of_single_levels_has_no_interval_whichever_agent_comes_first():
    runs = [scores("lstm", 1, 9.0), scores("srwm", 1, 8.0)]
    for record in (record for run in runs for record in run.records):
        record["games"]["maze"]["returns"] = record["games"]["maze"]["returns"][:1]
    for order in (runs, runs[::-1]):
        (table,) = tables_on(section(*order).differences(["lstm", "srwm"]))
        assert table[1] == ["lstm", "0.200", "0.200", "0.000"]


@pytest.mark.parametrize("returns, last", [((5, 10), "normalized"), (None, "gap")])
def test_a_table_of_games_without_a_range_has_no_column_for_normalized_returns(returns, last):
    games, *_ = tables.cells(tables.tabulate([scores("a", 1, 9.0, returns=returns)]))
    assert games[0][-1] == last


def test_an_agent_that_others_published_stands_where_its_test_score_belongs():
    other = dict(name="PPO", by="somebody", source="https://x.org", about="a caveat", seeds=3, steps=[1, 2 * 10**6],
                 normalized_return=dict(mean=dict(train=[0, 0.9], test=[0, 0.6])))
    best = other | dict(name="PPG", steps=[5 * 10**6], normalized_return=dict(mean=dict(test=[0.7])))
    del best["seeds"]
    found = section(scores("a", 10**6, 9.0), scores("b", 10**6, 7.0), published=[other, best])
    (table,) = tables_on(found.scores())
    by = "([published by somebody](https://x.org))"
    assert [line[0] for line in table] == ["agent", "a", f"PPG {by}", f"PPO {by}", "b"]
    assert [line[1:] for line in table[2:4]] == [["5 M in all", "", "", "0.700"], ["2 M in all", "3", "0.900", "0.600"]]
    assert "PPO and PPG: a caveat" in found.parts()


def test_the_readme_shows_the_page_s_first_table():
    (ours, *_), theirs = (tables_on((ROOT / path).read_text()) for path in ("results/README.md", "README.md"))
    (shown,) = [table for table in theirs if table[0] == ours[0]]
    assert [line[1:] for line in shown] == [line[1:] for line in ours]


def test_the_page_of_results_fits_a_page():
    """But for tables: of no more lines than there are runs, and without columns of dashes."""
    text = (ROOT / "results/README.md").read_text()
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
    assert max(map(len, tables_on(text))) <= 40 and "- / -" not in text
    assert set(re.findall(r"\]\((\w+\.\w+)\)", text)) == {path.name for path in (ROOT / "results").glob("*.[pc]??")}


def test_seeds_of_one_version_of_the_script_are_one_model_and_other_levels_another_table(scored, score, command):
    score(scored, "--splits", "1200", "--num-levels", 1, "--env", "fruitbot")
    own = json.loads((scored / "evaluation_easy_0_1.json").read_text())["code"]
    command(results, "add", scored, a_seed(scored, 2, own))
    found = results.tables_of(sorted(Path("results").iterdir()))
    assert {setting[2:]: [run.model for run in runs] for setting, runs in found.items()} == {
        (("bigfish", "fruitbot"), False, ((0, 1), (1000, 1))): [AGENT, AGENT],
        (("fruitbot",), False, ((1200, 1),)): [AGENT.replace("srwm", "srwm 2 games")] * 2}


@pytest.mark.slow
@needs_matplotlib
def test_versions_of_a_script_are_one_model_only_if_somebody_says_why(scored, command):
    def models():
        folders = sorted(path for path in Path("results").iterdir() if path.is_dir())
        return [run.model for runs in results.tables_of(folders).values() for run in runs]

    own = json.loads((scored / "evaluation_easy_0_1.json").read_text())["code"]
    command(results, "add", scored, a_seed(scored, 2, "12345678"))
    assert sorted(models()) == sorted([f"{AGENT} code {own}", f"{AGENT} code 12345678"])
    versions = [dict(codes=[own, "12345678"], why="They differ in a comment.")]
    Path("results/versions.json").write_text(json.dumps(versions))
    assert models() == [AGENT, AGENT]
    command(results, "report")
    assert f"Versions {own} and 12345678 count as one: They differ in a comment." in (
        " ".join(Path("results/README.md").read_text().split()))


def test_two_runs_of_one_seed_do_not_count_as_two(scored, command, capsys):
    own = json.loads((scored / "evaluation_easy_0_1.json").read_text())["code"]
    command(results, "add", scored, a_seed(scored, 1, own))
    ((*_, runs),) = results.tables_of(sorted(Path("results").iterdir())).items()
    assert len(runs) == 1 and f"has a seed of {AGENT} that is there already: 1" in capsys.readouterr().err


@pytest.mark.slow
def test_it_is_started_by_its_path_too_in_whatever_folder(tmp_path):
    words = [sys.executable, ROOT / "reporting" / "results.py", "report"]
    end = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert end.returncode == 2 and "results/ holds no scores" in end.stderr


def test_the_best_model_comes_first_with_all_its_seeds_and_returns_count_where_nothing_is_normalized():
    def run(model, path, **mean):
        records = [dict(mean=mean | dict(mean_return=value)) for value in (1.0, 2.0)]
        return results.Scored(Path(path), records, model)

    runs = [run("a", "1", normalized=0.3), run("b", "2", normalized=0.1), run("a", "3", normalized=0.1),
            run("b", "4", normalized=0.5), run("c", "5")]
    assert [scored.path.name for scored in results.best_first(runs)] == ["5", "2", "4", "1", "3"]


def test_no_level_counts_twice_and_splits_of_different_sizes_share_a_table(scored, command, capsys):
    record = json.loads((scored / "evaluation_easy_1000_1.json").read_text())
    for file, first, count in (("again", 1000, 1), ("more", 1000, 3), ("other", 1200, 2), ("overlapping", 1201, 2)):
        changed = record | dict(start_level=first, num_levels=count)
        (scored / f"evaluation_{file}.json").write_text(json.dumps(changed))
    command(results, "add", scored)
    capsys.readouterr()
    assert [levels for *_, levels in results.tables_of(Path("results").iterdir())] == [((0, 1), (1000, 3), (1200, 2))]
    left_out = re.findall(r"evaluation_(\w+).json has levels of", capsys.readouterr().err)
    assert sorted(left_out) == ["again", "easy_1000_1", "overlapping"]


def test_scores_in_bfloat16_are_another_table(scored, command):
    path = scored / "evaluation_easy_1000_1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(bf16=True)))
    command(results, "add", scored)
    assert [setting[3:] for setting in results.tables_of(Path("results").iterdir())] == [
        (False, ((0, 1),)), (True, ((1000, 1),))]


@pytest.mark.slow
@needs_matplotlib
def test_a_report_replaces_its_own_pictures_and_no_others(scored, command, refused):
    command(results, "add", scored)
    Path("results/mine.png").write_text("mine")
    page = Path("results/README.md")
    page.write_text("![learning curves and scores](old.png)\n")
    Path("results/old.png").write_text("old")
    command(results, "report")
    assert sorted(path.name for path in Path("results").glob("*.png")) == ["easy_greedy.png", "mine.png"]
    assert [path.name for path in Path("results").glob("*.csv")] == ["easy_greedy.csv"]
    before = page.read_text()
    Path("results", scored.name, "evaluation_easy_1000_1.json").write_text('{"games": ')
    refused(lambda: command(results, "report"), "evaluation_easy_1000_1.json is not a whole record of evaluate.py")
    assert page.read_text() == before and Path("results/easy_greedy.png").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"step": 20}'])
def test_other_files_of_a_run_are_no_records(content, scored, command, refused):
    (scored / "evaluation_of_mine.json").write_text(content)
    refused(lambda: command(results, "add", scored), "evaluation_of_mine.json is not a whole record of evaluate.py")


def test_a_record_of_an_earlier_version_that_names_only_the_ancestor_is_refused(scored, command, refused):
    path = scored / "evaluation_easy_1000_1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(init_from=["runs/older"])))
    refused(lambda: command(results, "add", scored), "evaluation_easy_1000_1.json is not a whole record of evaluate.py")


def test_scores_of_another_step_are_not_kept(scored, command, refused, capsys):
    path = scored / "evaluation_easy_1000_1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(step=10)))
    command(results, "add", scored)
    assert "evaluation_easy_1000_1.json is of step 10 and checkpoint.pt of step 20" in capsys.readouterr().err
    assert [kept.name for kept in Path("results", scored.name).glob("evaluation*")] == ["evaluation_easy_0_1.json"]
    checkpoint = torch.load(scored / "checkpoint.pt")
    torch.save(checkpoint | {"step": 40}, scored / "checkpoint.pt")
    with pytest.raises(SystemExit):
        command(results, "add", scored)
    assert "checkpoint.pt has no scores of step 40 yet" in capsys.readouterr().err


@pytest.mark.parametrize("words, expected", [
    ("add", "runs must be named"), ("add nowhere", "runs must be folders with a checkpoint.pt, got nowhere"),
    ("add RUN", "has no scores of step 20 yet"), ("report", "results/ holds no scores"),
    ("release RUN agent.pth", "target must end in .pt"),
])
def test_what_is_not_allowed_is_refused(words, expected, trained, command, refused):
    refused(lambda: command(results, *[trained if word == "RUN" else word for word in words.split()]), expected)
    assert not Path("results").exists()


# Agents to play with


@pytest.fixture
def released(scored, command, monkeypatch, capsys):
    monkeypatch.setattr(results, "NUM_STEPS", 40)
    command(results, "release", scored, "pretrained/agent.pt")
    capsys.readouterr()
    return Path("pretrained/agent.pt")


def test_a_release_is_the_weights_alone_and_its_scores_beside_it(scored, released):
    whole, weights = torch.load(scored / "checkpoint.pt"), torch.load(released)
    assert weights["optimizer"] == {} and released.stat().st_size < 5e6
    assert all((weights["model"][name] == tensor).all() for name, tensor in whole["model"].items())
    scores = json.loads(released.with_suffix(".json").read_text())["scores"]
    assert scores == [json.loads(path.read_text()) for path in sorted(scored.glob("evaluation*"))]


@pytest.mark.slow
def test_weights_alone_are_scored_like_their_run_and_leave_their_folder_alone(scored, released, score):
    before = {path: path.read_bytes() for path in released.parent.iterdir()}
    score(released, "--splits", "1000", "--num-levels", 1)
    assert {path: path.read_bytes() for path in released.parent.iterdir()} == before
    ours, theirs = (json.loads(path.read_text()) for path in (Path("runs/agent/evaluation_agent_easy_1000_1.json"),
                                                              scored / "evaluation_easy_1000_1.json"))
    assert ours["games"] == theirs["games"]


@pytest.mark.slow
def test_weights_alone_begin_a_new_run(released, train):
    run = train("--total-steps", 20, "--init-from", released, "--learning-rate", 0)
    new, old = (torch.load(path)["model"] for path in (run / "checkpoint.pt", released))
    assert all((new[name] == tensor).all() for name, tensor in old.items())


@pytest.mark.slow
def test_weights_alone_are_no_run_that_could_go_on(released, command, refused):
    refused(lambda: command(impala_procgen_srwm, "--resume", released), "--resume needs a run", "--init-from")


def replay(path):
    """The returns that a release has of some levels, and those that its weights get now."""
    run = runs.load_run(path, evaluate.Args(cuda=False, bf16=False))
    *levels, stored = zip(*json.loads(path.with_suffix(".json").read_text())["levels"])
    return playing.play(run.script, run.agent, run.args, list(zip(*levels))).tolist(), list(stored)


@pytest.mark.slow
def test_a_release_keeps_returns_that_its_weights_get_again(released, monkeypatch, few_slots):
    monkeypatch.setattr(results, "NUM_STEPS", 250)
    levels = results.play_levels(released)
    released.with_suffix(".json").write_text(json.dumps(dict(levels=levels)))
    now, stored = replay(released)
    assert now == stored and len(stored) > 0


@pytest.mark.parametrize("path", first_fast(*sorted((ROOT / "pretrained").glob("*.pt"))), ids=lambda path: path.stem)
def test_a_pretrained_agent_gets_the_returns_that_stand_beside_it(path, few_slots):
    now, stored = replay(path)
    assert now == stored and len(stored) > 0 and path.stat().st_size <= 5e6


@pytest.mark.slow
def test_the_page_of_results_is_made_of_the_files_beside_it(command, monkeypatch):
    monkeypatch.setattr(results.pictures, "plot", lambda *anything: None)
    shutil.copytree(ROOT / "results", "results")
    command(results, "report")
    for path in [Path("results/README.md"), *Path("results").glob("*.csv")]:
        assert path.read_text() == (ROOT / path).read_text()


@pytest.mark.parametrize("document", ["README.md", "docs/results.md"])
def test_every_score_in_the_documents_is_among_the_results(document):
    """In tables with its mark, by which it is clear or plausible."""
    text, files = (ROOT / document).read_text(), sorted((ROOT / "results").glob("*.csv"))
    kept = {cell for path in files for line in csv.reader(path.read_text().splitlines()) for cell in line}
    scores = re.findall(r"[-\d.]+(?: ± [\d.]+)? \[[^]a-z]+\]", text)
    assert len(scores) > 10 and [score for score in scores if score not in {cell.strip("*") for cell in kept}] == []
    tabled = re.findall(r"[-\d.]+(?: ± [\d.]+)? \[[^]a-z]+\][^ ]*(?= \|)", text)
    assert len(tabled) > 10 and [score for score in tabled if score.replace("\\", "") not in kept] == []
