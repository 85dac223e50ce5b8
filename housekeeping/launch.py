"""Processes that torchrun starts together: who each is, and what they agree on before they train."""

import contextlib
import functools
import os
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from . import processes

NUMBERS = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}  # which torchrun sets
RANK, LOCAL_RANK, NUM_PROCESSES, NUM_LOCAL = (
    int(os.environ[name]) if os.environ.get(name, "").isdecimal() else default for name, default in NUMBERS.items())


@functools.cache  # as it is before keep_to_own_cores
def num_cores():
    """Cores for this process: of those that it may use, its share, where torchrun started several on this machine."""
    return max(1, processes.num_cores() // NUM_LOCAL)


def keep_to_own_cores():
    """Keeps this process, and those that it starts from now on, on its share of the cores, where torchrun started several
    on this machine: neighbours, so that memory and caches of one socket serve the same processes always. Nothing is done
    where the launcher has already given each its own."""
    if num_cores() and NUM_LOCAL > 1 and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            cores = sorted(os.sched_getaffinity(0), key=place_of)
            own = cores[len(cores) * LOCAL_RANK // NUM_LOCAL : len(cores) * (LOCAL_RANK + 1) // NUM_LOCAL]
            if own and os.sched_getaffinity(os.getppid()) == set(cores):
                os.sched_setaffinity(0, own)


def place_of(core, root="/"):
    """Socket, physical core and number of what Linux calls a core: it numbers the second threads of all physical cores
    after the first ones of all sockets."""
    folder = Path(root, f"sys/devices/system/cpu/cpu{core}/topology")
    with contextlib.suppress(OSError, ValueError):
        return *(int((folder / name).read_text()) for name in ("physical_package_id", "core_id")), core
    return 0, core, core


class Launch:
    """A store for processes that torchrun started together, and for those that it starts after one of them has died."""

    def __init__(self):
        self.store, of_torchrun = dist.HashStore(), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        given = os.environ.keys() & NUMBERS
        for name in sorted(given | {"RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"} if given else ()):
            value = os.environ.get(name, "")
            if not value or name != "MASTER_ADDR" and not value.isdecimal():
                raise ValueError(f"{name} is '{value}' in the environment, where torchrun sets it beside others: start "
                                 f"with torchrun, or with none of {', '.join(NUMBERS)}")
        if not (RANK < NUM_PROCESSES and LOCAL_RANK < NUM_LOCAL):
            raise ValueError(f"RANK {RANK} must be less than WORLD_SIZE {NUM_PROCESSES}, and LOCAL_RANK {LOCAL_RANK} "
                             f"less than LOCAL_WORLD_SIZE {NUM_LOCAL}")
        if NUM_PROCESSES > 1 or of_torchrun:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            try:
                self.store = dist.TCPStore(address, port, is_master=RANK == 0 and not of_torchrun)
            except dist.DistError as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"no connection by MASTER_ADDR {address} and MASTER_PORT {port}: {reason}") from None
        keep_to_own_cores()

    def agree(self, find):
        """The path, or None, that the first process finds, for all; after a crash, that of the run that crashed. The store
        may still hold keys of an attempt before. So each process asks under a new random name, and the first answers until
        all have heard. The answer names this attempt too, since machines may count restarts differently."""
        me = os.urandom(16).hex()
        if RANK == 0:
            crashed = os.fsdecode(self.store.get("run")) if self.store.check(["run"]) else ""  # see remember()
            answer = f"{me} {crashed or find() or ''}"
            while not all(self.store.check([f"{answer} heard by {rank}"]) for rank in range(1, NUM_PROCESSES)):
                for rank in range(1, NUM_PROCESSES):
                    if self.store.check([f"{rank} asks"]):  # maybe one that died
                        self.store.set(f"to {self.store.get(f'{rank} asks').decode()}", answer)
                time.sleep(0.05)
        else:
            self.store.set(f"{RANK} asks", me)
            while not self.store.check([f"to {me}"]):  # unlike a wait for it, open to signals
                time.sleep(0.05)
            answer = self.store.get(f"to {me}").decode()
            self.store.set(f"{answer} heard by {RANK}", "")
        self.attempt, _, path = answer.partition(" ")
        return Path(path) if path else None

    def remember(self, folder):
        """Lets an attempt after a crash go on with the run in this folder, which has a checkpoint now."""
        self.store.set("run", os.fsencode(folder))

    def join(self, backend, step):
        """Connects the processes, whose gradients are averaged. Raises RuntimeError if they begin at different steps."""
        store = dist.PrefixStore(self.attempt, self.store)
        dist.init_process_group(backend, store=store, rank=RANK, world_size=NUM_PROCESSES,
                                timeout=timedelta(minutes=30))
        steps = [None] * NUM_PROCESSES
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            dist.destroy_process_group()
            raise RuntimeError(f"the processes do not go on from the same checkpoint, but from steps {steps}")
