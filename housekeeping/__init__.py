"""What a run needs, and no reader of the paper: ProcGen's engine and its processes, arguments, checkpoints, log, signals."""

import contextlib
import hashlib
import pathlib

_SOURCES = sorted(pathlib.Path(__file__).parent.glob("*.py"))
SHA256 = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()  # by which a run tells versions apart


def say(text, file=None):
    """Prints a line; if it cannot be printed (a broken pipe, a full disk), training goes on."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # the second: a signal interrupted a print
        print(text, file=file, flush=True)
