"""What processes that play ProcGen take to start, by the way they are started. As a Markdown table.

    python benchmarks/engine.py                                       16 processes, each way in three turns
    python benchmarks/engine.py --only "forked after a first engine"  that way alone
    python benchmarks/engine.py --processes 4 --num-envs 6 --turns 1  a shorter look

Each process has two vectors of the six games of --multi-env 6. Seconds and processor time are those from before a first
engine until all processes have played 20 steps, of all processes together; memory is theirs at that moment, and what
they share counts once. Medians of turns; of seconds also the least and the greatest. It measures procgen's package
alone, without PyTorch, so it needs Python 3.11 or 3.12.
"""

import argparse
import contextlib
import os
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

try:
    import gym_notices.notices

    gym_notices.notices.notices.clear()  # or gym announces its retirement in every process
    from procgen import ProcgenGym3Env
except ImportError:
    print("engine.py: error: it measures procgen's package, which is for Python 3.11 and 3.12", file=sys.stderr)
    sys.exit(2)

GAMES = "bigfish,fruitbot,maze,leaper,plunder,starpilot"
IMPORT = "import gym_notices.notices\n\ngym_notices.notices.notices.clear()\nimport procgen\n"
ENGINE = IMPORT + "procgen.ProcgenGym3Env(1, 'maze', num_threads=0)\n"
# How processes are started, and what runs before, in the process that forks them.
WAYS = {"forked after a first engine": ("fork", ENGINE), "from a fork server with an engine": ("forkserver", ENGINE),
        "forked before": ("fork", ""), "from a fork server with procgen imported": ("forkserver", IMPORT),
        "spawned": ("spawn", "")}


def play(num_envs, ready):
    try:
        engines, random = [ProcgenGym3Env(num_envs, GAMES, num_threads=0) for _ in range(2)], np.random.default_rng()
        for _ in range(20):
            for engine in engines:
                engine.act(random.integers(15, size=num_envs, dtype=np.int32))
                engine.observe()
    except BaseException:
        ready.abort()  # nobody shall wait for it
        raise
    ready.wait()
    ready.wait()  # until it was measured


def group():
    """Processor time in seconds and memory in GB of the processes of this one's group."""
    ticks = memory = 0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another one, which has ended
            if os.getpgid(int(path.name)) == os.getpgid(0):
                ticks += sum(map(int, (path / "stat").read_text().rpartition(")")[2].split()[11:13]))
                memory += int(re.search(r"^Pss: +(\d+)", (path / "smaps_rollup").read_text(), re.MULTILINE)[1])
    return ticks / os.sysconf("SC_CLK_TCK"), memory / 2**20


def start(way, num_processes, num_envs):
    """Starts the processes. Returns seconds, processor time and memory."""
    os.setsid()  # a group of its own, with a fork server that it starts
    method, before = WAYS[way]
    context, (earlier, _), begin = get_context(method), group(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if method == "forkserver":
            os.environ["PYTHONPATH"] = folder
            (Path(folder) / "run_before.py").write_text(before)
            context.set_forkserver_preload(["run_before"])
        else:
            exec(before, {})
        ready = context.Barrier(num_processes + 1, timeout=600)
        processes = [context.Process(target=play, args=(num_envs, ready), daemon=True) for _ in range(num_processes)]
        for process in processes:
            process.start()
        ready.wait()
        seconds, (now, memory) = time.monotonic() - begin, group()
        ready.wait()
        for process in processes:
            process.join()
    return seconds, now - earlier, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--num-envs", type=int, default=24, help="of each of its two vectors")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=WAYS, metavar="WAY", help="the first column of the table")
    args = parser.parse_args()
    for name in ("processes", "turns"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    if args.num_envs < 1 or args.num_envs % 6:
        parser.error(f"--num-envs must be a positive multiple of 6, the number of games, got {args.num_envs}")
    measured = {way: [] for way in WAYS if args.only in (None, way)}
    for way in list(measured) * args.turns:
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # a process without engine and fork server
            measured[way].append(fresh.submit(start, way, args.processes, args.num_envs).result())
    print("| | seconds | CPU seconds | memory, GB |\n| --- | ---: | ---: | ---: |")
    for way, turns in measured.items():
        seconds, cpu, memory = zip(*turns)
        print(f"| {way} | {statistics.median(seconds):.1f} ({min(seconds):.1f}, {max(seconds):.1f}) | "
              f"{statistics.median(cpu):.1f} | {statistics.median(memory):.2f} |")


if __name__ == "__main__":
    main()
