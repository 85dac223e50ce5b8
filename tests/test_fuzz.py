"""Command lines by the hundred, sensible and not: each trains or is refused; nothing else ever happens."""

import random

import pytest
import torch

import impala_procgen_srwm as script

TINY = "--no-cuda --num-actors 1 --num-envs 12 --unroll-length 2 --batch-size 2 --total-steps 8 --num-layers 1".split()

# Words for each argument; most are allowed by themselves, if not with each other.
WORDS = {
    "env": ["maze", "leaper maze leaper", "heist", "chaser", "pong", "maze pong", "maze,leaper", "maze " * 5, ""],
    "multi-env": ["1", "2", "4", "3", "17", "0", "-1", "two"],
    "distribution-mode": ["easy", "hard", "extreme", "memory", "exploration", "medium", ""],
    "num-levels": ["0", "1", "200", "2147483647", "-1", "1e3"],
    "start-level": ["0", "5", "2147483647", "2147483648", "-5"],
    "num-actors": ["1", "2", "0", "-2", "1.5"],
    "num-servers": ["1", "3", "30", "0", "-1"],
    "num-envs": ["12", "24", "6", "3", "0", "-4", "x"],
    "unroll-length": ["1", "2", "3", "0", "-1"],
    "batch-size": ["1", "2", "12", "13", "0", "-3"],
    "total-steps": ["1", "9", "0", "-1", "nan", "99999999999"],
    "learning-rate": ["0", "1e-3", "-1e-3", "nan", "inf", "x"],
    "alpha": ["0", "0.5", "1", "1.5", "-0.1"],
    "epsilon": ["1e-8", "1", "0", "-1"],
    "momentum": ["0", "0.9", "2", "-1"],
    "grad-norm-clipping": ["1e-3", "1000", "0", "-1"],
    "discounting": ["0", "0.9", "1", "1.01", "-1"],
    "entropy-cost": ["0", "1", "-1"],
    "entropy-limits": ["leaper 1", "", "maze 0.5 leaper 0", "pong 1", "leaper", "leaper -1"],
    "noop-max": ["leaper 9", "", "maze 0 leaper 1", "pong 1", "leaper", "leaper -1", "leaper 1.5"],
    "baseline-cost": ["0", "1", "-1"],
    "reward-clipping": ["normalize", "none", "soft", ""],
    "seed": ["0", "7", "2147483647", "-1", "2147483648"],
    "num-layers": ["1", "2", "0", "-1"],
    "hidden-size": ["8", "24", "10", "1", "0"],
    "num-head": ["1", "2", "8", "3", "0"],
    "bptt-length": ["1", "2", "100", "0", "-1", "None"],
    "bf16": ["True", "False", "None", "maybe"],
    "log-interval": ["0", "60", "-1"],
    "save-interval": ["0", "60", "-1"],
    "save-extra-checkpoint": ["1", "4", "0", "-1"],
    "valid-num-levels": ["0", "5", "-1"],
    "valid-start-level": ["0", "1000", "2147483647", "-1"],
    "valid-distribution-mode": ["easy", "hard", "memory", "medium"],
    "exp-name": ["x", "a b", "../x", "a/b"],
    "resume": ["auto", "runs/none", "."],
    "init-from": ["runs/none", "."],
    "surprise": ["1"],
}
SWITCHES = "--no-carry-state --carry-state --anneal-entropy --deterministic --cuda --nonsense".split()


def draw(rng):
    """A command line of one to six arguments, two thirds of whose words are the first, sensible ones."""
    line = []
    for name in rng.sample(list(WORDS), rng.randint(1, 5)):
        words = WORDS[name]
        word = rng.choice(words[: max(1, len(words) // 2)] if rng.random() < 0.66 else words)
        line += [f"--{name}", *(word.split() if name in ("env", "entropy-limits", "noop-max") else [word])]
    return line + ([rng.choice(SWITCHES)] if rng.random() < 0.3 else [])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_every_command_line_trains_or_is_refused(seed, command, capsys, tmp_path):
    rng, trained = random.Random(seed), 0
    for _ in range(70):
        line = draw(rng)
        if "--cuda" in line and torch.cuda.is_available():
            continue
        before = set(tmp_path.rglob("*"))
        try:
            command(script, *TINY, *line)
        except SystemExit as end:
            error = capsys.readouterr().err
            assert end.code == 2, (line, end.code, error)
            ours = error.startswith("impala_procgen_srwm.py: error: ") and len(error.splitlines()) == 1
            assert ours or "For full helptext" in error, (line, error)  # tyro's
            assert set(tmp_path.rglob("*")) == before, line
        else:
            out, error = capsys.readouterr()
            assert "saved runs/" in out, (line, out, error)
            trained += 1
    assert 15 < trained < 60
