"""The pictures of an evaluation: films in which something happens, and drawings of what was there."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import first_fast
from PIL import Image, ImageDraw
from torch.utils.tensorboard import SummaryWriter

import evaluate
import impala_procgen_lstm
import impala_procgen_sr_delta
import impala_procgen_srwm as script
from reporting import pictures, playing, runs

ROOT = Path(__file__).parent.parent
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


@pytest.fixture
def policy(few_slots):
    args = script.Args(cuda=False, bf16=False)
    return playing.Policy(script, script.Agent(args), args, greedy=True, seed=1)


@pytest.mark.slow
def test_a_film_shows_every_game_at_the_human_resolution(trained, score, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "SECONDS", 1)
    score("--video", "out.mp4")
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    command = [pictures.find_ffmpeg(), "-loglevel", "error", "-i", "out.mp4", *raw]
    film = np.frombuffer(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout, np.uint8)
    film = film.reshape(15, 32 + 512, 2 * 512, 3)  # a line of writing above each of two games
    assert film[0, :32].max() > 200 and film[0, 32:].std() > 20
    assert np.abs(film[-1, 32:].astype(int) - film[0, 32:]).mean() > 1
    assert not list(tmp_path.glob("runs/*/evaluation*"))  # to look is not to score
    score("--video", "out.gif")
    with Image.open("out.gif") as film:
        assert (film.n_frames, film.size, film.info["duration"]) == (5, (256, 144), 200)


def test_a_gif_has_as_many_colors_as_its_bytes_allow(tmp_path, monkeypatch):
    """Of noise, 10 pictures in 128 colors take 40 kB."""
    noise = np.random.default_rng(1).integers(256, size=(30, 64, 64, 3), dtype=np.uint8)
    for most, expected in ((100_000, 128), (30_000, 16)):
        monkeypatch.setattr(pictures, "GIF_BYTES", most)
        pictures.write_gif(map(Image.fromarray, noise), tmp_path / "out.gif")
        with Image.open(tmp_path / "out.gif") as film:
            assert (film.n_frames, len(film.convert("RGB").getcolors())) == (10, expected)
        assert (tmp_path / "out.gif").stat().st_size <= most


@pytest.fixture
def mazes(few_slots, monkeypatch):
    """A run that solves maze 1000 in three steps and stands before a wall in maze 1001, its policy, and a short film."""
    monkeypatch.setattr(pictures, "SECONDS", 4)
    run = runs.load_run(ROOT / "pretrained/srwm.pt", evaluate.Args(cuda=False, bf16=False, env=("maze",)))
    return run, playing.Policy(run.script, run.agent, run.args, greedy=True, seed=1)


@pytest.mark.parametrize("first, count, shown, said", [
    (1000, 2, [1000], "maze: tried 2 levels, solved 1; the film shows them"),
    (1001, 1, [1001], "maze: tried 1 levels, solved 0; the film shows all")])
def test_a_film_shows_levels_that_are_solved_and_says_of_how_many(first, count, shown, said, mazes, capsys):
    run, policy = mazes
    run.splits = [runs.Split(first, count, "test")]
    assert pictures.choose_levels(run, policy) == {"maze": shown}
    assert capsys.readouterr().err.splitlines()[-1] == said


def test_the_search_for_levels_to_film_says_how_far_it_is(mazes, capsys):
    run, policy = mazes
    run.splits = [runs.Split(1001, 1, "test")]
    pictures.choose_levels(run, policy)
    assert "60 of 60 steps" in capsys.readouterr().err


def test_a_game_whose_levels_last_longer_than_the_film_shows_those_that_have_not_ended(mazes, monkeypatch):
    run, policy = mazes
    monkeypatch.setattr(pictures, "SECONDS", 1)
    run.splits = [runs.Split(1001, 3, "test")]
    assert pictures.choose_levels(run, policy) == {"maze": [1001, 1002, 1003]}


@pytest.mark.parametrize("level, words", [(1000, "solved"), (1001, "not solved")])
def test_a_film_says_whether_a_level_was_solved(level, words, mazes, monkeypatch, tmp_path):
    run, policy = mazes
    run.splits, said, text = [runs.Split(level, 1, "test")], [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text",
                        lambda draw, place, words, *rest: said.append(words) or text(draw, place, words, *rest))
    pictures.film(run, policy, tmp_path / "out.gif")
    left = said[::2]
    assert left[0] == f"maze {level}" and set(left[1:]) == {f"maze {level}", words}


def test_an_episode_in_which_nothing_moves_for_two_seconds_is_over_in_a_film(mazes):
    _, policy = mazes
    scene, frames = pictures.Scene("maze", [1001], policy, 0), []
    while not scene.ended:
        scene.step(policy.act())
        frames.append(scene.frame.tobytes())
    assert not scene.solved and len(set(frames[-31:])) == 1 and frames[-32] != frames[-31]


@pytest.mark.slow
def test_a_film_shows_the_episodes_that_are_scored(policy):
    game, returns = playing.Game("fruitbot", runs.Split(8, 3, "test"), policy, 1), []
    while len(returns) < 3:
        game.advance(policy.act())
        if game.ended and game.pause == pictures.FPS:
            returns.append(game.total)
    levels = [("fruitbot", level) for level in (8, 9, 10)]
    assert returns == playing.play(script, policy.agent, policy.args, levels).tolist()


def test_the_end_of_an_episode_stays_for_a_second(policy):
    game, shown = playing.Game("dodgeball", runs.Split(3, 2, "test"), policy, 0), []
    while game.level == 3:
        game.advance(policy.act())
        shown.append((game.ended, game.picture.tobytes()))
    assert [ended for ended, _ in shown[-16:]] == [True] * 15 + [False]
    assert len({picture for _, picture in shown[-16:-1]}) == 1


def test_what_is_recorded_is_what_the_layers_did():
    """At the second step, by the equations: the rates are sigmoid(x (W + change)) of the last four columns."""
    agent = script.Agent(script.Args(cuda=False, bf16=False)).requires_grad_(False)
    frame = torch.randint(256, (2, 1, 1, 64, 64, 3), dtype=torch.uint8)
    reward, state, inputs = torch.zeros(1, 1), agent.initial_state(1), []
    agent.layers[1].register_forward_pre_hook(lambda layer, given: inputs.append(given))
    _, _, state = agent(frame[0], reward, reward.bool(), state)
    (_, _, new_state), layers = pictures.record(lambda: agent(frame[1], reward, reward.bool(), state))
    W, (h, change, _) = agent.layers[1].W, inputs[1]
    beta, moved = layers[1]
    for head in range(8):
        x = h[0, 0, 16 * head : 16 * head + 16].softmax(0)
        assert beta[:, head] == pytest.approx((x @ (W + change[0])[head, :, -4:]).sigmoid().numpy(), abs=1e-6)
        assert moved[head] == pytest.approx((new_state[1][0, head].norm() / W[head].norm()).item(), rel=1e-5)
    assert len(layers) == 2 and change.abs().max() > 0
    agent(frame[1], reward, reward.bool(), state)
    assert len(layers) == 2  # nothing is recorded any more


def test_layers_are_recorded_where_a_copy_imported_the_function_by_its_name(monkeypatch, tmp_path):
    text = Path(script.__file__).read_text().replace("srwm_cuda.srwm(", "srwm(")
    text = text.replace("\nimport srwm_cuda\n", "\nimport srwm_cuda\nfrom srwm_cuda import srwm\n")
    (tmp_path / "my_copy.py").write_text(text)
    monkeypatch.setattr(runs, "HOME", tmp_path)
    copy = runs.import_script("my_copy.py")
    agent, reward = copy.Agent(copy.Args(cuda=False, bf16=False)).requires_grad_(False), torch.zeros(1, 1)
    frame = torch.zeros(1, 1, 64, 64, 3, dtype=torch.uint8)
    _, layers = pictures.record(lambda: agent(frame, reward, reward.bool(), agent.initial_state(1)))
    assert len(layers) == 2 and copy.srwm is pictures.srwm_cuda.srwm


@needs_matplotlib
@pytest.mark.parametrize("module", first_fast(script, impala_procgen_sr_delta), ids=["srwm", "sr_delta"])
def test_a_probe_is_a_picture(module, train, score, tmp_path):
    train("--total-steps", 20, script=module)
    score("--probe", "probe.png", "--env", "dodgeball")
    assert np.asarray(Image.open(tmp_path / "probe.png")).std() > 10


@needs_matplotlib
def test_agents_without_self_reference_cannot_be_probed(train, score, refused, capsys):
    train("--total-steps", 20, script=impala_procgen_lstm)
    capsys.readouterr()
    refused(lambda: score("--probe", "probe.png"), "--probe", "srwm_cuda.srwm", "impala_procgen_lstm.py")


@pytest.fixture
def drawn(monkeypatch):
    """The axes with curves, in the order in which a plot draws them."""
    axes, draw_curves = [], pictures.draw_curves
    monkeypatch.setattr(pictures, "draw_curves", lambda axis, *rest: axes.append(axis) or draw_curves(axis, *rest))
    return axes


@pytest.mark.slow
@needs_matplotlib
def test_long_names_of_models_leave_the_curves_their_room(train, score, drawn):
    runs = [train("--total-steps", 20, "--entropy-cost", cost, "--reward-clipping", clipping, "--discounting", 1 - cost)
            for cost, clipping in ((0.005, "normalize"), (0.0123, "abs_one"))]
    score(*runs, "--splits", "0", "1000", "--num-levels", 1, "--plot", "plot.png")
    assert drawn[0].get_position().width > 0.3  # of the figure's


@needs_matplotlib
def test_many_models_with_odd_names_are_told_apart(tmp_path, drawn, monkeypatch):
    from matplotlib.figure import Figure

    legends, legend = [], Figure.legend
    monkeypatch.setattr(Figure, "legend", lambda figure, *words, **options: legends.append(legend(figure, *words, **options)))
    models = [f"srwm {'--a-long-flag 1 ' * 20}--exp-name a$x_{{$b{n}" for n in range(12)]
    record = dict(games=dict.fromkeys(["maze"]))
    runs = [SimpleNamespace(model=model, records=[record]) for model in models]
    entry = dict(measure="return", split="test", value=1.0, low=0.0, high=2.0)
    rows = [entry | dict(model=model, game=game) for model in models for game in ("maze", "all")]
    pictures.plot(runs, rows, [{"return/mean": np.array([[0, 1], [0, 1]])}] * 12, tmp_path / "plot.png")
    texts = [text.get_text() for text in legends[0].get_texts()]
    assert len(set(texts)) == 12 and max(len(line) for text in texts for line in text.splitlines()) < 180
    assert len({(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in drawn[0].lines}) == 12


def seen_by_deuteranopes(color):
    """CIELAB of a color as the model of Machado et al. 2009 has it without the second kind of cones."""
    value = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    seen = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]]) @ linear
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen.clip(0, 1)
    x, y, z = np.cbrt(xyz / (0.9505, 1, 1.089)) * 116  # of colors that are not very dark
    return np.array([y - 16, 500 * (x - y) / 116, 200 * (y - z) / 116])


def test_eyes_that_confuse_red_and_green_tell_the_agents_apart():
    """By colors that differ by more than 15 (2 can be seen side by side), and by markers."""
    seen = [seen_by_deuteranopes(color) for color in pictures.COLORS]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15
    assert np.linalg.norm(seen_by_deuteranopes("#d62728") - seen_by_deuteranopes("#8c7a1a")) < 15  # red, olive
    assert len({look["marker"] for look in pictures.styles(pictures.AGENTS).values()}) == len(pictures.AGENTS) == 8


def test_an_agent_keeps_its_color_whatever_stands_beside_it():
    def color(name, *models):
        return pictures.styles(models)[name]["color"]

    assert color("lstm", "lstm") == color("lstm", "srwm", "mine", "lstm")
    assert color("mine --x 1", "mine --x 1") == color("mine --x 1", *pictures.AGENTS, "other", "mine --x 1")
    assert color("srwm, recipe", "srwm, recipe") == color("srwm", "srwm")
    assert color("ff --total-steps 100M", "ff --total-steps 100M") == color("ff", "ff")


def test_agents_of_one_color_differ_in_line_and_marker():
    first, second = pictures.styles(["srwm", "srwm, recipe"]).values()
    assert first["color"] == second["color"]
    assert first["linestyle"] != second["linestyle"] and first["marker"] != second["marker"]


@needs_matplotlib
def test_each_game_has_its_curve_and_its_scores_on_one_scale(tmp_path, drawn, monkeypatch):
    from matplotlib.figure import Figure

    scores, legends, draw_scores, legend = [], [], pictures.draw_scores, Figure.legend
    monkeypatch.setattr(pictures, "draw_scores", lambda axis, *rest: scores.append(axis) or draw_scores(axis, *rest))
    monkeypatch.setattr(Figure, "legend", lambda figure, *words, **options: legends.append(legend(figure, *words, **options)))
    games, models, measures = ["maze", "heist"], ["_mine", "lstm", "ff"], ["return", "normalized", "normalized IQM"]
    value = {key: number for number, key in enumerate(itertools.product([*games, "all"], measures, models))}
    rows = [dict(game=game, measure=measure, model=model, split="test", value=x, low=x, high=x)
            for (game, measure, model), x in value.items()]
    runs = [SimpleNamespace(model=model, records=[dict(games=dict.fromkeys(games))]) for model in models for _ in range(2)]
    values = np.zeros(80)
    values[40] = 5
    tags = ["normalized_return/mean", "return/maze", "return/heist"]
    pictures.plot(runs, rows, [{tag: np.array([range(80), values]) for tag in tags}] * 6, tmp_path / "plot.png")
    points = [[float(bar.lines[0].get_ydata()[0]) for bar in axis.containers] for axis in scores]
    shown = [("all", "normalized"), ("maze", "return"), ("heist", "return")]
    assert points == [[value[game, measure, model] for model in models] for game, measure in shown]
    assert all(left.get_shared_y_axes().joined(left, right) for left, right in zip(drawn, scores, strict=True))
    x = [float(bar.lines[0].get_xdata()[0]) for bar in scores[0].containers]
    assert x == sorted(set(x))
    named = {text.get_text(): handle.get_color()
             for text, handle in zip(legends[0].get_texts(), legends[0].legend_handles, strict=True)}
    assert named == {model: look["color"] for model, look in pictures.styles(models).items()}
    assert [label.get_text() for label in scores[0].get_xticklabels()] == models
    assert len(drawn[0].lines) == 3 and max(drawn[0].lines[0].get_ydata()) == pytest.approx(1)  # of five values


@needs_matplotlib
def test_several_seeds_are_a_band_around_their_mean():
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    found = [("lstm", {"return/maze": np.array([[0, 1e6], [low, low + 1]])}) for low in (1.0, 3.0, 8.0)]
    pictures.draw_curves(axis, found, "return/maze", pictures.styles(["lstm"]))
    (mean,), (band,) = axis.lines, axis.collections
    assert mean.get_ydata().tolist() == [4, 5]
    ends = band.get_paths()[0].vertices
    assert {(x, y) for x, y in ends} == {(0, 1), (0, 8), (1, 2), (1, 9)}


@needs_matplotlib
def test_another_s_published_agent_is_a_line_after_the_most_steps_that_the_runs_have(tmp_path, drawn, monkeypatch):
    scores, legends, draw_scores = [], [], pictures.draw_scores
    from matplotlib.figure import Figure
    legend = Figure.legend
    monkeypatch.setattr(pictures, "draw_scores", lambda axis, *rest: scores.append(axis) or draw_scores(axis, *rest))
    monkeypatch.setattr(Figure, "legend", lambda figure, *words, **options: legends.append(legend(figure, *words, **options)))
    run = SimpleNamespace(model="lstm", records=[dict(games={"maze": None}, step=20)])
    rows = [dict(game=game, measure=measure, model="lstm", split="test", value=1.0, low=0.0, high=2.0)
            for game in ("maze", "all") for measure in ("return", "normalized")]
    curve = {tag: np.array([[0, 20], [0, 1]]) for tag in ("normalized_return/mean", "return/maze")}
    other = {"name": "PPO", "steps": [10, 20, 30], "normalized_return": {"mean": dict(train=[2, 3, 4], test=[1, 1.5, 2])},
             "return": {"maze": dict(train=[20, 30, 40], test=[10, 15, 20])}}
    pictures.plot([run], rows, [curve], tmp_path / "plot.png", other)
    for left, right, scale in zip(drawn, scores, (1, 10), strict=True):
        assert left.lines[-1].get_ydata().tolist() == [2 * scale, 3 * scale, 4 * scale]
        assert left.get_xlim()[1] < 30e-6
        assert [line.get_ydata()[0] for line in right.lines if len(line.get_xdata()) == 2][-2:] == [3 * scale, 1.5 * scale]
    assert "PPO (published; beside the curves, after 2e-05 M steps)" in [text.get_text() for text in legends[0].get_texts()]


@needs_matplotlib
def test_scores_are_points_of_their_models_hollow_on_training_levels():
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    rows = [dict(model=model, split=split, value=value, low=value - 1, high=value + 2) for model, split, value in (
        ("a", "train", 5.0), ("a", "test", 3.0), ("a", "gap", 2.0), ("b", "train", 7.0), ("b", "test", 4.0))]
    pictures.draw_scores(axis, rows, {"a": dict(color="red", marker="o"), "b": dict(color="blue", marker="s")})
    points = [(line.get_color(), line.get_marker(), line.get_fillstyle(), *line.get_ydata())
              for line in (bar.lines[0] for bar in axis.containers)]
    assert points == [("red", "o", "none", 5), ("red", "o", "full", 3), ("blue", "s", "none", 7), ("blue", "s", "full", 4)]
    assert [bar.lines[2][0].get_segments()[0][:, 1].tolist() for bar in axis.containers][:2] == [[4, 7], [2, 5]]
    x = [bar.lines[0].get_xdata()[0] for bar in axis.containers]
    assert x == sorted(set(x))


def test_a_curve_is_drawn_as_means_of_neighbours():
    assert pictures.running_mean(np.arange(10.0)).tolist() == list(range(10))
    values = np.zeros(80)
    values[[0, 40]] = 15
    found = pictures.running_mean(values)
    assert found[:5] == pytest.approx([5, 3.75, 3, 0, 0]) and found[37:44] == pytest.approx([0, 3, 3, 3, 3, 3, 0])


@pytest.mark.slow
@needs_matplotlib
def test_a_plot_draws_training_validation_and_scores(train, score, tmp_path, drawn):
    runs = [train("--total-steps", 20, "--seed", seed) for seed in (1, 2)]
    for run in runs:
        for file in run.glob("events*"):
            file.unlink()
        with SummaryWriter(run) as writer:
            for step in range(3):
                for tag in ("return/bigfish", "normalized_return/mean"):
                    writer.add_scalar(tag, step, step * 1000)
                    writer.add_scalar(f"valid_{tag}", step, step * 1000)
    score(*runs, "--splits", "0", "1000", "--num-levels", 1, "--plot", "plot.png")
    assert np.asarray(Image.open(tmp_path / "plot.png")).std() > 10
    lines = [(line.get_linestyle(), list(line.get_ydata())) for line in drawn[0].lines]
    assert lines == [("-", [0, 1, 2]), (":", [0, 1, 2])] and "dotted: validation" in drawn[0].get_title("left")
    (text,) = drawn[2].texts
    assert text.get_text() == "no return/fruitbot in TensorBoard files\nbeside the checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("words, module, package", [
    ("--plot plot.png", "matplotlib", "matplotlib"), ("--plot plot.png", "PIL", "pillow"),
    ("--probe probe.png", "matplotlib", "matplotlib"), ("--video film.gif", "PIL", "pillow")])
def test_without_a_package_one_line_says_how_to_install_it(words, module, package, tmp_path):
    """In a process of its own, in which the package cannot be found."""
    (tmp_path / "without.py").write_text(f"""
import importlib.abc, sys
class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *rest):
        if name.split(".")[0] == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Without())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {module!r} else find(name, *rest)
import evaluate
sys.argv = ["evaluate.py", *{words.split()!r}]
evaluate.main()
""")
    end = subprocess.run([sys.executable, "without.py"], cwd=tmp_path, capture_output=True, text=True,
                         env=os.environ | dict(PYTHONPATH=str(ROOT)))
    said = f"evaluate.py: error: {words.split()[0]} needs {package}: pip install {package}\n"
    assert (end.returncode, end.stderr) == (2, said)
