#!/usr/bin/env bash
# torch 2.13.0 (CPU, Python 3.11): ways to register a kernel of a custom operator that look alike, and are not.
# - torch.library.impl as a decorator returns the function if it is given a Library, and None if it is given the operator's
#   name. So does register_kernel return None, while register_fake returns the function. With None, the name that was
#   defined is gone, and the next call of it fails far from there.
# - A kernel of custom_op can compute no gradient inside: nothing is recorded there, even within enable_grad, on tensors
#   that ask for it. A kernel of define and impl can. So an operator that differentiates inside (a step of gradient descent as
#   a layer, a gradient penalty) works in one form and not in the other.
#
# Seen on 30 November 2026, with the operators below.
#
# Fails if a decorator returns something else, or if the gradients are computed otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy==1.26.4 2>/dev/null
cat >register.py <<'PYTHON'
import torch


def slope(x: torch.Tensor) -> torch.Tensor:
    """The derivative of x ** 3, by autograd."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = x**3
    recorded.append(y.requires_grad)
    return torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else torch.zeros_like(x)


library = torch.library.Library("forms", "DEF")
for name in ("first", "second", "third", "slope"):
    library.define(f"{name}(Tensor x) -> Tensor")
returned = {
    "impl, a Library": torch.library.impl(library, "first", "CPU")(slope),
    "impl, a name": torch.library.impl("forms::second", "CPU")(slope),
    "register_kernel": torch.library.register_kernel("forms::third", "cpu")(slope),
    "register_fake": torch.library.register_fake("forms::first")(slope)}
print({form: value is slope for form, value in returned.items()}, "return the function")
assert [value is slope for value in returned.values()] == [True, False, False, True]
assert returned["impl, a name"] is None and returned["register_kernel"] is None

recorded = []
library.impl("slope", slope, "CPU")
torch.library.custom_op("forms::custom", slope, mutates_args=())
x = torch.tensor([2.0])
results = torch.ops.forms.slope(x).item(), torch.ops.forms.custom(x).item()
print(f"recorded inside: {recorded}; the derivative: {results}, should be 12")
assert recorded == [True, False] and results == (12, 0), "gradients inside are computed otherwise"
PYTHON
venv/bin/python register.py
