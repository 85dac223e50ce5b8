#!/usr/bin/env bash
# torch 2.13.0 (CPU build, Python 3.11, x86 with AVX2): who switches oneDNN off (torch.backends.mkldnn), to have plain
# arithmetic to compare with, gets less of it. From 16 images on, a 3 x 3 convolution is then computed by another library,
# NNPACK, with Winograd's transforms: its error is ten times as large and more, and what comes out for an image depends on
# whether 15 or 16 are in the batch. NNPACK has a switch of its own.
#
# So an actor with few environments and a learner with a large batch compute different policies from the same weights.
#
# Seen on 30 November 2026: 32 channels, 16 x 16, normal numbers, largest error against float64: with oneDNN 6.0e-05;
# without, 15 images 2.7e-05, 16 images 7.4e-04; with NNPACK off as well, 16 images 2.7e-05.
#
# Fails if the error with 16 images is less than five times that with 15, or if it is not gone without NNPACK. Says so and
# ends with 0 where the processor has no NNPACK.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy==1.26.4 2>/dev/null
cat >batches.py <<'PYTHON'
import sys
import warnings

warnings.simplefilter("ignore")
import torch
from torch.backends import mkldnn, nnpack

if not nnpack.is_available():
    sys.exit(print("no NNPACK on this processor: nothing to see"))
torch.manual_seed(0)
images, kernel = torch.randn(16, 32, 16, 16), torch.randn(32, 32, 3, 3)
exact = torch.conv2d(images.double(), kernel.double(), padding=1)


def error(number):
    result = torch.conv2d(images[:number], kernel, padding=1)
    return (result.double() - exact[:number]).abs().max().item()


print(f"with oneDNN, 16 images: {error(16):.1e}")
with mkldnn.flags(enabled=False):
    few, many = error(15), error(16)
    with nnpack.flags(enabled=False):
        plain = error(16)
print(f"without, 15 images: {few:.1e}; 16 images: {many:.1e}; 16 without NNPACK too: {plain:.1e}")
assert many > 5 * few, "the number of images makes no difference"
assert plain < 2 * few, "it is not NNPACK"
PYTHON
venv/bin/python batches.py
