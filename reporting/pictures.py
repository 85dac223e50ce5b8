"""What evaluate.py draws: a film of the agent, learning curves with scores, and what an SRWM does as it plays."""

import importlib.util
import io
import itertools
import logging
import math
import re
import shutil
import subprocess
import sys
import textwrap
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import srwm_cuda
from reporting.playing import FPS, Game, show_progress
from reporting.runs import Split

SECONDS, STILL = 30, 2 * FPS  # of a film; pictures without a change that end an episode in it
TRIED_AT_ONCE = 5  # levels of each game that are played ahead of a film
HUMAN = 512  # pixels, width and height of a picture for people
SIZES = {".mp4": (512, 32), ".gif": (128, 16)}  # pixels that a game takes in a film, and of the line above it
GIF_EVERY, GIF_BYTES = 3, 3_000_000  # which of the pictures it shows; the most that it may have
GIF_COLORS = (128, 64, 32, 16, 8)  # to try, until it has no more
ENDINGS = {"plot": (".png", ".pdf", ".svg"), "video": (".mp4", ".gif"), "probe": (".png", ".pdf", ".svg")}
# Colors of Okabe and Ito, which eyes that confuse red and green tell apart, with a gray for their yellow, which a white
# page swallows. The agents of the README have one each.
COLORS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#4D4D4D")
AGENTS = ("srwm", "lstm", "sr_delta", "delta", "fake_sr", "srwm --no-carry-state", "srwm --bptt-length 1", "ff")
LINES, MARKERS = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1))), "osD^v<>pXP*"  # where one color has to do for several
PUBLISHED = dict(color="#000000", linestyle=(0, (5, 3)), linewidth=1)
GOOD, BAD = COLORS[0], COLORS[2]  # rewards
FILLED = {"train": "none", "mixed": "left", "validation": "top", "test": "full"}  # a split's points
LONG = 26  # letters of a name that do not fit below the scores
RATES = (r"$\beta_y$, learning rate of the output's columns", r"$\beta_q$, of the query's columns",
         r"$\beta_k$, of the key's", r"$\beta_\beta$, of the learning rates' own")
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 9,
         "axes.axisbelow": True, "savefig.dpi": 130, "legend.frameon": False}


def check(args):
    """Raises ValueError where a picture that the arguments ask for cannot be made."""
    for name, endings in ENDINGS.items():
        if target := getattr(args, name):
            if target.suffix not in endings:
                raise ValueError(f"--{name} must end in {' or '.join(endings)}, got {target}")
            if not target.parent.is_dir():
                raise ValueError(f"--{name} must be in a folder that exists, got {target}")
            check_packages(f"--{name}", *["matplotlib"] * (name != "video"))
            if target.suffix == ".mp4" and find_ffmpeg() is None:
                raise ValueError(f"--{name} needs the program ffmpeg for .mp4; it writes .gif without")
            existed = target.exists()
            try:
                open(target, "ab").close()
            except OSError as error:
                reason = error.strerror
                raise ValueError(f"--{name} must be a file that can be written, got {target}: {reason}") from None
            if not existed:
                target.unlink()


def check_packages(what, *modules):
    """Raises ValueError if one of these is missing, or Pillow, which all pictures need."""
    for module, package in (("PIL", "pillow"), *((module, module) for module in modules)):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"{what} needs {package}: pip install {package}")


def find_ffmpeg():
    """The path of ffmpeg: the system's, or that inside imageio-ffmpeg. gym3 wants a version of the latter that needs an
    old setuptools when it is imported, so that it is not."""
    package = importlib.util.find_spec("imageio_ffmpeg")
    bundled = sorted(Path(package.origin).parent.glob("binaries/ffmpeg-*")) if package else []
    return shutil.which("ffmpeg") or (bundled[0] if bundled else None)


class Scene(Game):
    """A game that plays these levels. An episode in which nothing has moved for two seconds is over."""

    def __init__(self, name, levels, policy, slot, **options):
        self.levels = iter(levels)
        super().__init__(name, None, policy, slot, **options)

    def begin(self):
        self.split, self.number, self.still, self.solved = Split(next(self.levels), 1, "test"), -1, 0, False
        super().begin()

    def step(self, actions):
        before = self.frame.copy()
        reward = super().step(actions)
        if self.ended:
            self.solved = bool(self.env.get_info()[0].get("prev_level_complete"))
        self.still = 0 if (self.frame != before).any() else self.still + 1
        self.ended = self.ended or self.still == STILL
        return reward


def choose_levels(run, policy):
    """{game: levels} for a film: of as many of the split as the agent can play in the time of the film, five at once,
    those that it solves; if there are none, those that it has not ended, or else all."""
    split = run.splits[0]
    each = max(1, min(TRIED_AT_ONCE, len(policy.step) // len(run.games), split.count))
    todo = {name: iter(range(split.first, split.first + split.count)) for name in run.games}
    scenes = [Scene(name, todo[name], policy, slot) for slot, name in enumerate(run.games * each)]
    solved, other = ({name: [] for name in run.games} for _ in range(2))
    for _ in show_progress("looking for solved levels", "steps", range(FPS * SECONDS)):
        actions = policy.act()
        for scene in list(scenes):
            scene.step(actions)
            if scene.ended:
                (solved if scene.solved else other)[scene.name].append(scene.level)
                try:
                    scene.begin()
                except StopIteration:
                    scenes.remove(scene)
    shown = {}
    for name in run.games:
        left = [scene.level for scene in scenes if scene.name == name]
        shown[name] = sorted(solved[name] or left or other[name])
        what = "them" if solved[name] else "some that took longer than the film" if left else "all"
        tried = len(solved[name] + other[name] + left)
        print(f"{name}: tried {tried} levels, solved {len(solved[name])}; the film shows {what}", file=sys.stderr)
    return shown


def film(run, policy, target):
    """Writes half a minute in which the agent plays all games side by side, level after level."""
    from PIL import Image, ImageDraw, ImageFont

    torch.set_num_threads(1)  # as when the agent is scored, so that these are the same episodes
    levels = choose_levels(run, policy)
    games = [Scene(name, itertools.cycle(levels[name]), policy, slot, render_mode="rgb_array")
             for slot, name in enumerate(run.games)]
    tile, caption = SIZES[target.suffix]
    font, columns = ImageFont.load_default(caption * 5 // 8), math.ceil(math.sqrt(len(games)))
    size = (columns * tile, math.ceil(len(games) / columns) * (tile + caption))

    def pictures():
        for _ in show_progress(f"filming {target}", "pictures", range(FPS * SECONDS)):
            sheet = Image.new("RGB", size)
            draw = ImageDraw.Draw(sheet)
            for game in games:
                x, y = game.slot % columns * tile, game.slot // columns * (tile + caption)
                words = f"{game.name} {game.level}"
                if game.ended:
                    words = "solved" if game.solved else "not solved"
                color, middle = "#ffd166" if game.ended else "#ffffff", y + caption // 2
                draw.text((x + caption // 4, middle), words, color, font, "lm")
                draw.text((x + tile - caption // 4, middle), f"return {game.total:g}", color, font, "rm")
                sheet.paste(Image.fromarray(game.picture).reduce(HUMAN // tile), (x, y + caption))
            yield sheet
            actions = policy.act()
            for game in games:
                game.advance(actions)

    write_gif(pictures(), target) if target.suffix == ".gif" else write_film(pictures(), size, target)


def write_gif(pictures, target):
    """Writes some of the pictures, in as many colors as the bytes allow. They have one palette, so that what stands
    still is stored once."""
    from PIL import Image

    pictures = list(itertools.islice(pictures, 0, None, GIF_EVERY))
    sample = Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures[::10]]))
    for colors in GIF_COLORS:
        palette, file = sample.quantize(colors), io.BytesIO()
        first, *rest = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
        first.save(file, "GIF", save_all=True, append_images=rest, duration=1000 * GIF_EVERY // FPS, loop=0)
        if file.tell() <= GIF_BYTES:
            break
    target.write_bytes(file.getvalue())


def write_film(pictures, size, target):
    """Writes pictures of that size (width, height) with ffmpeg."""
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "{}x{}".format(*size), "-r", str(FPS)]
    encoded = ["-pix_fmt", "yuv420p", "-crf", "20", "-movflags", "+faststart"]
    command = [find_ffmpeg(), "-y", "-loglevel", "error", *raw, "-i", "-", *encoded, target.resolve()]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as ffmpeg:
        for picture in pictures:
            ffmpeg.stdin.write(picture.tobytes())
        ffmpeg.stdin.close()
    if ffmpeg.returncode:
        raise OSError(f"ffmpeg could not write {target}")


def curves(folder):
    """The scalars in a run's TensorBoard files: {tag: (steps, values)}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each resume, where nothing is missing
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: np.array([(event.step, event.value) for event in events.Scalars(tag)]).T
            for tag in events.Tags()["scalars"]}


def styles(models):
    """{model: how its curves and points look}. An agent has the same color in all pictures, by its name; agents of one
    color differ in line and marker."""
    found, taken = {}, Counter()
    for model in models:
        name = re.sub(r" --total-steps \S+", "", model.split(",")[0])
        index = AGENTS.index(name) if name in AGENTS else zlib.crc32(name.encode()) % len(COLORS)
        number = taken[index]
        taken[index] += 1
        found[model] = dict(color=COLORS[index], linestyle=LINES[number % len(LINES)],
                            marker=MARKERS[(index + number) % len(MARKERS)])
    return found


def short_names(models):
    """What stands below the scores: names as they are, or where they are too long, a number."""
    long = [model for model in models if len(model) > LONG]
    return {model: f"{model.split()[0]} ({long.index(model) + 1})" if model in long else model for model in models}


def plot(runs, rows, scalars, target, published=None):
    """Draws the returns of training and, if a run has any, of validation, and beside them the scores of each split: the
    mean of all games, and each game. scalars: what `curves` returns, of each run. published: an agent of others, to
    compare with: its name and steps, and its scores {column: [of each of these steps]}, normalized and of each game."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    models = list(dict.fromkeys(run.model for run in runs))
    style, short = styles(models), short_names(models)
    found = [(run.model, curve) for run, curve in zip(runs, scalars)]
    games = list(runs[0].records[0]["games"])
    across = min(3, math.ceil(math.sqrt(len(games))))
    down = math.ceil(len(games) / across)
    names = [textwrap.fill(model if short[model] == model else f"{short[model]} = {model}", 170) for model in models]
    if published:
        most = max(run.records[0]["step"] for run in runs)
        at = max((n for n, step in enumerate(published["steps"]) if step <= most), default=0)
        published = published | dict(reached=at)
        steps = published["steps"][at] / 1e6
        names.append(f"{published['name']} (published; beside the curves, after {steps:g} M steps)")
    columns = 1 if max(map(len, names)) > 80 else 2 if max(map(len, models)) > 40 else 4
    legend = 0.15 * (sum(name.count("\n") + 1 for name in names) if columns == 1 else math.ceil(len(names) / columns))
    figure = plt.figure(figsize=(12, 4.6 + 2.4 * down + legend), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(4.6, 2.4 * down))
    measure = "normalized" if any(row["measure"] == "normalized" for row in rows) else "return"
    mean = "normalized_return/mean" if measure == "normalized" else "return/mean"
    about = ["running means"] + ["band: all seeds"] * (len(runs) > len(models))
    about += ["dotted: validation"] * any(tag.startswith("valid_") for curve in scalars for tag in curve)
    name = f"{mean.split('/')[0].replace('_', ' ')}, mean of the training games ({'; '.join(about)})"
    by_panel = {(row["game"], row["measure"]): [] for row in rows}
    for row in rows:
        by_panel[row["game"], row["measure"]].append(row)
    (scores,) = draw_panels(top, 1, [(name, mean, by_panel["all", measure])], found, style, published)
    number = f"mean of {len(games)} games" if len(games) > 1 else games[0]
    hollow = "\n(hollow: training levels)" if any(row["split"] == "train" for row in rows) else ""
    scores.set_title(f"scores, {number}, 95 % intervals{hollow}", loc="left")
    below = [short[model].replace("$", r"\$") for model in models]
    scores.set_xticks(range(len(models)), below, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
    if len(games) > 1 or measure == "normalized":
        panels = [(f"{game}, return", f"return/{game}", by_panel[game, "return"]) for game in games]
        draw_panels(bottom, across, panels, found, style, published)
    handles = [plt.Line2D([], [], **look) for look in style.values()]
    handles += [plt.Line2D([], [], **PUBLISHED)] * (published is not None)
    names = [name.replace("$", r"\$") for name in names]  # between two, it would be mathematics
    figure.legend(handles, names, loc="outside lower left", ncols=columns, fontsize=8, handlelength=3.5)
    figure.savefig(target)
    plt.close(figure)


def draw_panels(figure, across, panels, found, style, published):
    """For each (title, tag, rows) learning curves and, on the same scale, scores. Returns the axes of the latter."""
    rows = math.ceil(len(panels) / across)
    pairs = figure.subplots(rows, 2 * across, squeeze=False, width_ratios=(2, 1) * across).reshape(-1, 2)
    for (left, right), (title, tag, rows) in zip(pairs, panels):
        draw_curves(left, found, tag, style)
        left.set_title(title, loc="left")
        right.sharey(left)
        right.tick_params(labelleft=False)
        draw_scores(right, rows, style)
        if published:
            kind, of = tag.split("/")
            draw_published(left, right, published["steps"], published[kind][of], published["reached"])
    for axis in pairs[len(panels):].flat:
        axis.remove()
    return pairs[:len(panels), 1]


def draw_curves(axis, found, tag, style):
    for number, (model, look) in enumerate(style.items()):
        apart = dict(markevery=(0.16 * number / len(style), 0.16), markersize=4)  # fractions of the picture
        for name, line in ((tag, look | apart), (f"valid_{tag}", dict(color=look["color"], linestyle=":"))):
            seeds = [scalars[name] for its_model, scalars in found if its_model == model and name in scalars]
            seeds = [(steps, running_mean(values)) for steps, values in seeds]
            if not seeds:
                continue
            steps = seeds[0][0][seeds[0][0] <= min(steps[-1] for steps, _ in seeds)]  # as far as all of them reach
            values = np.array([np.interp(steps, *seed) for seed in seeds])
            if len(seeds) > 1:
                low, high, color = values.min(0), values.max(0), look["color"]
                axis.fill_between(steps / 1e6, low, high, color=color, alpha=0.15, linewidth=0)
            axis.plot(steps / 1e6, values.mean(0), linewidth=1.5, **line)
    axis.set_xlabel("steps, millions")
    if not axis.lines:
        axis.text(0.5, 0.5, f"no {tag} in TensorBoard files\nbeside the checkpoint", ha="center", va="center",
                  transform=axis.transAxes, color="#666666")


def running_mean(values):
    """The mean of each value and its neighbours, as many to either side as one in 40."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def draw_scores(axis, rows, style):
    """A point for each model and split, the fuller the fewer of its levels were trained on."""
    rows = [row for row in rows if row["split"] != "gap"]
    models, splits = list(style), [split for split in FILLED if any(row["split"] == split for row in rows)]
    for row in rows:
        look, filled = style[row["model"]], FILLED[row["split"]]
        x = models.index(row["model"]) + 0.5 * (splits.index(row["split"]) + 0.5) / len(splits) - 0.25
        ends = [row["value"] if row[end] is None else row[end] for end in ("low", "high")]
        errors = np.abs(np.array(ends)[:, None] - row["value"])
        axis.errorbar(x, row["value"], errors, linestyle="", marker=look["marker"], markersize=5, fillstyle=filled,
                      markerfacecoloralt="white", elinewidth=1, capsize=2, color=look["color"])
    axis.set(xticks=[], xlim=(-0.5, len(style) - 0.5))


def draw_published(left, right, steps, scores, reached):
    """Lines of another agent's scores: at its steps, as far as the curves go, and after so many of them."""
    limits = left.get_xlim()
    left.plot(np.array(steps) / 1e6, scores["train"], **PUBLISHED)
    left.set_xlim(limits)
    for column, words, place in (("train", "training", "bottom"), ("test", "new", "top")):
        y = scores[column][reached]
        right.axhline(y, **PUBLISHED)
        right.annotate(f"{words}\nlevels", (1.01, y), xycoords=("axes fraction", "data"), va=place, fontsize=6)


def record(function):
    """Calls a function that runs an agent. Returns what it returns, and of each self-referential layer what it did in the
    first environment: its rates beta (4, H), and the norm of what W has changed by after the step, relative to W's,
    (H,)."""
    layers = []

    def hook(x, W, state, done, y, new_state):
        W_t = W + state[0] * ~done[0, 0]  # (H, D, Y + 2D + 4)
        beta = torch.einsum("hi,hij->jh", x[0, 0], W_t[..., -4:]).sigmoid()
        layers.append((beta.cpu().numpy(), (new_state[0].norm(dim=(1, 2)) / W.norm(dim=(1, 2))).cpu().numpy()))

    with srwm_cuda.register_forward_hook(hook):
        return function(), layers


def check_probe(run):
    """Raises ValueError unless the run's agent has self-referential layers."""
    device = next(run.agent.parameters()).device
    frame = torch.zeros(1, 1, *run.script.FRAME_SHAPE, dtype=torch.uint8, device=device)
    number = torch.zeros(1, 1, device=device)
    with torch.no_grad():
        _, layers = record(lambda: run.agent(frame, number, number.bool(), run.agent.initial_state(1)))
    if not layers:
        raise ValueError(f"--probe needs a run whose layers call srwm_cuda.srwm; those of {run.about['script']} do not")


def probe(run, policy, target):
    """Plays the first level of the first game, and draws for each self-referential layer the four learning rates that
    it chooses at each step, and how far its matrix has moved from where it began."""
    torch.set_num_threads(1)
    game = Game(run.games[0], run.splits[0], policy, 0)
    steps, frames, rewards = [], [], []
    line = show_progress(f"playing level {game.level} of {game.name}", " steps")  # nobody knows how many
    while not game.ended:
        actions, layers = record(policy.act)
        steps.append(layers)
        frames.append(game.frame.copy())
        rewards.append(game.step(actions))
        line.update()
    line.close()
    draw_probe(steps, frames, np.array(rewards), f"{run.model} ({run.about['step']:,} steps of training) plays "
               f"{game.name}, {policy.args.distribution_mode}, level {game.level}: return {game.total:g}", target)


def draw_probe(steps, frames, rewards, title, target):
    """steps[t][layer] is what `record` returns; frames[t] what the agent saw, rewards[t] what it got for its action."""
    import matplotlib.pyplot as plt

    layers, count, time = len(steps[0]), len(steps), np.arange(len(steps))
    plt.rcParams.update(STYLE)
    figure = plt.figure(figsize=(4 + 5 * layers, 11.5), layout="constrained")
    grid = figure.add_gridspec(7, layers, height_ratios=(1.15, 0.35, 1, 1, 1, 1, 1.25))
    title = title.replace("$", r"\$") + "\nthin lines: heads; thick: their mean; vertical: rewards"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    rates = np.array([[beta for beta, _ in step] for step in steps])  # (T, layers, 4, H)

    shown = np.unique(np.linspace(0, count - 1, 5 * layers).round().astype(int))
    strip = figure.add_subplot(grid[0, :])
    framed = [np.pad(frames[t], ((0, 0), (2, 2), (0, 0)), constant_values=255) for t in shown]
    strip.imshow(np.concatenate(framed, axis=1))
    strip.set_xticks(34 + 68 * np.arange(len(shown)), [f"step {t}" for t in shown])
    strip.tick_params(length=0)
    strip.set_yticks([])
    strip.spines[:].set_visible(False)

    for layer in range(layers):
        axes = [figure.add_subplot(grid[1, layer])]
        axes[0].bar(time + 1, rewards, width=max(1, count / 300), color=np.where(rewards < 0, BAD, GOOD))
        axes[0].set_title(f"layer {layer + 1}", loc="left", fontweight="bold")
        axes[0].set_ylabel("reward")
        for i, name in enumerate(RATES):
            axes.append(figure.add_subplot(grid[2 + i, layer], sharex=axes[0]))
            draw_heads(axes[-1], rates[:, layer, i], COLORS[i])
            axes[-1].set_ylim(rates.min() - 0.02, rates.max() + 0.02)  # one scale for all
            axes[-1].set_title(name, loc="left", fontsize=9)
        axes.append(figure.add_subplot(grid[6, layer], sharex=axes[0]))
        draw_heads(axes[-1], np.array([step[layer][1] for step in steps]), COLORS[5])
        axes[-1].set(ylim=(0, None), xlim=(0, count), xlabel="step of the episode")
        axes[-1].set_title(r"$\|\Delta W\| / \|W_0\|$, what the matrix has changed by", loc="left", fontsize=9)
        for axis in axes:
            axis.tick_params(labelbottom=axis is axes[-1])
            for t in np.flatnonzero(rewards):
                axis.axvline(t + 1, color=BAD if rewards[t] < 0 else GOOD, alpha=0.25, linewidth=0.8, zorder=0)
    figure.savefig(target)
    plt.close(figure)


def draw_heads(axis, values, color):
    axis.plot(values, color=color, alpha=0.3, linewidth=0.6)
    axis.plot(values.mean(-1), color=color, linewidth=1.8)
