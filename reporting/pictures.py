"""What evaluate.py draws: a film of the agent, learning curves with scores, and what an SRWM does as it plays."""

import importlib.util
import io
import itertools
import math
import shutil
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import torch

import srwm_cuda
from reporting.playing import FPS, Game, show_progress

SECONDS = 30  # of a film
HUMAN = 512  # pixels, width and height of a picture for people
SIZES = {".mp4": (512, 32), ".gif": (128, 16)}  # pixels that a game takes in a film, and of the line above it
GIF_EVERY, GIF_BYTES = 3, 3_000_000  # which of the pictures it shows; the most that it may have
GIF_COLORS = (128, 64, 32, 16, 8)  # to try, until it has no more
ENDINGS = {"plot": (".png", ".pdf", ".svg"), "video": (".mp4", ".gif"), "probe": (".png", ".pdf", ".svg")}
COLORS = ("#2a6f97", "#c8553d", "#588157", "#7b5ea7", "#c99a2e", "#5f6b73", "#b5578b", "#3aa6a0")
GOOD, BAD = "#2e8b57", "#c8102e"  # rewards
ALPHA = {"train": 0.4, "mixed": 0.7, "validation": 0.85, "test": 1.0}  # of a split's scores
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


def film(run, policy, target):
    """Writes half a minute in which the agent plays all games side by side, level after level."""
    from PIL import Image, ImageDraw, ImageFont

    torch.set_num_threads(1)  # as when the agent is scored, so that these are the same episodes
    games = [Game(name, run.splits[0], policy, slot, render_mode="rgb_array")
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
                color, middle = "#ffd166" if game.ended else "#ffffff", y + caption // 2
                draw.text((x + caption // 4, middle), f"{game.name} {game.level}", color, font, "lm")
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

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: np.array([(event.step, event.value) for event in events.Scalars(tag)]).T
            for tag in events.Tags()["scalars"]}


def plot(runs, rows, scalars, target):
    """Draws the returns of training and, if a run has any, of validation, and beside them the scores of each split: the
    mean of all games, and each game. scalars: what `curves` returns, of each run."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    models = list(dict.fromkeys(run.model for run in runs))
    more = [plt.get_cmap("turbo")(x) for x in np.linspace(0.05, 0.95, len(models))]
    colors = dict(zip(models, COLORS if len(models) <= len(COLORS) else more))
    found = [(run.model, curve) for run, curve in zip(runs, scalars)]
    games = list(runs[0].records[0]["games"])
    across = min(3, len(games))
    down = math.ceil(len(games) / across)
    names = [textwrap.fill(model, 170) for model in models]
    legend = 0.15 * sum(name.count("\n") + 1 for name in names)  # inches
    figure = plt.figure(figsize=(12, 4 + 2.4 * down + legend), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(4, 2.4 * down))
    measure = "normalized" if any(row["measure"] == "normalized" for row in rows) else "return"
    mean = "normalized_return/mean" if measure == "normalized" else "return/mean"
    name = f"{mean.split('/')[0].replace('_', ' ')}, mean of the training games (running means; dashed: validation)"
    by_panel = {(row["game"], row["measure"]): [] for row in rows}
    for row in rows:
        by_panel[row["game"], row["measure"]].append(row)
    (scores,) = draw_panels(top, 1, [(name, mean, by_panel["all", measure])], found, colors)
    number = f"mean of {len(games)} games" if len(games) > 1 else games[0]
    scores.set_title(f"scores, {number}, 95 % intervals\n(pale: training levels)", loc="left")
    if len(games) > 1 or measure == "normalized":
        panels = [(f"{game}, return", f"return/{game}", by_panel[game, "return"]) for game in games]
        draw_panels(bottom, across, panels, found, colors)
    handles = [points for points in scores.containers if points.get_label() in models]
    names = [name.replace("$", r"\$") for name in names]  # between two, it would be mathematics
    figure.legend(handles, names, loc="outside lower left", ncols=1 if max(map(len, names)) > 80 else 2, fontsize=8)
    figure.savefig(target)
    plt.close(figure)


def draw_panels(figure, across, panels, found, colors):
    """For each (title, tag, rows) learning curves and, on the same scale, scores. Returns the axes of the latter."""
    rows = math.ceil(len(panels) / across)
    pairs = figure.subplots(rows, 2 * across, squeeze=False, width_ratios=(2, 1) * across).reshape(-1, 2)
    for (left, right), (title, tag, rows) in zip(pairs, panels):
        draw_curves(left, found, tag, colors)
        left.set_title(title, loc="left")
        right.sharey(left)
        right.tick_params(labelleft=False)
        draw_scores(right, rows, colors)
    for axis in pairs[len(panels):].flat:
        axis.remove()
    return pairs[:len(panels), 1]


def draw_curves(axis, found, tag, colors):
    for model, color in colors.items():
        for name, line in ((tag, "-"), (f"valid_{tag}", "--")):
            seeds = [scalars[name] for its_model, scalars in found if its_model == model and name in scalars]
            seeds = [(steps, running_mean(values)) for steps, values in seeds]
            for steps, values in seeds:
                axis.plot(steps / 1e6, values, line, color=color, linewidth=0.4 if len(seeds) > 1 else 1.6, alpha=0.8)
            if len(seeds) > 1:  # and their mean, as far as all of them reach
                steps = seeds[0][0][seeds[0][0] <= min(steps[-1] for steps, _ in seeds)]
                mean = np.mean([np.interp(steps, *seed) for seed in seeds], axis=0)
                axis.plot(steps / 1e6, mean, line, color=color, linewidth=1.6)
    axis.set_xlabel("steps, millions")
    if not axis.lines:
        axis.text(0.5, 0.5, f"no {tag} in TensorBoard files\nbeside the checkpoint", ha="center", va="center",
                  transform=axis.transAxes, color="#666666")


def running_mean(values):
    """The mean of each value and its neighbours, as many to either side as one in 40."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def draw_scores(axis, rows, colors):
    """A point for each model and split, the paler the more of its levels were trained on."""
    rows = [row for row in rows if row["split"] != "gap"]
    models, splits = list(colors), [split for split in ALPHA if any(row["split"] == split for row in rows)]
    last = {row["model"]: row["split"] for row in rows}  # which is in the legend
    for row in rows:
        x = models.index(row["model"]) + 0.5 * (splits.index(row["split"]) + 0.5) / len(splits) - 0.25
        ends = [row["value"] if row[end] is None else row[end] for end in ("low", "high")]
        errors = np.abs(np.array(ends)[:, None] - row["value"])
        axis.errorbar(x, row["value"], errors, fmt="o", markersize=4, elinewidth=1, capsize=2, color=colors[row["model"]],
                      alpha=ALPHA[row["split"]], label=row["model"] if row["split"] == last[row["model"]] else None)
    axis.set(xticks=[], xlim=(-0.5, len(colors) - 0.5))


def record(function, script):
    """Calls a function that runs an agent of this script. Returns what it returns, and of each self-referential layer
    what it did in the first environment: its rates beta (4, H), and the norm of what W has changed by after the step,
    relative to W's, (H,)."""
    layers, srwm = [], srwm_cuda.srwm
    places = [(module, name) for module in (srwm_cuda, script)  # a script may have imported the function by itself
              for name, value in vars(module).items() if value is srwm]

    def spy(x, W, state, done, *options, **more_options):
        y, new_state = srwm(x, W, state, done, *options, **more_options)
        W_t = W + state[0] * ~done[0, 0]  # (H, D, Y + 2D + 4)
        beta = torch.einsum("hi,hij->jh", x[0, 0], W_t[..., -4:]).sigmoid()
        layers.append((beta.cpu().numpy(), (new_state[0].norm(dim=(1, 2)) / W.norm(dim=(1, 2))).cpu().numpy()))
        return y, new_state

    try:
        for module, name in places:
            setattr(module, name, spy)
        return function(), layers
    finally:
        for module, name in places:
            setattr(module, name, srwm)


def check_probe(run):
    """Raises ValueError unless the run's agent has self-referential layers."""
    device = next(run.agent.parameters()).device
    frame, number = torch.zeros(1, 1, 64, 64, 3, dtype=torch.uint8, device=device), torch.zeros(1, 1, device=device)
    with torch.no_grad():
        _, layers = record(lambda: run.agent(frame, number, number.bool(), run.agent.initial_state(1)), run.script)
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
        actions, layers = record(policy.act, run.script)
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
