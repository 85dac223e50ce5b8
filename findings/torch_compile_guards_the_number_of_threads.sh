#!/usr/bin/env bash
# torch 2.13.0 (CPU, Python 3.11, g++): set_num_threads holds for the thread that calls it and for threads that are started
# later, but not for those that run already, the main one neither. And torch.compile compiles a function again in a thread
# whose number of threads differs from that of the first compilation. So a program that compiles a network and then starts
# threads that act with it waits for the compiler once more where one of them sets its own number.
#
# Seen on 30 November 2026: main thread 2; a thread sets 1, then main still has 2 and a third thread has 1. A function that
# main had compiled is used as it is in the thread, and compiled once more there after set_num_threads(1).
#
# Fails if set_num_threads changes other threads, if later threads do not have it, or if nothing is compiled again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy==1.26.4 2>/dev/null
cat >threads.py <<'PYTHON'
from concurrent.futures import ThreadPoolExecutor

import torch
from torch._dynamo.utils import counters


def graphs():
    return counters["stats"]["unique_graphs"]


def in_a_new_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def acts():
    compiled(x)
    as_it_was = graphs()
    torch.set_num_threads(1)
    compiled(x)
    return as_it_was, graphs()


torch.set_num_threads(2)
compiled, x = torch.compile(lambda x: (2 * x).tanh()), torch.ones(64)
compiled(x)
assert graphs() == 1
before, after = in_a_new_thread(acts)
print(f"compiled for main: 1; used in a thread: {before}; after set_num_threads(1) there: {after}")
main, later = torch.get_num_threads(), in_a_new_thread(torch.get_num_threads)
print(f"then main has {main} threads, and one that is started later {later}")
assert (before, after) == (1, 2), "the number of threads is not guarded"
assert (main, later) == (2, 1), "set_num_threads has another scope"
PYTHON
venv/bin/python threads.py
