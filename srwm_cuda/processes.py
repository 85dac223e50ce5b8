"""Processes that share memory with the one that starts them, and what a process may use of a machine."""

import contextlib
import ctypes
import gc
import math
import mmap
import os
import signal
import sys
import warnings
from pathlib import Path

import torch


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
        gc.freeze()  # what the parent has left over stays: to close an engine while another is made can lock up cffi
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            sys.stderr = open(2, "w", closefd=False)  # in a notebook it is something else
        libc = ctypes.CDLL(None)
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, for a parent that is killed
        libc.prctl(29, 1000)  # PR_SET_TIMERSLACK, in nanoseconds: a short sleep is short
        for number in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):
                os.close(number) if number > 2 else None  # locks of files, sockets
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
    code = os.waitstatus_to_exitcode(status)
    return ended and (f"with status {code}" if code >= 0 else f"by {signal.Signals(-code).name}")


def end(pids):
    """Kills processes that were forked here, and forgets their numbers."""
    for pid in pids:
        if not exit_status(pid):
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # whoever ignores SIGCHLD, as its parent did, cannot wait
                os.waitpid(pid, 0)
    pids.clear()


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
