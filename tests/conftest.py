import gc
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import impala_procgen_srwm
from reporting import playing, runs

gc.freeze()  # modules are no garbage, and need not be looked through at each collection
torch.set_num_threads(1)  # batches are small here: a second thread waits more than it computes

SMALL = "--no-cuda --multi-env 2 --num-actors 2 --num-envs 4 --unroll-length 5 --batch-size 4 --log-interval 0".split()
FRUITBOT = ("--env", "fruitbot")  # of whose levels an episode takes about a hundred steps


def first_fast(*values):
    """Parameters of a test, of which all but the first are slow."""
    return [*values[:1], *(pytest.param(value, marks=pytest.mark.slow) for value in values[1:])]


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
            item.add_marker(pytest.mark.filterwarnings("error:srwm_cuda. the kernels cannot be compiled"))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        gc.collect()  # or it may free page-locked memory of a test before while a graph is captured, which must not be


@pytest.fixture(autouse=True)
def no_process_outlives_its_test(monkeypatch):
    """Ends what a test that failed has left running: first as torchrun needs it to end its own processes."""
    started, begin = [], subprocess.Popen.__init__

    def note(process, *words, **options):
        begin(process, *words, **options)
        started.append(process)

    monkeypatch.setattr(subprocess.Popen, "__init__", note)
    yield
    left = [process for process in started if process.poll() is None]
    for process in left:
        process.terminate()
    for process in left:
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(autouse=True)
def no_engine_outlives_its_test(monkeypatch):
    """Closes the engines that a test has made by itself."""
    made, begin = [], impala_procgen_srwm.Engine.__init__

    def note(engine, *words, **options):
        begin(engine, *words, **options)
        made.append(engine.close)

    monkeypatch.setattr(impala_procgen_srwm.Engine, "__init__", note)
    yield
    for close in made:
        close()


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs a script's main() in an empty folder with the given words as its command line."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(module, *words):
        gc.collect()  # now, not while an engine is made: cffi holds a lock then, which closing another engine waits for
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words)])
        module.main()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def train(command, tmp_path):
    """Trains for a few updates of 20 steps. Returns the run's folder."""

    def run(*words, script=impala_procgen_srwm):
        before = set(tmp_path.glob("runs/*"))
        command(script, *SMALL, *words)
        new = set(tmp_path.glob("runs/*")) - before
        return new.pop() if new else None

    return run


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """The folder of a run of 20 steps, for tests that do not write to it."""
    folder = tmp_path_factory.mktemp("trained_once")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [impala_procgen_srwm.__file__, *SMALL, "--total-steps", "20"])
        impala_procgen_srwm.main()
    (run,) = folder.glob("runs/*")
    return run


@pytest.fixture
def trained(trained_once, command, tmp_path):
    """The folder of a run of 20 steps, under runs/ in the test's own folder."""
    return shutil.copytree(trained_once, tmp_path / "runs" / trained_once.name)


@pytest.fixture
def few_slots(monkeypatch):
    """Four environments for each thread of evaluate.py, in two vectors: small batches, and levels that have to wait."""
    monkeypatch.setattr(playing, "SLOTS", {"cpu": 4, "cuda": 4})
    monkeypatch.setattr(playing, "BATCH", {"cpu": 2, "cuda": 4})
    monkeypatch.setattr(playing, "VECTOR", {"cpu": 2, "cuda": 2})


@pytest.fixture
def score(command, few_slots):
    """Runs evaluate.py, in float32, whatever this machine would choose."""
    return lambda *words: command(evaluate, "--no-cuda", "--bf16", "False", *words)


@pytest.fixture
def own_copy(monkeypatch, tmp_path):
    """Writes my_ablation.py, the SRWM script with one or more changes, beside which evaluate.py is looked for. Imports it."""
    monkeypatch.setattr(runs, "HOME", tmp_path)

    def write(*changes):
        text = Path(impala_procgen_srwm.__file__).read_text()
        for old, new in zip(changes[::2], changes[1::2]):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (tmp_path / "my_ablation.py").write_text(text)
        return runs.import_script("my_ablation.py")

    return write


@pytest.fixture
def refused(capsys):
    """Expects a call to end with status 2 and one line that holds each of the words. Returns that line."""

    def check(run, *words):
        with pytest.raises(SystemExit) as end:
            run()
        error = capsys.readouterr().err
        assert end.value.code == 2
        assert len(error.splitlines()) == 1, error
        assert ": error: " in error and all(word in error for word in words), error
        return error

    return check
