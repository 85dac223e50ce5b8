"""How the kernels of impala_cnn.cu are launched, for `srwm_cuda.impala_cnn`."""

import ast
import functools
import hashlib
import inspect
import math

import torch
from torch.autograd.function import once_differentiable

from . import kernels

LAYERS = [(3, 16), *[(16, 16)] * 4, (16, 32), *[(32, 32)] * 9]  # channels of each convolution's input and output
SHAPES = [shape for inputs, outputs in LAYERS for shape in ((outputs, inputs, 3, 3), (outputs,))]
FRAGMENTS = 2 * sum(9 * 32 * inputs * outputs // 256 if inputs > 3 else 96 for inputs, outputs in LAYERS)  # as pack() writes
SECTIONS = [(32, 16), (16, 32), (8, 32)]  # width and channels of each section's output
KNOWN_TEXT = "31264279caa1cf5d583a1898ae6beb0cde5152b192c9a3c414a8b0e5fb420dda"  # of Encoder and Residual
MANY = 512  # frames from which on blocks take several at a time, where images are small


def is_impala_cnn(cnn, *classes):
    """Whether the kernels compute what these classes, `Encoder` and `Residual` of the scripts, do with the module that they
    made: only if their text is the known one, the parameters have its shapes, and no hook has to be called."""
    return (is_known_text(*classes) and [tuple(parameter.shape) for parameter in cnn.parameters()] == SHAPES
            and not any(module._forward_hooks or module._forward_pre_hooks for module in cnn.modules()))


@functools.cache
def is_known_text(*classes):
    """Whether the source of these classes, but for comments, layout and what they say of themselves, is the known one."""
    try:
        tree = ast.parse("\n".join(inspect.getsource(each) for each in classes))
    except (OSError, TypeError):  # no source, as in an interactive session
        return False
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            del node.body[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest() == KNOWN_TEXT


@functools.cache
def kernels_run_on(device):
    """Whether that GPU can run the kernels, and they compile."""
    architecture, kernel = kernels.architecture_of(device), f"layer_backward<32, 16, 16, FIRST, 1, {_buffers(device)}>"
    return architecture >= 80 and kernels.can_compile("impala_cnn.cu", kernel, architecture)


def _buffers(device):
    """How many images of a kind a block has room for in the backward pass: two, or one on a small GPU, such as a GeForce or an
    A100. Even the smallest blocks from compute capability 8.0 on may have 99 KiB of shared memory."""
    return 2 if torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 226 * 1024 else 1


class ImpalaCNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, frames, grad_enabled, *parameters):
        frames = frames.contiguous()
        if frames.data_ptr() % 4:
            frames = frames.clone()  # the kernels read four bytes at a time
        N, x, flat = len(frames), frames, torch.cat([parameter.flatten() for parameter in parameters])
        fragments = flat.new_empty(FRAGMENTS, 4)
        store = grad_enabled and any(ctx.needs_input_grad)
        packed = FRAGMENTS if store else FRAGMENTS // 2  # the second half is for the backward pass
        _launch("pack", -(-packed // 256), 256, 0, flat, fragments)
        saved = [fragments]
        small = _buffers(frames.device) == 1
        few = N <= torch.cuda.get_device_properties(frames.device).multi_processor_count
        threads = 512 if small or few else 256  # a block that has a multiprocessor to itself is larger
        for section, (W, C) in enumerate(SECTIONS):
            output, inner, argmax = frames.new_empty(N, W, W, C, dtype=torch.bfloat16), None, None
            if store:
                inner, argmax = output.new_empty(4, N, W, W, C), frames.new_empty(N, W, W, C)
            at_once = (1, 2, 2 if small else 4)[section] if N >= MANY else (1, 1, 2)[section]
            images = at_once * (W + 2) ** 2 * C  # and then, in turn, the first convolution's input and band, images and weights
            first = (66 * 68 * 4 + 10 * 64 * 16, 34 * 34 * 16 + 10 * 32 * 32, 2 * (18 * 18 * 32 + 18 * 16 * 32))[section]
            shared_bytes = 2 * (images + max(first, images + 9 * C * C))
            _launch(f"section_forward<{section}, {at_once}, {threads}>", -(-N // at_once), threads, shared_bytes,
                    N, x, flat, fragments, output, inner, argmax)
            saved += [x, inner, argmax]
            x = output
        ctx.save_for_backward(*saved)
        return x.permute(0, 3, 1, 2).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        fragments, *sections = ctx.saved_tensors
        frames, device = sections[0], fragments.device
        N, blocks, buffers = len(frames), torch.cuda.get_device_properties(device).multi_processor_count, _buffers(device)
        numbers = [math.prod(shape) for shape in SHAPES]
        partial = fragments.new_empty(blocks, sum(numbers))  # of each block: no atomics
        gradient = gradient.unflatten(1, (32, 8, 8)).permute(0, 2, 3, 1).contiguous()

        def layer_backward(kind, layer, at_once, gradient, argmax, input, skipping=None):
            (inputs, outputs), W = LAYERS[layer], input.shape[1]
            grad_input, pooled = torch.empty_like(input), kind == "POOLED"
            H = 16 if pooled and W == 32 and buffers == 1 else W  # rows of an image: of a band, or of the whole frame
            values = at_once * (H + 2) * (W + 2) * ((1 if pooled else buffers) * outputs + buffers * inputs)
            more = {"FIRST": (buffers - 1) * 4 * W * W * inputs, "SECOND": 0, "POOLED": 3 * W * W // 4 * outputs}[kind]  # bytes
            kernel = f"layer_backward<{W}, {inputs}, {outputs}, {kind}, {at_once}, {buffers}>"
            _launch(kernel, blocks, 512, max(2 * values + at_once * more, 8 * 2320 * 4),  # at the end, eight warps' sums
                    N, layer, gradient, argmax, input, skipping, fragments, grad_input, partial)
            return grad_input

        for section in (2, 1, 0):
            x, inner, argmax = sections[3 * section : 3 * section + 3]
            (x0, h1, x1, h2), layer, at_once = inner, 5 * section, (1, 2, 4)[section]
            for first, input, hidden in ((layer + 3, x1, h2), (layer + 1, x0, h1)):
                grad_hidden = layer_backward("SECOND", first + 1, at_once, gradient, None, hidden)
                gradient = layer_backward("FIRST", first, at_once, grad_hidden, None, input, gradient)
            if section > 0:
                gradient = layer_backward("POOLED", layer, (None, 1, 2)[section], gradient, argmax, x)
        of_frames = partial.new_empty(3 * blocks, sum(numbers[:2]))
        _launch("frames_backward", len(of_frames), 256, 2 * (2 * 18 * 68 * 4 + 16 * 64 * 16),
                N, frames, gradient, argmax, of_frames)
        sums = torch.cat([of_frames.sum(0), partial[:, of_frames.shape[1] :].sum(0)]).split(numbers)
        return None, None, *(part.view(shape) for part, shape in zip(sums, SHAPES))


def _launch(kernel, blocks, threads, shared_bytes, *arguments):
    kernels.launch("impala_cnn.cu", kernel, (blocks, 1, 1), (threads, 1, 1), shared_bytes, *arguments)
