#!/usr/bin/env bash
# torch 2.13.0 and tensorboard 2.21.0 (CPU, Python 3.11): torch.jit.trace records a function as it is called, but runs the function again, to check
# the graph, without gradients. Whatever takes another path without them is refused as if it were random, with "Graphs
# differed across invocations". PyTorch's own TransformerEncoderLayer does, in eval mode, and so cannot be traced, nor drawn
# by TensorBoard's SummaryWriter.add_graph, which traces. Under no_grad, or with check_trace=False, it can.
#
# Seen on 30 November 2026: three calls, with gradients while it is recorded, and two without: recorded once more, and plain.
#
# Fails if the check runs with gradients, or if the layer can be traced.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy==1.26.4 tensorboard==2.21.0 2>/dev/null
cat >trace.py <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import torch
from torch.utils.tensorboard import SummaryWriter

calls = []


def double(x):
    calls.append((torch.is_grad_enabled(), torch.jit.is_tracing()))
    return 2 * x


torch.jit.trace(double, torch.ones(3, requires_grad=True))
print("with gradients and recorded, of each call:", calls)
assert calls == [(True, True), (False, True), (False, False)], "the check runs otherwise"

layer, x = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval(), torch.randn(2, 5, 16)
writer = SummaryWriter("drawn")
for draw in (torch.jit.trace, writer.add_graph):
    try:
        draw(layer, x)
    except torch.jit.TracingCheckError as error:
        print(f"{draw.__name__} of TransformerEncoderLayer:", str(error).splitlines()[1])
        assert "Graphs differed across invocations" in str(error)
    else:
        raise AssertionError("the layer can be traced")
torch.jit.trace(layer, x, check_trace=False)
with torch.no_grad():
    torch.jit.trace(layer, x)
    writer.add_graph(layer, x)
PYTHON
venv/bin/python trace.py
