"""Files of a run: its lock, and checkpoints that are whole or not there."""

import contextlib
import os
import sys
import time
import zipfile
from pathlib import Path

import torch

from . import say

locks = {}  # open files by a run's folder: the system unlocks them when this process ends


def lock(folder):
    """Keeps other processes off a run. Raises ValueError if it is another's, OSError if it cannot be written to."""
    name, folder = folder, folder.resolve()
    if folder in locks:
        return
    locks[folder] = open(folder / "lock", "a")
    try:
        import fcntl
        fcntl.flock(locks[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        locks.pop(folder).close()
        raise ValueError(f"{name} is in use: another process trains there") from None
    except (ImportError, OSError):
        pass  # Windows or a file system without locks


def unlock_all():
    """For other programs that call a script's main(), or a notebook."""
    while locks:
        locks.popitem()[1].close()


def check_name(name):
    """Raises ValueError unless a folder can have that name, with a seed and a time behind it."""
    if Path(name).name != name or not name.isprintable() or len(name) > 200:
        raise ValueError(f"--exp-name must be a folder's name, got '{name}'")


def make_folder(name):
    """A new folder runs/NAME__TIME, locked, in the working folder."""
    try:
        Path("runs").mkdir(exist_ok=True)
    except FileExistsError:
        raise ValueError("runs must be a folder, or a link to one: it is where runs go") from None
    folder = Path("runs") / f"{name}__{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
        folder = folder.with_name(folder.name + "+")  # of a run that began in the same second as another
    lock(folder)
    return folder


def keep_script(folder, name, source):
    """Leaves a copy of the script as it trains in a run's folder; after a change, of the newest."""
    copy = folder / name
    try:
        if copy.is_file() and copy.read_text(encoding="utf-8") != source:
            say(f"{name} has changed since it trained {folder}; the run continues with it as it is now")
        copy.write_text(source, encoding="utf-8")
    except (OSError, UnicodeError) as error:
        say(f"{copy} could not be written: {error}", sys.stderr)


def save_checkpoint(checkpoint, path):
    """Writes to a temporary file first, so that there is always a whole one. Returns whether it was written."""
    try:
        with open(path.with_suffix(".tmp"), "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # or else a power failure may leave the new name without its contents
        os.replace(path.with_suffix(".tmp"), path)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # some systems cannot
            folder = os.open(path.parent, os.O_RDONLY)
            stack.callback(os.close, folder)
            os.fsync(folder)
    except (OSError, RuntimeError) as error:  # torch.save turns some of the first into the second
        with contextlib.suppress(OSError):
            path.with_suffix(".tmp").unlink()  # or it may fill the disk
        say(f"{path} could not be written: {str(error).splitlines()[0]}", sys.stderr)
        return False
    return True


def load_checkpoint(path, script):
    """Reads what `Run.save` wrote to this file or folder, executing nothing of it; with script None, any script's."""
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if (damaged := zipfile.ZipFile(path).testzip()) is not None:  # checksums, which torch.load does not look at
            raise zipfile.BadZipFile(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own for a damaged file
        raise ValueError(f"{path} is not a whole checkpoint ({type(error).__name__})") from None
    parts = dict(script=str, args=dict, step=int, model=dict, optimizer=dict, episodes=dict)
    if not (isinstance(checkpoint, dict) and all(isinstance(checkpoint.get(name), parts[name]) for name in parts)):
        raise ValueError(f"{path} is not a checkpoint of this project")
    if script not in (None, checkpoint["script"]):
        raise ValueError(f"{path} belongs to {checkpoint['script']}, not to {script}")
    if "history" not in checkpoint:  # of an older version, which kept only the newest part
        part = dict(step=0, args=checkpoint["args"], sha256=checkpoint.get("sha256", ""))
        before = [[dict(step=0, args=args)] for args in checkpoint.get("before", ())]
        checkpoint |= dict(history=[part], before=before)
    return checkpoint


def find_and_lock(prefix, script, wanted):
    """The folder, now locked, of the newest run in runs/ whose name begins with `prefix`, whose checkpoint is of this script
    and `wanted`, and which nobody uses. None if there is none."""
    found = Path("runs").glob("*/checkpoint.pt")
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        if path.parent.name.startswith(prefix):
            with contextlib.suppress(ValueError, OSError):
                if wanted(load_checkpoint(path, script)):
                    lock(path.parent)
                    return path.parent
    return None


def load_weights(agent, checkpoint):
    """Gives an agent the weights of a checkpoint. Raises ValueError if it is of other sizes."""
    try:
        agent.load_state_dict(checkpoint["model"])
    except (RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"the checkpoint holds a model of other sizes than the arguments say: {reason}") from None
