"""Processes that share memory with the one that starts them, and what a process may use of a machine."""

import contextlib
import ctypes
import gc
import math
import mmap
import os
import signal
import sys
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import torch

STUCK_AFTER = 20  # seconds without an answer


def shared_zeros(dtype, *shape):
    """A tensor in anonymous memory, which processes that are forked share: nothing is left of it when all have ended."""
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def fork(function, *arguments):
    """Starts a process that calls the function, and ends when the calling thread does. Returns its number.

    It is forked, to share what has been loaded, such as the 350 MB of the engine's pictures. It must not use CUDA, nor locks
    that other threads may hold. SIGINT and SIGTERM, which terminals and schedulers send to all, do not end it: its parent does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of threads
        parent, pid = os.getpid(), os.fork()
    if pid:
        return pid
    try:
        gc.freeze()  # the parent's leftover engines stay: to close one while another is made can lock up cffi
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            sys.stderr = open(2, "w", closefd=False)  # in a notebook it is something else
        libc = ctypes.CDLL(None)
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, for a parent that is killed
        libc.prctl(29, 1000)  # PR_SET_TIMERSLACK, in nanoseconds: a short sleep is short
        for number in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):
                if number > 2:
                    os.close(number)  # locks of files, sockets
        torch.set_num_threads(1)
        if os.getppid() == parent:
            function(*arguments)
    except BaseException:
        sys.__excepthook__(*sys.exc_info())
    finally:
        os._exit(1)


def exit_status(pid):
    """How a process that was forked here ended, in words; None if it runs."""
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return "status unknown"
    if not ended:
        return None
    code = os.waitstatus_to_exitcode(status)
    return f"with status {code}" if code >= 0 else f"by {signal.Signals(-code).name}"


def end(pids):
    """Kills processes that were forked here, and forgets their numbers."""
    for pid in pids:
        if not exit_status(pid):
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # whoever ignores SIGCHLD, as its parent did, cannot wait
                os.waitpid(pid, 0)
    pids.clear()


class Workers:
    """Processes that answer to flags in shared memory, until they are closed or their owner is collected.

    Args:
        function: what each calls with its own part of `work`.
        flags: tensors (n, 16) int32 in shared memory, a row for what one worker does: a flag, which it sets to 0 when it
            has done it, how often it has, and its number.
    """

    def __init__(self, function, work, flags):
        self.pids, self.flags, self.looked = [], flags, time.monotonic()
        self.steps = self.waited = 0  # of each row, when `check` looked last
        self.close = weakref.finalize(self, end, self.pids)
        self.pids.extend(fork(function, each) for each in work)

    def check(self):
        """Raises ChildProcessError if a process has ended, TimeoutError if one does not answer."""
        for number, pid in enumerate(self.pids):
            if status := exit_status(pid):
                raise ChildProcessError(f"process {number} of the engine ended {status}")
        now, flags = time.monotonic(), np.concatenate([each.numpy() for each in self.flags])
        waits = (flags[:, 0] == 1) & (flags[:, 1] == self.steps)
        passed = min(1, now - self.looked)  # not the time that Ctrl-Z has stopped all
        self.steps, self.waited, self.looked = flags[:, 1], np.where(waits, self.waited + passed, 0), now
        if self.waited.max() > STUCK_AFTER:
            owner = flags[self.waited.argmax(), 2]
            raise TimeoutError(f"process {owner} of the engine has not answered for {STUCK_AFTER} seconds")

    def release(self, threads):
        """Waits for threads that wait for flags of closed workers, which nobody sets any more."""
        begin = time.monotonic()
        while any(thread.is_alive() for thread in threads) and time.monotonic() - begin < STUCK_AFTER:
            for each in self.flags:
                each.zero_()
            time.sleep(0.01)


def rest(idle):
    """Lets others run, after so many seconds without work: the longer it is, the later work is noticed."""
    os.sched_yield() if idle < 2e-4 else time.sleep(min(2e-3, idle / 10))


def num_cores(root="/"):
    """Cores that this process may run on, or as much of their time as its container may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    groups = Path(root, "proc/self/cgroup")  # lines such as 0::/a/b, in version 1 4:cpu,cpuacct:/a/b
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, group = line.split(":", 2)
        folder = Path(root, "sys/fs/cgroup", controllers, group.lstrip("/"))
        files = ["cpu.cfs_quota_us", "cpu.cfs_period_us"] if controllers else ["cpu.max"]
        for above in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit here
                quota, period = map(int, " ".join((above / file).read_text() for file in files).split())
                cores = min(cores, math.ceil(quota / period)) if quota > 0 else cores
    return cores


def keep_freed_memory():
    """Lets glibc keep what is freed: to map a large tensor's memory anew costs a CPU a sixth of its speed."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest that there is
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
