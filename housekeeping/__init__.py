"""What any program needs that trains for hours, and no reader of the paper does: arguments, checkpoints, log, processes."""

import contextlib


def say(text, file=None):
    """Prints a line; if it cannot be printed (a broken pipe, a full disk), training goes on."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # the second: a signal interrupted a print
        print(text, file=file, flush=True)
