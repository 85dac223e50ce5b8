#!/usr/bin/env bash
# torch 2.13.0 (CPU, Python 3.11): `import torch` leaves torch.compile's part, torch._dynamo, for later. Later is earlier than
# the first compilation: whoever makes an optimizer imports it, about 800 modules, and so does whoever only marks a function
# with torch.compiler.assume_constant_result. So a library that marks one makes all that imports it start more slowly, also a
# program that only evaluates and never compiles anything.
#
# Seen on 30 November 2026: 804 modules more after RMSprop of one number, or after the mark; on an idle machine their import
# took 1.5 seconds, as long as that of torch. torch.compiler.is_compiling() and a backward pass import nothing.
#
# Fails if either of the two does not import torch._dynamo, or if one of the others does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy==1.26.4 2>/dev/null
cat >imports.py <<'PYTHON'
import sys
import time

import torch

before, begin = len(sys.modules), time.perf_counter()
what = sys.argv[1]
if what == "import torch":
    pass
elif what == "is_compiling":
    torch.compiler.is_compiling()
elif what == "backward":
    torch.ones(1, requires_grad=True).exp().backward()
elif what == "optimizer":
    torch.optim.RMSprop([torch.nn.Parameter(torch.zeros(1))])
elif what == "mark":
    torch.compiler.assume_constant_result(lambda: 1)
found = "torch._dynamo" in sys.modules
print(f"{what}: torch._dynamo {found}, {len(sys.modules) - before} modules, {time.perf_counter() - begin:.1f} s")
sys.exit(found != (what in ("optimizer", "mark")))
PYTHON
for what in "import torch" is_compiling backward optimizer mark; do
  venv/bin/python imports.py "$what" 2>/dev/null
done
