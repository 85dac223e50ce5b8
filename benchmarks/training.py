"""Whole training runs on a machine that does nothing else: steps a second, their ratio to the first run's, policy lag,
return and memory, as a Markdown table.

    python benchmarks/training.py agents                       the seven agents of the paper, two minutes each
    python benchmarks/training.py agents --steps 10000000      the same for ten million steps each
    python benchmarks/training.py costs --seconds 20           one agent: cores, environments, games, batch, head size
    python benchmarks/training.py costs --only "default|game"  those rows alone
    python benchmarks/training.py costs --turns 5 --seconds 8  by turns of 8 seconds, where others use the machine too
    python benchmarks/training.py scaling                      one agent on 1, 2, 4, ... GPUs, each with its cores
    python benchmarks/training.py agents --env maze            what it does not know goes to the scripts

The runs stay under benchmarks/runs/, for TensorBoard and evaluate.py, whose newest run they are not. One after another,
steps a second are a mean from the first status line ten seconds after training began to the last. By turns, all runs
are in memory, and all but one are stopped: a ratio is that of two turns in one round, so that a host that is slower for
a while slows both.
"""

import argparse
import atexit
import contextlib
import importlib
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PROJECT = Path(__file__).resolve().parent.parent
FOLDER = PROJECT / "benchmarks"  # in whose runs/ the runs are
WARM_UP = 10  # seconds
SETTLE = 2  # seconds after a turn's begin that do not count
AGENTS = {"ff": "ff", "srwm": "srwm", "srwm, state reset": "srwm --no-carry-state", "sr_delta": "sr_delta",
          "delta": "delta", "lstm": "lstm", "fake_sr": "fake_sr"}
ENVIRONMENTS = {  # actors and environments of each, by whether there is a GPU
    True: ("2 x 24", "1 x 96", "2 x 96", "4 x 96", "8 x 72", "8 x 84", "8 x 96", "4 x 180", "8 x 192"),
    False: ("1 x 36", "1 x 72", "2 x 36")}


def settings(which, script):
    """Name, command line, number of cores and of processes of each run."""
    cores = num_cores(script)
    if which == "agents":
        return [(name, words, cores, 1) for name, words in AGENTS.items()]
    if which == "scaling":
        gpus = torch.cuda.device_count()
        rows = [(f"{n} GPU{'s' * (n > 1)}", script, cores * n // gpus, n) for n in (1, 2, 4, 8) if n <= gpus]
        return [rows[0], ("1 GPU, all cores", script, cores, 1), *rows[1:]] if gpus > 1 else rows
    runs = [("default", "", cores)]
    runs += [(f"{n} core{'s' * (n > 1)}", "", n) for n in (1, 2, 4, 8, 16, 32) if n < cores]
    runs += [(f"{size} environments", "--num-actors {} --num-envs {}".format(*size.split(" x ")), cores)
             for size in ENVIRONMENTS[torch.cuda.is_available()]]
    runs += [(f"{n} game{'s' * (n > 1)}", f"--multi-env {n}", cores) for n in (1, 3, 12, 16)]
    runs += [(f"batch of {n}", f"--batch-size {n}", cores) for n in (16, 64, 96)]
    runs += [(f"heads of {128 // n}", f"--num-head {n}", cores) for n in (16, 4, 2)]
    runs += [("float32", "--bf16 False", cores), ("validation", "--valid-num-levels 200", cores)]
    runs += [("no graphs", "--no-cuda-graphs", cores)] * torch.cuda.is_available()
    return [(name, f"{script} {words}", cores, 1) for name, words, cores in runs]


def num_cores(script):
    """The cores that a run of this script would use here."""
    sys.path.insert(0, str(PROJECT))
    return importlib.import_module(f"impala_procgen_{script}").num_cores()


def gpu_memory():
    """Memory in use on the first GPU that this process may use, in GB."""
    if not torch.cuda.is_available():
        return 0.0
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    words = f"nvidia-smi --id={gpu} --query-gpu=memory.used --format=csv,noheader,nounits".split()
    return int(subprocess.run(words, text=True, capture_output=True, check=True).stdout) / 1024


class Run:
    """A training process, and the time and step of each status line that it has printed."""

    def __init__(self, number, words, cores, processes):
        script, *words = words.split()
        self.exp_name, self.lines = f"benchmark_{os.getpid()}_{number}", []
        launch = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split() if processes > 1 else []
        path = PROJECT / f"impala_procgen_{script}.py"
        self.command = [sys.executable, *launch, path, *words, "--exp-name", self.exp_name]
        own_cores = sorted(os.sched_getaffinity(0))[:cores]
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True, start_new_session=True,
                                        cwd=FOLDER, preexec_fn=lambda: os.sched_setaffinity(0, own_cores))
        atexit.register(self.process.terminate if processes > 1 else self.process.kill)  # also one that is stopped
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:
            if status := re.match(r"step ([\d,]+) of", line):
                self.lines.append((time.time(), int(status[1].replace(",", ""))))

    def since(self, begin):
        """Seconds and steps between the first and the last status line after this time."""
        lines = [line for line in self.lines if line[0] >= begin] or [(0, 0)]
        return lines[-1][0] - lines[0][0], lines[-1][1] - lines[0][1]

    def wait(self, until):
        """Waits until something is true of this run. Ends the benchmark if the run ends without."""
        while not until():
            # Has it ended? It is left to `end` to reap.
            if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                self.reader.join()
                if until():
                    return
                sys.exit(f"{' '.join(map(str, self.command))}: ended too early")
            time.sleep(0.1)

    def signal(self, number):
        """Sends a signal to the process and to those that it started."""
        os.killpg(self.process.pid, number)

    def memory(self):
        """Host memory of the process and of those that it started, in GB; what several share counts once."""
        total = 0
        for path in Path("/proc").glob("[0-9]*/smaps_rollup"):
            with contextlib.suppress(OSError):  # has ended, or is another user's
                if os.getpgid(int(path.parent.name)) == self.process.pid:
                    total += int(re.search(r"^Pss: +(\d+)", path.read_text(), re.MULTILINE)[1])
        return total / 2**20

    def turn(self, seconds):
        """Lets this run go on for a while. Returns steps a second."""
        self.signal(signal.SIGCONT)
        begin = time.time() + SETTLE
        self.wait(lambda: self.since(begin)[0] >= seconds)
        self.signal(signal.SIGSTOP)
        seconds, steps = self.since(begin)
        return steps / seconds

    def whole(self, seconds, steps):
        """Lets this run go on until enough is measured. Returns steps a second and their number."""
        self.wait(lambda: self.lines)
        begin = self.lines[0][0] + WARM_UP - 5  # the first comes after five seconds
        self.wait(lambda: self.since(begin)[0] > 0 and self.lines[-1][1] >= steps if steps
                  else self.since(begin)[0] >= seconds)
        seconds, done = self.since(begin)
        return done / seconds, self.lines[-1][1]

    def end(self):
        """Ends the run. Returns its policy lag and normalized return, means over the last tenth, and its memory in GB."""
        memory = self.memory()
        os.kill(self.process.pid, signal.SIGTERM)
        self.signal(signal.SIGCONT)
        _, status = os.waitpid(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        of_torchrun = "torch.distributed.run" in self.command  # which says 1 when it was told to stop
        if self.process.returncode and not of_torchrun:
            sys.exit(f"{' '.join(map(str, self.command))}: exit status {self.process.returncode}")
        (run,) = (FOLDER / "runs").glob(f"{self.exp_name}__*")
        log, means = EventAccumulator(str(run)).Reload(), []
        for tag in ("policy_lag", "normalized_return/mean"):
            events = log.Scalars(tag) if tag in log.Tags()["scalars"] else []
            last = [event.value for event in events if event.step >= 0.9 * events[-1].step]
            means.append(statistics.mean(last or [float("nan")]))
        return *means, memory


def one_after_another(rows, seconds, steps):
    print("| run | steps a second | ratio | steps | policy lag | mean normalized return | host memory, GB "
          "| GPU memory, GB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    base = None
    for number, (name, *row) in enumerate(rows):
        run = Run(number, *row)
        (speed, last), memory = run.whole(seconds, steps), gpu_memory()
        base = base or speed
        line = "| {} | {:,.0f} | {:.2f} | {:,} | {:.1f} | {:.3f} | {:.1f} | {:.1f} |"
        print(line.format(name, speed, speed / base, last, *run.end(), memory), flush=True)


def by_turns(rows, seconds, turns):
    runs = [Run(number, f"{words} --log-interval 0.5", *row) for number, (_, words, *row) in enumerate(rows)]
    for run in runs:
        run.wait(lambda run=run: run.lines)
        run.signal(signal.SIGSTOP)
    speeds = [[run.turn(seconds) for run in runs] for _ in range(turns)]  # (turns, runs)
    print("| run | steps a second, median (least, greatest) | ratio, median (least, greatest) | policy lag "
          "| host memory, GB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for run, (name, *_), column in zip(runs, rows, zip(*speeds)):
        ratios = [speed / row[0] for speed, row in zip(column, speeds)]
        lag, _, memory = run.end()
        words = [f"{statistics.median(x):{form}} ({min(x):{form}}, {max(x):{form}})"
                 for x, form in ((column, ",.0f"), (ratios, ".2f"))]
        print(f"| {name} | {words[0]} | {words[1]} | {lag:.1f} | {memory:.1f} |", flush=True)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("which", choices=("agents", "costs", "scaling"))
    parser.add_argument("--seconds", type=float, default=120, help="to measure each run for")
    parser.add_argument("--steps", type=int, help="to train each run for, instead")
    parser.add_argument("--turns", type=int, help="have all runs in memory, and let each go on so often")
    agents = sorted(path.stem.removeprefix("impala_procgen_") for path in PROJECT.glob("impala_procgen_*.py"))
    parser.add_argument("--agent", default="srwm", choices=agents, help="whose costs or scaling to measure")
    parser.add_argument("--only", default="", help="regular expression for the names of the runs to make")
    args, words_for_all = parser.parse_known_args()
    if args.turns and (args.steps or args.which == "scaling"):
        parser.error("--turns goes neither with --steps nor with scaling")
    rows = [(name, " ".join([words, *words_for_all]), *more) for name, words, *more in settings(args.which, args.agent)
            if re.search(args.only, name)]
    if args.only and not rows:
        parser.error(f"--only must match the name of a run, got {args.only}")
    if args.turns:
        by_turns(rows, args.seconds, args.turns)
    else:
        one_after_another(rows, args.seconds, args.steps)


if __name__ == "__main__":
    main()
