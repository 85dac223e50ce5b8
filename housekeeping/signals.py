"""SIGINT and SIGTERM, which let a run save and stop."""

import os
import signal
import threading
import time

from . import say
from .launch import NUM_PROCESSES


class Stop(threading.Event):
    """Set by SIGINT or SIGTERM in training: the run is saved. Before, or if one comes again, after a tenth of a second, it
    ends the process."""

    training = False

    def hear(self, number, frame):
        if not self.training:
            say("stopped before training began: there is nothing to save")
            os._exit(0)
        answer_signals([signal.SIG_IGN, signal.SIG_IGN])
        self.set()
        say(f"{signal.Signals(number).name}: saving and stopping (once more: stop at once)")
        time.sleep(0.1)  # a signal may arrive twice: at the process, and at its group
        answer_signals([signal.SIG_DFL, signal.SIG_DFL])

    def now(self):
        """Whether to stop at once, as only a process alone may: several stop after the same update."""
        return self.is_set() and NUM_PROCESSES == 1


def answer_signals(handlers):
    """Sets the handlers of SIGINT and SIGTERM. Returns those before. Only the main thread may; others do nothing."""
    if threading.current_thread() is threading.main_thread():
        return [signal.signal(*pair) for pair in zip((signal.SIGINT, signal.SIGTERM), handlers)]
