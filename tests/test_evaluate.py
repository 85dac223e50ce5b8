"""Evaluation: every level once, the same numbers twice, the right statistics."""

import json

import numpy as np
import pytest
import torch

import evaluate
import impala_procgen_srwm as script


def results(run, name):
    return json.loads((run / name).read_text())


def test_a_checkpoint_is_scored_on_its_games_and_twice_alike(train, score, capsys):
    run = train("--total-steps", 20)
    capsys.readouterr()
    score("--start-level", 1000, "--num-levels", 3)
    first = (run / "evaluation_easy_1000_3.json").read_bytes()
    out = capsys.readouterr().out
    for word in ("bigfish", "fruitbot", "mean return", "std. error", "normalized", "mean "):
        assert word in out
    score("--start-level", 1000, "--num-levels", 3, "--checkpoint", run / "checkpoint.pt")
    assert (run / "evaluation_easy_1000_3.json").read_bytes() == first
    games = json.loads(first)["games"]
    assert list(games) == ["bigfish", "fruitbot"] and all(len(row["returns"]) == 3 for row in games.values())


def test_sampled_actions_and_other_games_and_modes(train, score):
    run = train("--total-steps", 20)
    score("--no-greedy", "--num-levels", 2, "--env", "maze", "heist", "--distribution-mode", "memory")
    found = results(run, "evaluation_memory_0_2_sampled.json")
    assert list(found["games"]) == ["maze", "heist"] and "normalized" not in found["mean"]


def test_the_newest_checkpoint_is_taken(train, score, capsys):
    train("--total-steps", 20, "--exp-name", "older")
    train("--total-steps", 20, "--exp-name", "newer")
    capsys.readouterr()
    score("--num-levels", 1)
    assert capsys.readouterr().out.startswith("runs/newer")


def test_returns_are_those_of_a_loop_over_single_levels(train):
    """Level by level, with an environment and a state of its own, in float32."""
    checkpoint = script.load_checkpoint(train("--total-steps", 20) / "checkpoint.pt", None)
    args = script.Args(**checkpoint["args"] | dict(cuda=False, bf16=False, carry_state=False, unroll_length=7))
    agent = script.Agent(args)
    script.load_weights(agent, checkpoint)
    pairs = [("maze", 3), ("maze", 4), ("fruitbot", 1003), ("leaper", 17)]
    returns = evaluate.play(agent, args, pairs, greedy=True, seed=1, device=torch.device("cpu"))
    for (game, level), ours in zip(pairs, returns):
        env = script.ProcgenGym3Env(1, game, num_levels=1, start_level=level, distribution_mode="easy", num_threads=0)
        assert env.get_info()[0]["level_seed"] == level
        total, step = 0.0, 0
        while True:
            reward, obs, first = env.observe()
            total += reward[0] if step else 0.0
            if step and first[0]:
                break
            if step % 7 == 0:
                state = agent.initial_state(1)
            with torch.no_grad():
                inputs = (torch.from_numpy(x)[None] for x in (obs["rgb"], reward, first))
                logits, _, state = agent(*inputs, state)
            env.act(logits[0].argmax(-1).int().numpy())
            step += 1
        assert ours == pytest.approx(total, abs=1e-5)


def test_statistics_of_known_returns():
    found = evaluate.summarize({"maze": [10.0, 0.0, 10.0, 10.0], "bigfish": [1.0, 1.0, 40.0, 40.0]}, "easy")
    assert found["games"]["maze"]["mean_return"] == 7.5 and found["games"]["maze"]["standard_error"] == pytest.approx(2.5)
    assert found["games"]["maze"]["normalized"] == 0.5 and found["games"]["bigfish"]["normalized"] == 0.5
    assert found["mean"] == {"mean_return": 14.0, "normalized": 0.5}
    assert np.isclose(found["games"]["bigfish"]["standard_error"], np.std([1, 1, 40, 40], ddof=1) / 2)


@pytest.mark.parametrize("words, expected", [
    ("--num-levels 0", "--num-levels must be positive"),
    ("--start-level -3", "--start-level must be at least 0"),
    ("--env pong", "--env must be one of"),
    ("--distribution-mode memory", "got bigfish"),
    ("--distribution-mode nightmare", "--distribution-mode must be one of"),
    ("--checkpoint missing.pt", "missing.pt: no such file"),
    ("--greed", "--greed"),
])
def test_bad_arguments_are_refused(words, expected, train, score, refused, capsys):
    train("--total-steps", 20)
    capsys.readouterr()
    refused(lambda: score(*words.split()), "evaluate.py: error: ", expected)


def test_no_checkpoint_at_all_is_refused(score, refused):
    refused(score, "--checkpoint is missing")


@pytest.mark.parametrize("name", ["/etc/passwd", "../evil.py", "nowhere.py", "README.md"])
def test_a_script_that_is_not_beside_evaluate_is_refused(name, train, score, refused, capsys):
    path = train("--total-steps", 20) / "checkpoint.pt"
    torch.save(torch.load(path) | {"script": name}, path)
    capsys.readouterr()
    refused(score, name, "is not a Python file beside evaluate.py")
