#!/usr/bin/env bash
# torch 2.11.0 with CUDA 13.0, on an NVIDIA H200: a capture that is refused leaves the random numbers of the GPU unusable.
# - CUDAGraph.capture_begin on the default stream raises a RuntimeError.
# - Whoever catches that and goes on finds that torch.rand(1, device="cuda") raises, and so do dropout and randperm: the
#   default generator still takes itself for one that is being captured. torch.cuda.manual_seed does not help, nor does to
#   reset or delete the graph.
# - A generator of one's own still works, and so do operations without random numbers.
# - A capture that is not refused, on another stream, ends it: then the default generator works again.
#
# Seen on 30 November 2026:
#   capture_begin: CUDA graphs must be captured on a non-default stream
#   rand: Offset increment outside graph capture encountered unexpectedly
#   randperm: Offset increment outside graph capture encountered unexpectedly
#   dropout: Offset increment outside graph capture encountered unexpectedly
#   zeros: None
#   own generator: None
#   still so after manual_seed, reset and del
#   rand, after a capture on another stream: None
#
# Skips where there is no GPU. Fails if random numbers work after the refusal, or if one of the rest is otherwise.
set -euo pipefail
if ! nvidia-smi -L >/dev/null 2>&1; then
  echo "skipped: no GPU"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python=python3
if ! python3 -c 'import torch; assert torch.__version__.startswith("2.11.0")' 2>/dev/null; then
  python3 -m venv venv
  venv/bin/pip install -q torch==2.11.0 2>/dev/null
  python=venv/bin/python
fi
cat >refused.py <<'PYTHON'
import torch


def attempt(function):
    """What it raises, its first sentence, or None."""
    try:
        function()
    except RuntimeError as error:
        return str(error).split(".")[0].splitlines()[0]


draw = {
    "rand": lambda: torch.rand(1, device="cuda"),
    "randperm": lambda: torch.randperm(10, device="cuda"),
    "dropout": lambda: torch.nn.functional.dropout(torch.ones(9, device="cuda")),
    "zeros": lambda: torch.zeros(9, device="cuda").add_(1),
    "own generator": lambda: torch.rand(1, device="cuda", generator=torch.Generator("cuda"))}
assert not any(map(attempt, draw.values()))
graph = torch.cuda.CUDAGraph()
print("capture_begin:", refusal := attempt(graph.capture_begin))
assert refusal
after = {name: attempt(function) for name, function in draw.items()}
for name, error in after.items():
    print(f"{name}: {error}")
assert [error is None for error in after.values()] == [False, False, False, True, True]
torch.cuda.manual_seed(1)
assert attempt(draw["rand"])
attempt(graph.reset)
del graph
assert attempt(draw["rand"])
print("still so after manual_seed, reset and del")
with torch.cuda.graph(torch.cuda.CUDAGraph()):
    torch.zeros(9, device="cuda")
print("rand, after a capture on another stream:", error := attempt(draw["rand"]))
assert error is None
PYTHON
"$python" refused.py
