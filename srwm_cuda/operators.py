"""What the operators of recurrences share: how they are known to PyTorch."""

import torch
from torch.autograd.function import once_differentiable


def register(name, forward, backward, first_saved):
    """Gives the operators srwm_cuda::NAME and srwm_cuda::NAME_backward, which are defined, their functions, and the first a
    gradient by the second.

    The first takes tensors, bptt_length and training, and returns outputs, of which two have gradients. The second takes
    these tensors, the outputs from number first_saved on, both gradients or None, and bptt_length.
    """
    def setup_context(ctx, inputs, output):
        *tensors, ctx.bptt_length, _ = inputs
        ctx.save_for_backward(*tensors, *output[first_saved:])
        ctx.set_materialize_grads(False)

    @once_differentiable
    def gradient(ctx, grad_out, grad_new_state, *_):
        operator = getattr(torch.ops.srwm_cuda, f"{name}_backward")
        return *operator(*ctx.saved_tensors, grad_out, grad_new_state, ctx.bptt_length), None, None, None

    torch.library.impl(f"srwm_cuda::{name}", "default", forward)
    torch.library.impl(f"srwm_cuda::{name}_backward", "default", backward)
    torch.library.register_autograd(f"srwm_cuda::{name}", gradient, setup_context=setup_context)
