"""Evaluation: every level once, the same numbers twice, in whatever company, and one line for what is not allowed."""

import csv
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FRUITBOT, first_fast

import evaluate
import impala_procgen_lstm
import impala_procgen_srwm as script
from housekeeping import engine
from reporting import playing, runs, tables


def results(run, name):
    return json.loads((run / name).read_text())


# One run


def test_a_checkpoint_is_scored_on_its_games_and_twice_alike(trained, score, capsys):
    capsys.readouterr()
    score("--start-level", 1000, "--num-levels", 2)
    first, out = (trained / "evaluation_easy_1000_2.json").read_bytes(), capsys.readouterr().out
    for word in ("bigfish", "fruitbot", "test", "all games", "normalized IQM", "levels 1000 to 1001 (test)"):
        assert word in out
    score(trained.relative_to(Path.cwd()), "--start-level", 1000, "--num-levels", 2, "--replay")
    assert (trained / "evaluation_easy_1000_2.json").read_bytes() == first and capsys.readouterr().out == out
    games = json.loads(first)["games"]
    assert list(games) == ["bigfish", "fruitbot"] and all(len(row["returns"]) == 2 for row in games.values())


@pytest.mark.slow
def test_the_papers_splits_have_a_file_each_and_share_the_tables(trained, score, capsys):
    capsys.readouterr()
    score(trained, "--splits", "paper", "--num-levels", 1, "--format", "json", *FRUITBOT)
    found = json.loads(capsys.readouterr().out)
    records = (results(trained, f"evaluation_fruitbot_easy_{first}_1.json") for first in (0, 1000, 1200, 1400))
    train, *tests = (record["games"]["fruitbot"]["returns"][0] for record in records)
    value = {(row["game"], row["measure"], row["split"]): row["value"] for row in found["entries"]}
    assert value["fruitbot", "return", "train"] == pytest.approx(train)
    assert value["fruitbot", "return", "test"] == pytest.approx(np.mean(tests))
    assert value["fruitbot", "return", "gap"] == pytest.approx(train - np.mean(tests))


def test_sampled_actions_and_other_games_and_modes(trained, score):
    score("--no-greedy", "--num-levels", 2, "--env", "dodgeball", "caveflyer", "--distribution-mode", "memory")
    found = results(trained, "evaluation_dodgeball_caveflyer_memory_0_2_sampled_1.json")
    assert list(found["games"]) == ["dodgeball", "caveflyer"] and "normalized" not in found["mean"]


@pytest.mark.slow
def test_the_newest_checkpoint_is_taken(train, score, capsys):
    train("--total-steps", 20, "--exp-name", "older")
    train("--total-steps", 20, "--exp-name", "newer")
    capsys.readouterr()
    score("--num-levels", 1, *FRUITBOT)
    assert capsys.readouterr().out.startswith("runs/newer")


@pytest.mark.slow
def test_a_checkpoint_of_other_machines_and_versions_is_scored(trained, score):
    """Given by its folder; with a batch that this machine's default actors could not fill, and an argument long
    gone."""
    checkpoint = torch.load(trained / "checkpoint.pt")
    changes = dict(num_actors=None, num_envs=2, batch_size=500, an_argument_long_gone=1)
    torch.save(checkpoint | {"args": checkpoint["args"] | changes}, trained / "checkpoint.pt")
    score(trained, "--num-levels", 1, *FRUITBOT)
    assert (trained / "evaluation_fruitbot_easy_0_1.json").exists()


@pytest.mark.slow
def test_what_was_played_is_not_played_again_but_with_replay(trained, score, capsys, monkeypatch):
    score(trained, "--splits", "0", "--num-levels", 2)
    expected, played, play = capsys.readouterr().out, [], playing.play
    monkeypatch.setattr(playing, "play", lambda script, agent, args, levels, *rest: played.append(len(levels))
                        or play(script, agent, args, levels, *rest))
    score(trained, "--splits", "0", "--num-levels", 2)
    out, error = capsys.readouterr()
    assert out == expected and played == []
    assert f"note: not played again (--replay does): {trained}/evaluation_easy_0_2.json" in error
    score(trained, "--splits", "0", "1000", "--num-levels", 2)  # of two games, only the split that is new
    score(trained, "--splits", "0", "--num-levels", 2, "--replay")
    assert played == [4, 4]


@pytest.mark.slow
def test_several_episodes_of_a_level_have_a_file_of_their_own_and_are_not_played_again(trained, score, capsys):
    words = trained, "--start-level", 8, "--num-levels", 1, "--no-greedy", *FRUITBOT
    capsys.readouterr()
    score(*words, "--episodes", 3)
    name = "evaluation_fruitbot_easy_8_1_sampled_1_episodes_3.json"
    found, (out, _) = results(trained, name), capsys.readouterr()
    assert found["episodes"] == 3 and len(found["games"]["fruitbot"]["episode_returns"][0]) == 3
    assert "easy, level 8 (train), 3 episodes of each" in out
    score(*words, "--episodes", 3)
    again, error = capsys.readouterr()
    assert again == out and f"note: not played again (--replay does): {trained}/{name}" in error
    score(*words)
    (first,) = results(trained, "evaluation_fruitbot_easy_8_1_sampled_1.json")["games"]["fruitbot"]["returns"]
    assert first == found["games"]["fruitbot"]["episode_returns"][0][0]


@pytest.mark.parametrize("changed", first_fast("weights", "player", "greedy", "bf16"))
def test_what_other_weights_code_or_actions_have_played_is_played_anew(changed, trained, score):
    score(trained, "--num-levels", 1)
    path = trained / "evaluation_easy_0_1.json"
    right = json.loads(path.read_text())
    games = {game: row | dict(returns=[-7.0]) for game, row in right["games"].items()}
    path.write_text(json.dumps(right | {changed: "another", "games": games}))
    score(trained, "--num-levels", 1)
    assert json.loads(path.read_text()) == right


@pytest.mark.slow
def test_scores_in_bfloat16_and_in_float32_have_a_file_each(trained, score):
    score(trained, "--num-levels", 1)
    score(trained, "--num-levels", 1, "--bf16", True)
    assert [results(trained, f"evaluation_easy_0_1{end}.json")["bf16"] for end in ("", "_bf16")] == [False, True]


@pytest.mark.slow
def test_a_change_of_script_or_kernels_is_noted_for_weights_alone_too(trained, score, tmp_path, capsys):
    checkpoint = torch.load(trained / "checkpoint.pt")
    (part,) = checkpoint["history"]
    zeros = "0" * 64
    for name, changes in (("same", {}), ("other", dict(sha256=zeros)), ("both", dict(sha256=zeros, srwm_cuda=zeros))):
        torch.save(checkpoint | dict(optimizer={}, history=[part | changes]), tmp_path / f"{name}.pt")
        capsys.readouterr()
        score(tmp_path / f"{name}.pt", "--num-levels", 1)
        notes = [line for line in capsys.readouterr().err.splitlines() if "version" in line]
        changed = dict(same=None, other="impala_procgen_srwm.py", both="impala_procgen_srwm.py and srwm_cuda")[name]
        note = f"note: {tmp_path}/{name}.pt was trained with another version of {changed}"
        assert notes == [note] * (changed is not None)


# Playing


class Clock(torch.nn.Module):
    """Acts by the number of steps since its state was zero: seven steps to the right, seven to the left, and so on."""

    def initial_state(self, batch_size):
        return (torch.zeros(batch_size, 1),)

    def forward(self, obs, reward, done, state):
        right = state[0][:, 0] % 14 < 7
        return torch.nn.functional.one_hot(torch.where(right, 7, 1), 15).float()[None], None, (state[0] + 1,)


class Diverging(Clock):
    """The same, but its state counts as diverged when it is 10."""

    state_bound = 10.0


class Witness(torch.nn.Module):
    """Acts by a checksum of all that it was ever shown: frames, rewards, beginnings of episodes, in their order."""

    def initial_state(self, batch_size):
        return (torch.zeros(batch_size, 1, dtype=torch.int64),)

    def forward(self, obs, reward, done, state):
        shown = obs[0].long().sum((1, 2, 3)) + 7 * (100 * reward[0]).round().long() + 13 * done[0].long()
        checksum = (31 * state[0] + shown[:, None]) % 100_003
        return torch.nn.functional.one_hot(checksum[:, 0] % 15, 15).float()[None], None, (checksum,)


def play_alone(agent, game, level, unroll_length=7, carry_state=True):
    """The return of one greedy episode in an environment of its own."""
    env = script.ProcgenGym3Env(1, game, num_levels=1, start_level=level, distribution_mode="easy", num_threads=0)
    assert env.get_info()[0]["level_seed"] == level
    total, step, state = 0.0, 0, None
    while True:
        reward, obs, first = env.observe()
        if step > 0:
            total += float(reward[0])  # not in float32
            if first[0]:
                return total
        if step % unroll_length == 0:
            diverged = step > 0 and not max(part.abs().max() for part in state) < getattr(agent, "state_bound", np.inf)
            if step == 0 or not carry_state or diverged:
                state = agent.initial_state(1)
        with torch.no_grad():
            logits, _, state = agent(*(torch.from_numpy(x)[None] for x in (obs["rgb"], reward, first)), state)
        env.act(logits[0].argmax(-1).int().numpy())
        step += 1


LEVELS = [("fruitbot", 1003), ("dodgeball", 3), ("bossfight", 1400), ("fruitbot", 8), ("fruitbot", 9), ("chaser", 0)]
torch.manual_seed(1)  # of which the episodes are short
SRWM = script.Agent(script.Args(cuda=False, bf16=False))


@pytest.mark.parametrize("agent", [Clock(), Diverging(), Witness(), pytest.param(SRWM, marks=pytest.mark.slow)],
                         ids=["clock", "diverging", "witness", "srwm"])
@pytest.mark.parametrize("carry_state", [True, False])
def test_returns_are_those_of_a_loop_over_single_levels(agent, carry_state, few_slots):
    """In float32, level by level. Every unroll_length steps a state is reset that has diverged, or is not to be
    carried."""
    args = script.Args(cuda=False, bf16=False, carry_state=carry_state, unroll_length=7)
    returns = playing.play(script, agent, args, LEVELS)
    assert returns.tolist() == [play_alone(agent, *level, carry_state=carry_state) for level in LEVELS]


@pytest.mark.slow
def test_a_run_s_scores_are_those_of_its_weights_on_the_levels_of_the_split(train, score):
    run = train("--total-steps", 20, "--seed", 5)
    score("--env", "dodgeball", "fruitbot", "--start-level", 1003, "--num-levels", 2)
    agent = script.Agent(script.Args(cuda=False, bf16=False))
    agent.load_state_dict(torch.load(run / "checkpoint.pt")["model"])
    for game, found in results(run, "evaluation_dodgeball_fruitbot_easy_1003_2.json")["games"].items():
        assert found["returns"] == [play_alone(agent, game, level) for level in (1003, 1004)]


def test_a_state_that_is_not_carried_changes_what_is_played(few_slots):
    args, levels = script.Args(cuda=False, bf16=False, unroll_length=7), [("fruitbot", level) for level in range(4)]
    carried, reset = (playing.play(script, Clock(), replace(args, carry_state=carry), levels)
                      for carry in (True, False))
    assert carried.tolist() != reset.tolist()


@pytest.mark.parametrize("greedy, bf16", [pytest.param(True, True, marks=pytest.mark.slow), (False, False)],
                         ids=["greedy, bfloat16", "sampled, float32"])
def test_an_episode_is_the_same_in_whatever_company(greedy, bf16, few_slots):
    """Even where rounding or chance decides: batches are of one size, and random numbers belong to game and level."""
    args = script.Args(cuda=False, bf16=bf16)
    agent = script.Agent(args)
    agent.load_state_dict(SRWM.state_dict())
    together = playing.play(script, agent, args, LEVELS, greedy)
    alone = [playing.play(script, agent, args, [level], greedy).item() for level in LEVELS[1:3]]
    assert together[1:3].tolist() == alone


@pytest.mark.slow
@pytest.mark.parametrize("greedy", [True, False])
def test_turns_and_the_engine_s_threads_change_nothing(greedy, few_slots, monkeypatch):
    """On a GPU a thread plays several policies by turns, and the engine's threads step their environments."""
    class Event(torch.cpu.Event):
        def query(self):
            return False  # as on a GPU, so that several policies act at once

    args = script.Args(cuda=False, bf16=False)
    inline = playing.play(script, SRWM, args, LEVELS, greedy)
    monkeypatch.setattr(playing.srwm_cuda, "record_event", Event)
    monkeypatch.setattr(playing, "ENGINE_THREADS", {"cpu": 2})
    monkeypatch.setattr(playing, "TURNS", {"cpu": 3})
    monkeypatch.setattr(playing, "num_cores", lambda: 1)
    assert playing.play(script, SRWM, args, LEVELS, greedy).tolist() == inline.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("greedy", [True, False])
def test_on_a_gpu_too_an_episode_is_the_same_in_whatever_company_and_order(greedy):
    args = script.Args(cuda=True, bf16=False)
    agent = script.Agent(args).cuda()
    levels = [(game, level) for game in ("fruitbot", "bigfish", "starpilot") for level in range(1000, 1060)]
    together = dict(zip(levels, playing.play(script, agent, args, levels, greedy)))
    some = levels[::-7]
    assert [together[level] for level in some] == playing.play(script, agent, args, some, greedy).tolist()


def test_with_channels_first_convolutions_compute_the_same():
    agent, other = (script.Agent(script.Args(cuda=False, bf16=False)) for _ in range(2))
    other.load_state_dict(agent.state_dict())
    runs.channels_first(other)
    seen = []
    for module in other.encoder.cnn.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.extend([*inputs, module.weight, output]))
    frames = torch.randint(256, (3, 64, 64, 3), dtype=torch.uint8)
    torch.testing.assert_close(other.encoder(frames), agent.encoder(frames))
    assert len(seen) == 3 * 15 and all(x.is_contiguous() for x in seen)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_where_every_state_counts_as_diverged_none_is_carried(device, few_slots, monkeypatch):
    monkeypatch.setitem(playing.SLOTS, "cuda", 32)
    args = script.Args(cuda=device == "cuda", bf16=False, unroll_length=7)
    agent = script.Agent(args).to(device)
    reset = playing.play(script, agent, replace(args, carry_state=False), LEVELS)
    agent.state_bound = 0.0
    assert playing.play(script, agent, args, LEVELS).tolist() == reset.tolist()


def test_each_step_of_an_episode_has_a_random_number_of_its_own(few_slots, monkeypatch):
    """However long it is: those of level 8 of fruitbot, game number 1, come from a generator of its own."""
    policy = playing.Policy(script, Clock(), script.Args(cuda=False), greedy=False, seed=3)
    monkeypatch.setattr(policy, "forward", lambda: torch.zeros(4))  # what is drawn does not depend on what is played
    policy.begin_episode(2, "fruitbot", 8)
    drawn = [policy.act() is None or policy.uniform[2] for _ in range(9000)]
    assert drawn == np.random.default_rng([3, 1, 8]).random(9000, dtype=np.float32).tolist()


def test_other_seeds_sample_other_actions(few_slots):
    args, levels = script.Args(cuda=False, bf16=False), [("fruitbot", 8), ("fruitbot", 9)]
    first, second = (playing.play(script, SRWM, args, levels, greedy=False, seed=seed).tolist() for seed in (1, 2))
    assert first != second


@pytest.mark.slow
def test_episodes_of_a_level_differ_the_first_is_that_of_one_and_all_are_the_same_in_any_company(few_slots):
    args, levels = script.Args(cuda=False, bf16=False), [("fruitbot", 8), ("fruitbot", 9)]
    _, episodes = playing.play(script, SRWM, args, levels, greedy=False, episodes=3).reshape(2, 3).tolist()
    assert playing.play(script, SRWM, args, levels[1:], greedy=False, episodes=3).tolist() == episodes
    assert playing.play(script, SRWM, args, levels[1:], greedy=False).tolist() == episodes[:1]
    assert len(set(episodes)) > 1


@pytest.mark.slow
def test_a_game_with_several_environments_in_training_is_scored_once(train, score, capsys):
    run = train("--env", "fruitbot", "leaper", "fruitbot", "--num-envs", 6, "--multi-env", None, "--total-steps", 20)
    assert ": 2 x fruitbot, leaper (easy), " in capsys.readouterr().out
    score(run, "--num-levels", 1)
    (record,) = (json.loads(file.read_text()) for file in run.glob("evaluation*.json"))
    assert list(record["games"]) == ["fruitbot", "leaper"]
    assert record["trained_games"] == ["fruitbot", "leaper", "fruitbot"]


@pytest.mark.parametrize("mode, games", [("easy", ["maze", "dodgeball"]), ("memory", ["dodgeball", "maze"])])
def test_runs_are_played_at_their_games_in_the_order_of_the_mode_whatever_that_of_their_env(mode, games, trained):
    checkpoint = torch.load(trained / "checkpoint.pt")
    for env in (["maze", "dodgeball", "maze"], ["dodgeball", "maze"]):
        checkpoint["args"] |= dict(multi_env=None, env=env, num_envs=6)
        torch.save(checkpoint, trained / "checkpoint.pt")
        run = runs.load_run(trained, runs.Choice(distribution_mode=mode, cuda=False, bf16=False))
        assert run.games == games and run.about["trained_games"] == env


def test_a_cpu_computes_batches_of_the_slots_in_use_alone(few_slots, monkeypatch):
    policy = playing.Policy(script, Witness(), script.Args(cuda=False), greedy=True, seed=1)
    sizes, forward = [], Witness.forward
    monkeypatch.setattr(Witness, "forward", lambda self, obs, *rest: sizes.append(obs.shape[1]) or forward(self, obs, *rest))
    for slots, batches in (([], []), ([3], [2]), ([0], [2]), ([1], [2, 2])):
        for slot in slots:
            policy.begin_episode(slot, "maze", 0)
        sizes.clear()
        policy.act()
        assert sizes == batches


def test_levels_are_those_of_the_mode():
    args = script.Args(cuda=False, distribution_mode="hard")
    assert playing.make_level(script, args, "maze", 1234).get_info()[0]["level_seed"] == 1234


class Stream(io.StringIO):
    """A terminal, or a file, that keeps all that is written."""

    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_one_line_that_says_how_long_it_takes_yet(terminal, few_slots, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(terminal))
    playing.play(script, Clock(), script.Args(cuda=False), [("maze", level) for level in range(4)], name="runs/A")
    states = sys.stderr.getvalue().split("\r")
    assert "\n" not in "".join(states[:-1]) and states[-1].endswith("\n")
    assert states[-1].startswith("100%") and states[-1].rstrip().endswith("| runs/A")
    assert "4 of 4 episodes" in states[-1] and "steps/s" in states[-1]


def test_progress_moves_while_nothing_ends(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(True))
    line = playing.show_progress("runs/A", "episodes", total=4)
    line.update(3)
    for _ in range(2):
        before = sys.stderr.getvalue()
        time.sleep(line.mininterval)
        line.update(0)
        assert "75%" in sys.stderr.getvalue()[len(before):]


def test_a_long_name_leaves_room_for_the_time_left(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(True))
    line = playing.show_progress("runs/" + "a" * 80, "episodes", total=4)
    line.dynamic_ncols, line.ncols = None, 80
    line.update(1)
    line.refresh()
    state = sys.stderr.getvalue().split("\r")[-1]
    assert "left | runs/aaa" in state and len(state) == 80


def test_in_a_file_progress_is_seldom_written(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(False))
    for _ in playing.show_progress("runs/A", "episodes", range(100_000)):
        pass
    assert sys.stderr.getvalue().count("runs/A") <= 3  # the begin, the end, and once more on a slow machine


def test_nobody_has_to_read_the_progress(few_slots, monkeypatch):
    stream = Stream(True)
    monkeypatch.setattr(sys, "stderr", stream)
    begin = playing.show_progress

    def then_full(*words, **options):
        line = begin(*words, **options)
        stream.write = lambda text: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        return line

    monkeypatch.setattr(playing, "show_progress", then_full)
    assert len(playing.play(script, Clock(), script.Args(cuda=False), [("fruitbot", 8), ("fruitbot", 9)])) == 2


# Splits, models and formats


def columns(words, mode="easy", games=("maze",), **trained):
    args = evaluate.Args(splits=tuple(words.split()), num_levels=trained.pop("count", 200))
    return runs.choose_splits(args, mode, list(games), script, [(script.Args(**trained), ["maze", "heist"])])


def test_the_training_levels_are_a_runs_own():
    test = [(first, 200, "test") for first in (1000, 1200, 1400)]
    assert columns("paper") == [(0, 200, "train"), *test] == columns("train test") == columns("0 1000 1200 1400")
    assert columns("train", num_levels=500) == [(0, 200, "train")]
    assert columns("train", start_level=8, num_levels=1) == [(8, 1, "train")]
    assert columns("paper", num_levels=500, count=20)[:2] == [(0, 20, "train"), (1000, 20, "test")]


def test_levels_on_which_the_best_weights_were_chosen_are_no_test():
    trained = script.Args(valid_num_levels=50, valid_start_level=1100)
    for is_best, mode, expected in ((True, "easy", ["validation", "test"]), (False, "easy", ["test", "test"]),
                                    (True, "hard", ["test", "test"])):
        splits = runs.choose_splits(evaluate.Args(splits=("1000", "1200")), mode, ["maze"], script,
                                    [(trained, ["maze"])], is_best)
        assert [split.column for split in splits] == expected


def test_levels_that_were_trained_on_are_no_test():
    assert {split.column for split in columns("paper", num_levels=0)} == {"train"}
    assert columns("100") == [(100, 200, "mixed")]
    assert columns("0", mode="hard") == [(0, 200, "test")]
    assert columns("0", games=["miner"]) == [(0, 200, "test")]
    assert columns("0", games=["maze", "miner"]) == [(0, 200, "mixed")]


@pytest.mark.slow
def test_runs_that_share_everything_but_the_seed_are_one_model(train, score, capsys):
    runs = [train("--total-steps", 20, "--exp-name", name, *words) for name, *words in (
        ("a", "--seed", 1), ("b", "--seed", 2), ("c", "--seed", 1, "--no-carry-state"))]
    runs.append(train("--total-steps", 20, script=impala_procgen_lstm))
    capsys.readouterr()
    score(*runs, "--num-levels", 1, "--format", "csv", *FRUITBOT)
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {(row["model"], row["seeds"]) for row in rows if not row["minus"]} == {
        ("srwm", "2"), ("srwm --no-carry-state", "1"), ("lstm", "1")}
    assert [(row["model"], row["minus"]) for row in rows if row["minus"]] == [
        ("srwm", "srwm --no-carry-state"), ("srwm", "lstm"), ("srwm --no-carry-state", "lstm")]
    assert {bool(row["std"]) for row in rows if row["seeds"] == "2"} == {True}
    assert {bool(row["std"]) for row in rows if row["seeds"] == "1"} == {False}


def test_levels_that_were_seen_before_fine_tuning_are_no_test():
    history = [(script.Args(start_level=2000), ["maze"]), (script.Args(), ["maze", "heist"])]
    args = evaluate.Args(splits=("train", "0", "100", "1000"), num_levels=100)
    splits = runs.choose_splits(args, "easy", ["maze"], script, history)
    assert splits == [(0, 100, "train"), (100, 100, "train"), (1000, 100, "test"), (2000, 100, "train")]
    assert runs.choose_splits(args, "easy", ["maze", "heist"], script, history)[-1] == (2000, 100, "mixed")


@pytest.mark.slow
def test_fine_tuned_runs_are_a_model_of_their_own(train, score, capsys, tmp_path):
    parents = [train("--total-steps", 20, "--exp-name", "parent", "--seed", seed) for seed in (1, 2)]
    runs = [train("--total-steps", 20, "--init-from", parent, "--seed", seed, "--start-level", 500)
            for seed, parent in enumerate(parents, 1)]
    runs += [train("--total-steps", 20, "--seed", 3, "--start-level", 500)]
    capsys.readouterr()
    score(*runs, "--splits", "0", "--num-levels", 1, "--format", "csv", *FRUITBOT)
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    before = "--init-from parent (2 games, --total-steps 20, --unroll-length 5, --batch-size 4)"
    assert {(row["model"], row["seeds"], row["split"]) for row in rows} == {
        (f"srwm {before}", "2", "train"), ("srwm", "1", "test")}


@pytest.mark.slow
def test_runs_fine_tuned_from_runs_that_learned_otherwise_are_no_seeds_of_one_model(train, score, capsys):
    parents = [train("--total-steps", 20), train("--total-steps", 20, "--seed", 2, "--start-level", 500)]
    runs = [train("--total-steps", 20, "--init-from", parent, "--seed", seed, "--start-level", 900)
            for seed, parent in enumerate(parents, 1)]
    capsys.readouterr()
    score(*runs, "--splits", "0", "--num-levels", 1, "--format", "csv", *FRUITBOT)
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {("--start-level 500" in row["model"], row["seeds"], row["split"]) for row in rows} == {
        (False, "1", "train"), (True, "1", "test")}


@pytest.mark.slow
def test_a_seed_counts_once_and_a_run_that_is_not_finished_is_another_model(train, score, capsys):
    runs = [train("--total-steps", 20, "--exp-name", f"run_{seed}", "--seed", seed) for seed in (1, 2, 3)]
    shutil.copytree(runs[0], "copy")
    checkpoint = torch.load(runs[2] / "checkpoint.pt")
    torch.save(checkpoint | {"step": 10}, runs[2] / "checkpoint.pt")
    capsys.readouterr()
    score(*runs, "copy", "--num-levels", 1, "--env", "fruitbot", "--format", "csv")
    out, error = capsys.readouterr()
    assert "note: left out, copy/checkpoint.pt has a seed of srwm that is there already: 1\n" in error
    rows = list(csv.DictReader(out.splitlines()))
    assert {(row["model"], row["seeds"]) for row in rows if not row["minus"]} == {
        ("srwm", "2"), ("srwm at step 10", "1")}


@pytest.mark.slow
def test_a_run_that_was_resumed_with_other_arguments_is_no_seed_of_one_that_had_them_all_along(
        train, score, command, capsys):
    words = "--total-steps", 60, "--learning-rate", 0.003, "--entropy-cost", 0.1
    runs = [train("--total-steps", 60, "--seed", 2), train("--total-steps", 40, *words[2:])]
    command(script, "--resume", runs[1], "--total-steps", 60, "--learning-rate", 6e-4, "--entropy-cost", 0.01)
    runs.append(train(*words, "--seed", 3))
    capsys.readouterr()
    score(*runs, "--num-levels", 1, "--env", "fruitbot", "--format", "csv")
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {(row["model"], row["seeds"]) for row in rows if not row["minus"]} == {
        ("srwm", "1"), ("srwm --learning-rate 0.003 --entropy-cost 0.1", "1"),
        ("srwm (until step 40 --total-steps 40 --learning-rate 0.003 --entropy-cost 0.1)", "1")}


@pytest.mark.slow
def test_a_run_that_was_resumed_with_the_same_arguments_is_a_seed_like_any_other(train, score, command, capsys):
    runs = [train("--total-steps", 60, "--seed", 2), train("--total-steps", 60, "--save-extra-checkpoint", 20)]
    command(script, "--resume", runs[1] / "checkpoint_20.pt", "--log-interval", 1)
    assert [part["step"] for part in torch.load(runs[1] / "checkpoint.pt")["history"]] == [0, 20]
    capsys.readouterr()
    score(*runs, "--num-levels", 1, "--env", "fruitbot", "--format", "csv")
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {(row["model"], row["seeds"]) for row in rows} == {("srwm", "2")}


def test_tables_are_printed_even_if_a_runs_folder_cannot_be_written(trained, score, capsys):
    (trained / "evaluation_fruitbot_easy_0_1.json").mkdir()
    capsys.readouterr()
    score("--num-levels", 1, *FRUITBOT)
    printed = capsys.readouterr()
    assert "not written: " in printed.err and "evaluation_fruitbot_easy_0_1.json" in printed.err
    assert "normalized" in printed.out


@pytest.mark.slow
def test_another_file_of_a_run_is_another_model_with_files_of_its_own(train, score, capsys):
    run = train("--total-steps", 20, "--valid-num-levels", 9)
    (run / "best.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    capsys.readouterr()
    score(run, run / "best.pt", "--num-levels", 1, "--format", "markdown", *FRUITBOT)
    out = capsys.readouterr().out
    assert "| fruitbot | srwm |" in out and "| fruitbot | srwm best validated on levels 500 to 508 |" in out
    assert out.count("chosen by validation on levels 500 to 508") == 1
    assert (run / "evaluation_best_fruitbot_easy_0_1.json").exists()


# Statistics


ABOUT = dict(file="checkpoint", script="impala_procgen_srwm.py", code="", flags={}, init_from=[],
             trained_games=["maze", "bigfish"], seed=1, step=1000, bf16=False, distribution_mode="easy", num_levels=2,
             greedy=True, validation=None)
RANGES = {"maze": (5, 10), "bigfish": (1, 40)}
PART = dict(until=400, flags={}, code="b", processes=1)


def known_run(model, returns):
    """A run of two games, scored on one training and two test splits."""
    about = ABOUT | dict(script=f"impala_procgen_{model}.py")
    records = [about | dict(start_level=first, column=column) | tables.summarize(dict(zip(RANGES, split)), RANGES)
               for (first, column), split in zip([(0, "train"), (1000, "test"), (1200, "test")], returns)]
    return SimpleNamespace(path=Path(f"runs/{model}/checkpoint.pt"), model=model, records=records)


RUNS = [known_run("srwm", [[[10.0, 10.0], [40.0, 40.0]], [[10.0, 10.0], [1.0, 1.0]], [[5.0, 5.0], [1.0, 1.0]]]),
        known_run("srwm", [[[10.0, 10.0], [1.0, 1.0]], [[5.0, 5.0], [1.0, 1.0]], [[5.0, 5.0], [1.0, 1.0]]])]


def test_the_tables_of_known_returns():
    """Of two seeds: maze is 1 and 1 on the training levels, (1 + 0) / 2 and 0 on the tests; bigfish 1 and 0, and 0 and
    0."""
    found = {(row["game"], row["measure"], row["split"]): row for row in tables.tabulate(RUNS)}
    expected = {
        ("maze", "return", "train"): (10, 0), ("maze", "return", "test"): (6.25, 2.5 / 2**0.5),
        ("maze", "normalized", "gap"): (0.75, 0.5 / 2**0.5), ("bigfish", "return", "train"): (20.5, 39 / 2**0.5),
        ("all", "normalized", "train"): (0.75, 0.5 / 2**0.5), ("all", "normalized", "test"): (0.125, 0.25 / 2**0.5),
        ("all", "normalized", "gap"): (0.625, 0.25 / 2**0.5),
        # The mean of 1 and 1, without the lowest, 0, and another 1.
        ("all", "normalized IQM", "train"): (1.0, 0.5 / 2**0.5),
        ("all", "normalized IQM", "test"): (0.0, 0.25 / 2**0.5),
    }
    for key, (value, std) in expected.items():
        assert (found[key]["value"], found[key]["std"]) == pytest.approx((value, std)), key
    assert (found["maze", "return", "train"]["low"], found["maze", "return", "train"]["high"]) == (10, 10)
    assert (found["bigfish", "return", "train"]["low"], found["bigfish", "return", "train"]["high"]) == (1, 40)


@pytest.mark.parametrize("changes, names", [
    ([{}, {"seed": 2}], ["srwm", "srwm"]),
    *[([{}, {"trained_games": games.split()}], names) for games, names in (
        ("maze", ["srwm bigfish, maze", "srwm maze"]), ("bigfish maze", ["srwm", "srwm"]),
        ("maze bigfish maze", ["srwm bigfish, maze", "srwm bigfish, 2 x maze"]),
        ("maze maze bigfish bigfish", ["srwm", "srwm"]), ("maze leaper", ["srwm bigfish, maze", "srwm leaper, maze"]),
        ("fruitbot bigfish", ["srwm bigfish, maze", "srwm 2 games"]),
        ("heist dodgeball", ["srwm bigfish, maze", "srwm dodgeball, heist"]))],
    ([{"trained_games": games, "flags": {"distribution_mode": "--distribution-mode memory"}}
      for games in (["heist", "dodgeball"], ["maze", "heist"])],
     ["srwm 2 games", "srwm heist, maze"]),
    ([{}, {"flags": {"total_steps": "--total-steps 50000000", "seed": "--seed 2"}}],
     ["srwm", "srwm --total-steps 50M"]),
    ([{"flags": {"batch_size": "--batch-size 64"}}] * 2, ["srwm", "srwm"]),
    ([{"code": "12345678"}, {"code": "abcdefab"}], ["srwm code 12345678", "srwm code abcdefab"]),
    ([{}, {"script": "mine.py", "file": "best"}], ["srwm", "mine"]),
    ([{}, {"script": "srwm.py"}, {"script": "mine.py"}], ["impala_procgen_srwm", "srwm", "mine"]),
    ([{}, {"file": "best"}], ["srwm", "srwm best"]),
    ([{"srwm_cuda": "12345678"}, {}], ["srwm srwm_cuda 12345678", "srwm"]),
    ([{"processes": 1}, {"processes": 2}], ["srwm", "srwm 2 processes"]),
    ([{}, {"finished": False}], ["srwm", "srwm at step 1,000"]),
    ([{"file": "best", "validation": [500, 699]},
      {"file": "best", "validation": [600, 699], "finished": False, "step": 7}],
     ["srwm validated on levels 500 to 699", "srwm validated on levels 600 to 699"]),
    *[([{}, {"parts": parts, "code": "b"}, {"code": "b"}], ["srwm", f"srwm {words}code b", "srwm code b"])
      for parts, words in (
        ([PART], ""), ([PART | {"code": "a"}], "(until step 400 code a) "),
        ([PART | {"flags": {"momentum": "--momentum 0.5"}}], "(until step 400 --momentum 0.5) "),
        ([PART | {"processes": 2}, PART | {"until": 700}], "(until step 400 2 processes) "),
        ([PART, PART | {"code": "a", "until": 700}], "(until step 400 as in the end, until step 700 code a) "))],
    ([{"flags": {"momentum": "--momentum 0.5"}, "parts": [PART | {"code": ""}]}],
     ["srwm"]),
])
def test_models_are_named_by_what_differs_between_runs_of_a_script(changes, names):
    assert tables.name_models([ABOUT | change for change in changes]) == names


def test_what_an_earlier_part_of_a_run_lacked_is_said():
    parts = [PART | dict(code="")]
    about = ABOUT | dict(code="b", srwm_cuda="c", processes=2, flags={"momentum": "--momentum 0.5"}, parts=parts)
    assert tables.earlier_parts(about) == (
        "(until step 400 without --momentum 1 process code unknown srwm_cuda unknown)")


def test_tables_number_models_whose_flags_are_too_many_for_a_column_and_say_once_which_is_which():
    flags = "--unroll-length 25 --batch-size 64 --entropy-cost 0.002"
    runs = [SimpleNamespace(**vars(run) | dict(model=model)) for run, model in zip(RUNS, ("srwm", f"srwm {flags}"))]
    rows = tables.tabulate(runs)
    for table in (tables.text(runs, rows), tables.markdown(runs, rows)):
        assert table.count(flags) == 1 and f"srwm (1) = srwm {flags}, seed" in table and table.count("srwm (1)") > 3
    assert flags in tables.comma_separated(runs, rows)


def test_weights_called_best_are_named_so_even_if_nothing_was_validated():
    run = SimpleNamespace(**vars(RUNS[0]))
    run.records = [record | dict(file="best", validation=None) for record in run.records]
    assert "chosen by validation" not in next(tables.describe([run]))


def test_weights_whose_scores_would_have_one_place_are_refused(trained, score, refused, tmp_path):
    for folder in ("a", "b"):
        checkpoint = torch.load(trained / "checkpoint.pt") | dict(optimizer={})
        (tmp_path / folder).mkdir()
        torch.save(checkpoint, tmp_path / folder / "agent.pt")
    refused(lambda: score("a/agent.pt", "b/agent.pt"), "runs must be files of different names", "agent")


def one_level(model, *episodes):
    """A run that played one training level of maze."""
    played = tables.summarize({"maze": [list(episodes)]}, RANGES)
    about = ABOUT | dict(script=f"impala_procgen_{model}.py", trained_games=["maze"], num_levels=1, episodes=len(episodes))
    return SimpleNamespace(path=Path(f"runs/{model}/checkpoint.pt"), model=model,
                           records=[about | dict(start_level=8, column="train") | played])


def test_a_single_episode_has_no_interval_in_any_format():
    runs = [one_level("srwm", 7.0), one_level("lstm", 5.0, 9.0)]
    rows = tables.tabulate(runs)
    assert {(row["model"], row["minus"], row["low"] is None) for row in rows} == {
        ("srwm", None, True), ("lstm", None, False), ("srwm", "lstm", True)}
    table = tables.text(runs, rows)
    assert "7.00     " in table and "7.00 [5.00, 9.00]" in table and table.endswith(tables.UNMARKED)
    assert tables.SINGLE in table and tables.SINGLE not in tables.text(RUNS, tables.tabulate(RUNS))
    assert json.loads(tables.as_json(runs, rows))["entries"][0]["low"] is None
    assert next(csv.DictReader(tables.comma_separated(runs, rows).splitlines()))["low"] == ""


def test_the_interval_of_one_level_is_over_its_episodes_and_that_of_several_over_their_means():
    """The mean of 400 coins is within 1.96 / 40 in 95 % of the samples; ten levels that are alike do not vary."""
    coins = [0.0, 1.0] * 200
    run = one_level("srwm", *coins)
    (row,) = [row for row in tables.tabulate([run]) if row["measure"] == "return"]
    assert (row["low"], row["high"]) == pytest.approx((0.5 - 1.96 / 40, 0.5 + 1.96 / 40), abs=0.003)
    assert "level 8 (train), 400 episodes of each" in next(tables.describe([run]))
    run.records[0] |= tables.summarize({"maze": [coins] * 10}, RANGES) | dict(num_levels=10)
    (row,) = [row for row in tables.tabulate([run]) if row["measure"] == "return"]
    assert (row["low"], row["high"]) == (0.5, 0.5)


def test_statistics_of_several_episodes_of_a_level():
    (game,) = tables.summarize({"maze": [[10.0, 0.0], [10.0, 10.0]]}, RANGES)["games"].values()
    assert game["returns"] == [5.0, 10.0] and game["episode_returns"] == [[10.0, 0.0], [10.0, 10.0]]
    assert game["mean_return"] == 7.5 and game["standard_error"] == pytest.approx(2.5)


@pytest.mark.parametrize("columns", [70, 80, 200])
def test_on_a_terminal_no_line_is_wider_and_nothing_is_lost(columns, monkeypatch):
    rows = tables.tabulate(RUNS)
    everything = tables.text(RUNS, rows)
    assert max(map(len, everything.splitlines())) > 110
    monkeypatch.setattr(sys, "stdout", Stream(True))
    monkeypatch.setenv("COLUMNS", str(columns))
    folded = tables.text(RUNS, rows)
    assert max(map(len, folded.splitlines())) <= columns
    assert set(everything.split()) == set(folded.split())


def test_text_and_markdown_say_the_same():
    rows = tables.tabulate(RUNS)
    markdown, text = tables.markdown(RUNS, rows), tables.text(RUNS, rows)
    train, test, gap = "10.00 ± 0.00 [10.00, 10.00]", "6.25 ± 1.77 [5.00, 7.50]", "3.75 ± 1.77 [2.50, 5.00]"
    assert f"| maze | srwm | 2 | {train} | {test} | {gap} |" in markdown
    for line in [line for table in tables.cells(rows) for line in table]:
        assert f"| {' | '.join(line)} |" in markdown
        assert any(all(cell in row for cell in line) for row in text.splitlines())


def test_models_are_compared_level_by_level_and_each_with_its_own_seeds():
    """Levels that differ do not blur a difference that is the same on each. Seeds do: if one of two seeds is better by 2,
    in both models, then the mean of one model's is better by 2, 1 or 0 in a sample, or worse."""
    rng = np.random.default_rng(0)
    levels = [rng.uniform(5, 8, size=(2, 50)).tolist() for _ in range(3)]

    def compare(first, second):
        runs = [known_run(model, [[[x + more for x in game] for game in split] for split in levels])
                for model, seeds in (("a", first), ("b", second)) for more in seeds]
        rows = tables.tabulate(runs)
        pairs = [row for row in rows if row["minus"]]
        assert {(row["model"], row["minus"], row["measure"]) for row in pairs} == {("a", "b", "normalized difference")}
        return {row["split"]: (row["value"], row["low"], row["high"]) for row in pairs}, tables.text(runs, rows)

    scale = (1 / 5 + 1 / 39) / 2  # of maze's and bigfish's ranges
    found, text = compare([1], [0])
    assert found["train"] == pytest.approx((scale, scale, scale), rel=1e-5)
    assert found["test"] == pytest.approx(found["train"], rel=1e-5)
    assert found["gap"] == pytest.approx((0, 0, 0), abs=1e-6) and "normalized difference  a      b" in text
    more = compare([1, 1, 1], [0, 0])[0]  # whatever the numbers of seeds
    assert more["train"] == pytest.approx(found["train"], rel=1e-5)
    assert compare([0, 2, 4], [1])[0]["train"][0] == pytest.approx(scale)
    found, _ = compare([0, 2], [0, 2])
    assert found["train"] == pytest.approx((0, -2 * scale, 2 * scale), abs=1e-6)


def test_intervals_of_a_model_and_of_a_pair_are_the_same_whatever_stands_beside_them():
    rng = np.random.default_rng(0)
    a, b, c = ([known_run(model, rng.uniform(5, 8, size=(3, 2, 9)).tolist()) for _ in range(3)] for model in "abc")
    both = [{tuple(row[key] for key in ("model", "minus", "game", "measure", "split")): row for row in rows}
            for rows in (tables.tabulate(a + b + c), tables.tabulate(b + c))]
    assert both[1].items() <= both[0].items() and len({row["low"] for row in both[1].values()}) > 30


@pytest.mark.parametrize("changed, compared", [(0, {"test"}), (1, {"train"})])
def test_models_are_compared_in_the_columns_of_which_they_played_the_same_levels(changed, compared):
    """Level by level there too, whatever number of levels they played in other columns."""
    rng = np.random.default_rng(0)
    splits = [rng.uniform(5, 8, size=(2, 50)).tolist() for _ in range(3)]
    other = [[[x + 1 for x in game] for game in split] for split in splits]
    other[changed] = [game[:30] for game in other[changed]]
    runs = [known_run("a", splits), known_run("b", other)]
    runs[1].records[changed] |= dict(start_level=5000, num_levels=30)
    found = [row for row in tables.tabulate(runs) if row["minus"]]
    assert {row["split"] for row in found} == compared
    assert [row["low"] for row in found] == pytest.approx([row["high"] for row in found], rel=1e-5)
    words = tables.text(runs, tables.tabulate(runs)).splitlines()[-3].split()
    assert words[:4] == ["normalized", "difference", "a", "b"] and words[-1] == "-"
    assert {row["levels"] for row in found} == {None}  # those of both models stand in their rows


def drawn(scores, model=0):
    """What the bootstrap draws for one model."""
    (samples,) = tables.bootstrap([(model, scores)])
    return samples


@pytest.mark.parametrize("low, high, pairs, verdict", [
    (0.01, 0.05, 1, "clear"),  # as wide to both sides of 0.03
    (0.01, 0.05, 3, "clear"), (0.01, 0.05, 4, "clear"), (0.01, 0.05, 28, "plausible"),  # 1.22, 1.27 and 1.59 times
    (0.0006, 0.05, 1, "clear"), (0.0006, 0.05, 2, "plausible"), (0.0004, 0.05, 1, "open"), (-0.01, 0.05, 1, "open"),
])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_difference_is_clear_if_its_interval_widened_for_all_pairs_leaves_out_zero(low, high, pairs, verdict, sign):
    row = dict(value=0.03 * sign, low=min(low * sign, high * sign), high=max(low * sign, high * sign))
    assert tables.verdict(row, pairs) == verdict


def test_intervals_are_widened_as_bonferroni_s_correction_wants():
    """Of a normal distribution, 95 % are within 1.96 standard deviations, and all but 5 % / 10 within 2.81."""
    assert tables.widening(1) == 1 and tables.widening(10) == pytest.approx(2.807 / 1.960, abs=1e-3)


def test_differences_of_single_runs_are_not_marked():
    rng = np.random.default_rng(0)
    many, some, one = ([known_run(model, (more + rng.uniform(5, 6, size=(3, 2, 9))).tolist()) for _ in range(seeds)]
                       for model, seeds, more in (("a", 3, 9), ("b", 2, 0), ("c", 1, 0)))
    rows = tables.tabulate(many + some + one)
    assert {(row["model"], row["minus"], row["split"]): row["verdict"] for row in rows if row["minus"]} == {
        ("a", "b", "train"): "clear", ("a", "b", "test"): "clear", ("a", "b", "gap"): "open",
        **{(model, "c", split): None for model in "ab" for split in ("train", "test", "gap")}}
    text = tables.text(many + some, tables.tabulate(many + some))
    assert text.count("]**") == 2 and "1.00 times as wide, as Bonferroni's correction for 1 pair of models" in text
    assert "None is marked" in tables.text(some + one, tables.tabulate(some + one))


def test_a_rerun_of_the_bootstrap_moves_an_interval_by_less_than_the_margin(monkeypatch):
    """One of width 0.05, as wide as those of the differences that are published."""
    x = 0.18 * np.random.default_rng(5).normal(size=(1, 200))
    ends, rng = [], np.random.default_rng
    for rerun in range(4):
        monkeypatch.setattr(np.random, "default_rng", lambda seed, rerun=rerun: rng([rerun, *seed]))
        (row,) = tables.estimates(drawn([{"test": [x]}]), tables.mean)
        ends.append((row["low"], row["high"]))
    assert 0.045 < row["high"] - row["low"] < 0.055 and np.ptp(ends, axis=0).max() < tables.MARGIN


# Five seeds of three games. Of these rliable 1.2.0 gives for aggregate_mean 0.52, and for aggregate_iqm 0.46667.
SCORES = np.array([[0.1, 0.5, 0.9], [0.3, 0.2, 0.4], [0.8, 0.6, 0.0], [0.5, 0.9, 0.7], [0.2, 0.1, 1.6]])


@pytest.mark.parametrize("statistic, value", [(tables.mean, 0.52), (tables.interquartile_mean, 0.46667)])
@pytest.mark.parametrize("games", [1, 3])
def test_intervals_are_the_percentiles_of_all_samples_of_the_seeds(statistic, value, games):
    """Of which there are 5^5, each with all games of the seeds that were drawn."""
    scores = SCORES[:, :games]
    samples = [statistic(scores[list(seeds)].reshape(1, -1)).item() for seeds in itertools.product(range(5), repeat=5)]
    (found,) = tables.estimates(drawn([{"test": [game[:, None]]} for game in scores.T]), statistic)
    assert found["value"] == pytest.approx(value if games == 3 else statistic(scores.reshape(1, -1)).item(), abs=1e-5)
    assert (found["low"], found["high"]) == pytest.approx(np.percentile(samples, (2.5, 97.5)), abs=0.025)


def test_intervals_of_one_seed_are_of_its_levels():
    """The mean of 400 coins is within 1.96 standard errors of 1 / 40 in 95 % of the samples."""
    coins = np.tile([0.0, 1.0], 200)[None]
    (found,) = tables.estimates(drawn([{"test": [coins]}]), tables.mean)
    assert (found["low"], found["high"]) == pytest.approx((0.5 - 1.96 / 40, 0.5 + 1.96 / 40), abs=0.003)


def test_intervals_are_over_seeds_and_levels():
    """Two seeds that differ by 1 on every level: their mean is 0, 1/2 or 1 in a sample. Where levels differ too, more
    so."""
    seeds = np.array([[0.0] * 50, [1.0] * 50])
    (alone,), (both,) = (list(tables.estimates(drawn([{"test": [x]}]), tables.mean))
                         for x in (seeds, seeds + np.linspace(-1, 1, 50)))
    assert (alone["low"], alone["high"]) == (0, 1)
    assert both["low"] < 0 and both["high"] > 1


def test_statistics_of_known_returns():
    found = tables.summarize({"maze": [10.0, 0.0, 10.0, 10.0], "bigfish": [1.0, 1.0, 40.0, 40.0]}, RANGES)
    assert found["games"]["maze"]["mean_return"] == 7.5
    assert found["games"]["maze"]["standard_error"] == pytest.approx(2.5)
    assert found["games"]["maze"]["normalized"] == 0.5 and found["games"]["bigfish"]["normalized"] == 0.5
    assert found["mean"] == {"mean_return": 14.0, "normalized": 0.5}
    assert np.isclose(found["games"]["bigfish"]["standard_error"], np.std([1, 1, 40, 40], ddof=1) / 2)


# Terminals, disks and the like


@pytest.mark.slow
def test_folders_without_a_checkpoint_are_left_out(trained, score, refused, capsys, tmp_path):
    (tmp_path / "runs" / "empty").mkdir()
    capsys.readouterr()
    score(*sorted((tmp_path / "runs").iterdir()), "--num-levels", 1, *FRUITBOT)
    out, error = capsys.readouterr()
    assert f"{trained}/checkpoint.pt: srwm" in out
    assert "there is no checkpoint.pt in " in error and "runs/empty" in error
    refused(lambda: score(tmp_path / "runs" / "empty"), "empty/checkpoint.pt: no such file")


@pytest.mark.slow
def test_a_run_that_is_named_twice_or_by_a_link_counts_once(trained, score, capsys, tmp_path):
    (tmp_path / "runs" / "latest").symlink_to(trained)
    capsys.readouterr()
    score(*sorted((tmp_path / "runs").iterdir()), trained / "checkpoint.pt", "--num-levels", 1, "--format", "csv")
    out, error = capsys.readouterr()
    assert {row["seeds"] for row in csv.DictReader(out.splitlines())} == {"1"}
    for path in (tmp_path / "runs" / "latest", trained / "checkpoint.pt"):
        assert f"note: left out, {path} is {trained} once more\n" in error


def test_a_folder_of_runs_that_leads_nowhere_is_refused(trained, score, refused, capsys, tmp_path):
    torch.save(torch.load(trained / "checkpoint.pt") | dict(optimizer={}), tmp_path / "agent.pt")
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").symlink_to(tmp_path / "not mounted")
    capsys.readouterr()
    refused(lambda: score(tmp_path / "agent.pt"), "runs, the folder, is a link to one that is not there")


@pytest.mark.parametrize("word", ["--plot", "--probe", "--video"])
def test_pictures_that_cannot_be_written_are_refused_before_work(word, trained, score, refused, capsys, tmp_path):
    target = tmp_path / ("out.gif" if word == "--video" else "out.png")
    target.mkdir()
    capsys.readouterr()
    refused(lambda: score(word, target), f"{word} must be a file that can be written", "Is a directory")
    target.rmdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load_run", lambda *rest: 1 / 0)  # what comes after the check
        with pytest.raises(ZeroDivisionError):
            score(word, target)
    assert not target.exists()  # the check leaves nothing


@pytest.mark.slow
@pytest.mark.parametrize("end, status, said", [
    ("| head -n 1", 0, ""), ("> /dev/full", 1, "stopped: [Errno 28] No space left on device"),
    (">&- 2>&-", 0, ""), ("| cat", 0, "")], ids=["head", "full", "closed", "ascii"])
def test_tables_that_nobody_can_read_end_in_no_traceback(end, status, said, tmp_path, scored_program):
    """In a process of its own, whose output is a broken pipe, a full disk, nothing, or lacks letters."""
    command = f"set -o pipefail; {sys.executable} {scored_program} {end}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(evaluate.__file__).parent,
                           env=os.environ | dict(PYTHONIOENCODING="ascii"))
    assert ended.returncode == status and ended.stderr.strip() == (f"evaluate.py: {said}" if said else "")
    assert end != "| cat" or "Mean over levels ?" in ended.stdout


@pytest.fixture
def scored_program(tmp_path):
    """evaluate.py with tables of known length, and nothing to play."""
    (tmp_path / "program.py").write_text("""
import sys
from types import SimpleNamespace
import evaluate
from reporting import tables
evaluate.prepare = lambda args: [SimpleNamespace(script=SimpleNamespace(keep_freed_memory=int))]
evaluate.score, tables.tabulate = lambda *words: None, lambda runs: []
tables.FORMATS["text"] = lambda *words: "runs/a\\n" * 20_000 + tables.NOTE
sys.argv = ["evaluate.py"]
evaluate.main()
""")
    return f"-c 'exec(open(\"{tmp_path / 'program.py'}\").read())'"


def test_levels_of_each_game_and_column_are_drawn_apart():
    x = np.random.default_rng(0).normal(size=(1, 400))
    samples = drawn([{"train": [x], "test": [x]}] * 2)
    means = np.concatenate([samples["train"][1:, 0], samples["test"][1:, 0]], axis=1)  # (draws, columns and games)
    assert np.abs(np.corrcoef(means.T) - np.eye(4)).max() < 0.05


def test_seeds_are_drawn_apart_from_levels():
    """Each of five seeds is good at one level of five, another one each: in samples both are drawn, not the same."""
    for model in range(3):
        (found,) = tables.estimates(drawn([{"test": [5 * np.eye(5)]}], model), tables.mean)
        assert found["value"] == 1 and found["low"] < 0.3 and found["high"] < 2.1


@pytest.mark.slow
def test_a_bootstrap_of_many_levels_takes_little_memory_and_is_that_of_one_piece(monkeypatch):
    """8 bytes for each of 100,000 samples of 10,000 levels would be 8 GB."""
    scores = [{"test": [np.random.default_rng(1).normal(size=(2, 300))]}]
    whole = drawn(scores)["test"]
    monkeypatch.setattr(tables, "PIECE", 1000)
    assert (drawn(scores)["test"] == whole).all()
    monkeypatch.undo()
    tracemalloc.start()
    list(tables.bootstrap([(0, [{"test": [np.zeros((1, 10_000))]}])], draws=1000))
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


# What is not allowed


@pytest.mark.parametrize("words, expected", [
    ("--num-levels 0", "--num-levels must be positive"),
    ("--start-level -3", "--start-level must be at least 0"),
    ("--env pong", "--env must be one of"),
    ("--env bigfish bigfish", "--env must name each game once"),
    ("--distribution-mode memory", "got bigfish"),
    ("--distribution-mode nightmare", "--distribution-mode must be one of"),
    ("runs missing.pt", "missing.pt: no such file"),
    ("runs --start-level 3 --splits paper", "--start-level and --splits exclude each other"),
    ("--splits dev", "--splits must be train, test, paper or first levels, got dev"),
    ("--splits", "--splits must be train, test, paper or first levels, got none"),
    ("--splits 0 100", "--splits must not overlap"),
    ("--splits test runs", "(runs come first: evaluate.py RUNS --splits ...)"),
    ("--distribution-mode exploration", "must be one of easy, hard, extreme, memory, got exploration"),
    ("--episodes 0 --no-greedy", "--episodes must be positive"),
    ("--episodes 3", "--episodes must be 1 with greedy actions, got 3"),
    ("--video out.avi", "--video must end in .mp4 or .gif"),
    ("--video nowhere/out.gif", "--video must be in a folder that exists"),
])
def test_bad_arguments_are_refused(words, expected, trained, score, refused, capsys):
    capsys.readouterr()
    words = [trained if word == "runs" else word for word in words.split()]
    refused(lambda: score(*words), "evaluate.py: error: ", expected)


@pytest.mark.parametrize("words, expected", [("--format html", "'markdown'"), ("--greed", "--greed")])
def test_words_that_no_argument_takes_are_refused(words, expected, trained, score, capsys):
    with pytest.raises(SystemExit) as end:
        score(*words.split())
    assert end.value.code == 2 and expected in capsys.readouterr().err


@pytest.mark.slow
def test_runs_of_different_games_are_refused_unless_told_which_to_compare(train, score, refused, capsys):
    runs = [train("--total-steps", 20),
            train("--total-steps", 20, "--multi-env", "None", *FRUITBOT, "--exp-name", "one")]
    capsys.readouterr()
    refused(lambda: score(*runs), "runs must have the same games", "bigfish fruitbot (easy)")
    score(*runs, "--num-levels", 1, *FRUITBOT)
    assert "srwm fruitbot " in capsys.readouterr().out


@pytest.mark.slow
def test_engines_are_closed_when_all_is_played(few_slots, monkeypatch):
    """And not when Python ends, as far as it does so in an order that suits them."""
    make_envs, made = script.make_envs, []
    monkeypatch.setattr(script, "make_envs", lambda *words, **options: made.append(make_envs(*words, **options)) or made[-1])
    args = script.Args(cuda=False, bf16=False)
    playing.play(script, script.Agent(args), args, [("leaper", 0), ("maze", 1), ("leaper", 2)])
    assert len(made) > 3 and all(envs.closed if hasattr(envs, "closed") else envs._handle is None for envs in made)


def test_no_checkpoint_at_all_is_refused(score, refused):
    refused(score, "there is no checkpoint under runs/")


@pytest.mark.parametrize("change, expected", [
    *[({"script": name}, f"{name}, is not a Python file beside evaluate.py")
      for name in ("/etc/passwd", "../evil.py", "nowhere.py", "README.md")],
    ({"script": "evaluate.py"}, "evaluate.py, has no Agent"),
    *[({name: 3}, "is not a checkpoint of this project") for name in ("script", "args", "model")],
])
def test_a_checkpoint_that_somebody_changed_is_refused(change, expected, trained, score, refused, capsys):
    path = trained / "checkpoint.pt"
    torch.save(torch.load(path) | change, path)
    capsys.readouterr()
    refused(score, expected)


def test_a_missing_system_library_is_named_with_its_debian_package(trained, score, refused, monkeypatch, capsys):

    def no_engine(*args, **options):
        raise OSError("libGL.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(engine._Engine, "__init__", no_engine)
    monkeypatch.setattr(runs, "import_script", lambda name: script)
    capsys.readouterr()
    refused(score, "libGL.so.1", "apt install libgl1 libglib2.0-0")
