"""A run's curves, in TensorBoard's files and at Weights & Biases. Neither ends a run if it fails."""

import contextlib
import os

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard import SummaryWriter

from . import say


def cut_log(folder, step):
    """Cuts TensorBoard's files off after a checkpoint's step: what followed was lost. Returns the step of the last entry
    that is left and its events; if none is, the step after the checkpoint, and no events."""
    last = {}  # event of each tag
    for path in sorted(folder.glob("*tfevents*")):
        size = 0
        for record in RawEventFileLoader(str(path)).Load():  # ends before one that was cut in half
            event = Event.FromString(record)
            if event.step > step:
                os.truncate(path, size)
                break
            size += len(record) + 16  # in the file: with its length and two checksums
            last |= {value.tag: event for value in event.summary.value}
    newest = max([event.step for event in last.values()], default=step + 1)
    return newest, [event for event in last.values() if event.step == newest]


class Log:
    """Scalars by step.

    Args:
        folder: of the run, for TensorBoard; its name is the run's name.
        step: of the checkpoint with which the run goes on; what was logged after it is cut off.
        arguments: {name: value}, to be shown beside the curves.
        track: None, or wandb.init's `project` and `entity`.
    """

    def __init__(self, folder, step, arguments, track=None):
        self.folder, self.writer, self.wandb, name = folder, None, None, folder.resolve().name
        if track:
            try:
                import wandb
                self.wandb = wandb.init(**track, name=name, id=name, resume="allow", config=arguments,
                                        allow_val_change=True)
            except Exception as error:  # no network, no account: no reason to stop
                say(f"training goes on without Weights & Biases: {str(error).splitlines()[0]}")
        try:
            newest, entry = cut_log(folder, step)
            self.writer = SummaryWriter(folder, purge_step=newest)  # makes open readers forget
            for event in entry:  # also TensorBoard's default server, which ignores purge_step
                self.writer.file_writer.add_event(event, walltime=event.wall_time)
            text = "".join(f"- {name}: {value}\n" for name, value in arguments.items())
            self.writer.add_text("arguments", text, step)  # after a resume, the new ones
        except OSError as error:
            self.fail(error)

    def write(self, scalars, step):
        """An entry: {tag: number} at that step."""
        try:
            self.writer = self.writer or SummaryWriter(self.folder)
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()
        except OSError as error:
            self.fail(error)
        try:
            if self.wandb:
                self.wandb.log(scalars, step=step, commit=True)  # now, and not with the next
        except Exception as error:  # its process has died: no reason to stop
            say(f"training goes on without Weights & Biases: {error}")
            self.wandb = None

    def fail(self, error):
        say(f"the log could not be written, training goes on: {error}")
        self.writer = None  # it would not go on after an error: the next entry opens another

    def close(self):
        if self.writer:
            with contextlib.suppress(OSError):
                self.writer.close()
        if self.wandb:
            with contextlib.suppress(Exception):
                self.wandb.finish()
