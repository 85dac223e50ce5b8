"""Whole training runs, one after another on a machine that does nothing else: steps a second, their ratio to the first run's,
policy lag, return and memory, as a Markdown table.

    python tests/benchmark_training.py agents                       the seven agents of the paper, two minutes each
    python tests/benchmark_training.py agents --steps 10000000      the same for ten million steps each
    python tests/benchmark_training.py costs --seconds 20           one agent: cores, environments, games, batch, head size
    python tests/benchmark_training.py costs --only "default|game"  those rows alone
    python tests/benchmark_training.py scaling                      one agent on 1, 2, 4, ... GPUs with as many cores for each
    python tests/benchmark_training.py agents --env maze            what it does not know goes to the scripts

The runs stay under runs/, for TensorBoard and evaluate.py. Steps a second are a mean, from the first status line ten seconds
after training began to the last.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
import impala_procgen_srwm as srwm  # noqa: E402

WARM_UP = 10  # seconds
AGENTS = {"ff": "ff", "srwm": "srwm", "srwm, state reset": "srwm --no-carry-state", "sr_delta": "sr_delta", "delta": "delta",
          "lstm": "lstm", "fake_sr": "fake_sr"}
ENVIRONMENTS = {  # actors and environments of each, by whether there is a GPU
    True: ("2 x 24", "1 x 96", "2 x 96", "4 x 96", "8 x 96", "4 x 192", "8 x 192"), False: ("1 x 36", "1 x 72", "2 x 36")}


def settings(which, script):
    """Name, command line, number of cores and of processes of each run."""
    cores, cuda = srwm.num_cores(), srwm.Args().cuda
    if which == "agents":
        return [(name, words, cores, 1) for name, words in AGENTS.items()]
    if which == "scaling":
        gpus = torch.cuda.device_count()
        return [(f"{n} GPU{'s' * (n > 1)}", script, cores * n // gpus, n) for n in (1, 2, 4, 8) if n <= gpus]
    runs = [("default", "", cores)]
    runs += [(f"{n} core{'s' * (n > 1)}", "", n) for n in (1, 2, 4, 8, 16, 32) if n < cores]
    runs += [(f"{size} environments", "--num-actors {} --num-envs {}".format(*size.split(" x ")), cores)
             for size in ENVIRONMENTS[cuda]]
    runs += [(f"{n} game{'s' * (n > 1)}", f"--multi-env {n}", cores) for n in (1, 3, 12, 16)]
    runs += [(f"batch of {n}", f"--batch-size {n}", cores) for n in (16, 64, 96)]
    runs += [(f"heads of {128 // n}", f"--num-head {n}", cores) for n in (16, 4, 2)]
    runs += [("float32", "--bf16 False", cores), ("validation", "--valid-num-levels 200", cores)]
    return [(name, f"{script} {words}", cores, 1) for name, words, cores in runs]


def gpu_memory():
    """Memory in use on the first GPU that this process may use, in GB."""
    if not srwm.Args().cuda:
        return 0.0
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    words = f"nvidia-smi --id={gpu} --query-gpu=memory.used --format=csv,noheader,nounits".split()
    return int(subprocess.run(words, text=True, capture_output=True, check=True).stdout) / 1024


def measure(number, words, cores, processes, seconds, steps):
    """Trains until enough is measured. Returns steps a second, steps, policy lag, normalised return, GB on GPU and host."""
    script, *words = words.split()
    name = f"benchmark_{os.getpid()}_{number}"
    launch = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split() if processes > 1 else []
    command = [sys.executable, *launch, PROJECT / f"impala_procgen_{script}.py", *words, "--exp-name", name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                               preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores]))
    lines, measured, memory = [], [], None  # (time, step) of each status line, and of those after the warm-up
    for line in process.stdout:
        if (status := re.match(r"step ([\d,]+) of", line)) and process.poll() is None:
            lines.append((time.time(), int(status[1].replace(",", ""))))
            measured = [at for at in lines if at[0] >= lines[0][0] + WARM_UP - 5]  # the first comes after five seconds
            enough = lines[-1][1] >= steps if steps else measured and lines[-1][0] - measured[0][0] >= seconds
            if enough and memory is None:
                memory = gpu_memory()
                process.send_signal(signal.SIGTERM)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and processes == 1 or len(measured) < 2:  # torchrun says 1 when it was told to stop
        sys.exit(f"{' '.join(map(str, command))}: exit status {process.returncode}, {len(lines)} status lines")
    (begin, first), (end, last) = measured[0], measured[-1]
    (run,) = Path("runs").glob(f"{name}__*")
    log = EventAccumulator(str(run)).Reload()

    def mean_of_last_tenth(tag):
        values = [event.value for event in log.Scalars(tag) if event.step >= 0.9 * last] if tag in log.Tags()["scalars"] else []
        return sum(values) / len(values) if values else float("nan")

    averages = [mean_of_last_tenth(tag) for tag in ("policy_lag", "normalized_return/mean")]
    return (last - first) / (end - begin), last, *averages, memory, usage.ru_maxrss / 2**20


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("which", choices=("agents", "costs", "scaling"))
    parser.add_argument("--seconds", type=float, default=120, help="to measure each run for")
    parser.add_argument("--steps", type=int, help="to train each run for, instead")
    parser.add_argument("--agent", default="srwm", help="whose costs or scaling to measure")
    parser.add_argument("--only", default="", help="regular expression for the names of the runs to make")
    args, words_for_all = parser.parse_known_args()
    print("| run | steps a second | ratio | steps | policy lag | mean normalised return | GPU memory, GB | host memory, GB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    base = None
    for number, (name, words, cores, processes) in enumerate(settings(args.which, args.agent)):
        if not re.search(args.only, name):
            continue
        sps, *rest = measure(number, " ".join([words, *words_for_all]), cores, processes, args.seconds, args.steps)
        base = base or sps
        row = "| {} | {:,.0f} | {:.2f} | {:,} | {:.1f} | {:.3f} | {:.1f} | {:.1f} |"
        print(row.format(name, sps, sps / base, *rest), flush=True)


if __name__ == "__main__":
    main()
