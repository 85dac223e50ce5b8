#!/usr/bin/env bash
# torch 2.13.0 (CPU, Python 3.11): max_pool2d finds where each maximum is, which only the backward pass reads, under no_grad
# and inference_mode too. Indices are int64, twice the size of float32 results: for a moment, pooling takes three times the
# memory that it returns. (Profilers show max_pool2d_with_indices as a rule; here it has no reader.) avg_pool2d takes what
# it returns.
#
# Seen on 30 November 2026: 3,145,728 bytes for a result of 1,048,576, in both modes.
#
# Fails if either mode pools without indices.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy==1.26.4 2>/dev/null
cat >pool.py <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

x, sizes = torch.rand(16, 16, 64, 64), {"max_pool2d": 3, "avg_pool2d": 1}  # of what is taken, in results
for mode in (torch.no_grad, torch.inference_mode):
    for name, size in sizes.items():
        with mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            y = getattr(F, name)(x, 3, stride=2, padding=1)
        taken = max(event.self_cpu_memory_usage for event in profiled.key_averages())
        print(f"{mode.__name__}, {name}: {taken:,} bytes for a result of {y.nbytes:,}")
        assert taken == size * y.nbytes, "pooling takes other memory"
PYTHON
venv/bin/python pool.py 2>/dev/null
