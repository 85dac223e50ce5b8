"""Evaluation: every level once, the same numbers twice, the right statistics."""

import json
from dataclasses import replace

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


class Clock(torch.nn.Module):
    """Acts by the number of steps since its state was zero: seven steps to the right, seven to the left, and so on."""

    def initial_state(self, batch_size):
        return (torch.zeros(batch_size),)

    def forward(self, obs, reward, done, state):
        right = state[0] % 14 < 7
        return torch.nn.functional.one_hot(torch.where(right, 7, 1), 15).float()[None], None, (state[0] + 1,)


def play_alone(agent, game, level, reset_every):
    """The return of one greedy episode in an environment of its own."""
    env = script.ProcgenGym3Env(1, game, num_levels=1, start_level=level, distribution_mode="easy", num_threads=0)
    assert env.get_info()[0]["level_seed"] == level
    total, step = 0.0, 0
    while True:
        reward, obs, first = env.observe()
        if step > 0:
            total += reward[0]
            if first[0]:
                return total
        if step % reset_every == 0:
            state = agent.initial_state(1)
        with torch.no_grad():
            logits, _, state = agent(*(torch.from_numpy(x)[None] for x in (obs["rgb"], reward, first)), state)
        env.act(logits[0].argmax(-1).int().numpy())
        step += 1


@pytest.mark.parametrize("agent", [Clock(), script.Agent(script.Args(cuda=False, bf16=False))], ids=["clock", "srwm"])
@pytest.mark.parametrize("carry_state", [True, False])
def test_returns_are_those_of_a_loop_over_single_levels(agent, carry_state):
    """In float32, level by level; without carried state, the state is reset every unroll_length steps."""
    args = script.Args(cuda=False, bf16=False, carry_state=carry_state, unroll_length=7)
    pairs = [("maze", 3), ("fruitbot", 1003), ("starpilot", 5), ("bigfish", 17)]
    returns = evaluate.play(agent, args, pairs, greedy=True, seed=1, device=torch.device("cpu"))
    assert returns.tolist() == [play_alone(agent, *pair, 10**6 if carry_state else 7) for pair in pairs]


def test_a_state_that_is_not_carried_changes_what_is_played():
    args = script.Args(cuda=False, bf16=False, unroll_length=7)
    pairs = [("fruitbot", level) for level in range(4)]
    carried, reset = (evaluate.play(Clock(), replace(args, carry_state=carry), pairs, True, 1, torch.device("cpu"))
                      for carry in (True, False))
    assert carried.tolist() != reset.tolist()


def test_a_checkpoint_of_other_machines_and_versions_is_scored(train, score):
    """Given by its folder; with a batch that this machine's default actors could not fill, and an argument long gone."""
    run = train("--total-steps", 20)
    checkpoint = torch.load(run / "checkpoint.pt")
    changes = dict(num_actors=None, num_envs=2, batch_size=500, an_argument_long_gone=1)
    torch.save(checkpoint | {"args": checkpoint["args"] | changes}, run / "checkpoint.pt")
    score("--num-levels", 1, "--checkpoint", run)
    assert (run / "evaluation_easy_0_1.json").exists()


def test_a_missing_system_library_is_named_with_its_debian_package(train, score, refused, monkeypatch, capsys):
    train("--total-steps", 20)

    def no_engine(*args, **options):
        raise OSError("libGL.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(script, "ProcgenGym3Env", no_engine)
    capsys.readouterr()
    refused(score, "libGL.so.1", "apt install libgl1 libglib2.0-0")


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
