"""The operator torch.ops.srwm_cuda.impala_cnn: how its kernels are launched, and what graphs know of them."""

import ast
import functools
import hashlib
import math
import types

import torch
from torch.autograd.function import once_differentiable

from . import kernels

LAYERS = [(3, 16), *[(16, 16)] * 4, (16, 32), *[(32, 32)] * 9]  # channels of each convolution's input and output
SHAPES = [shape for inputs, outputs in LAYERS for shape in ((outputs, inputs, 3, 3), (outputs,))]
FRAGMENTS = 2 * sum(9 * 32 * inputs * outputs // 256 if inputs > 3 else 96 for inputs, outputs in LAYERS)  # as pack() writes
SECTIONS = [(32, 16), (16, 32), (8, 32)]  # width and channels of each section's output
KNOWN_TEXT = "6e9615c753539ec3fc65957ee8b9bb5a520abcd2fb7fe7f57622809fb3b9aaf7"  # of Encoder and Residual
FRAME_PITCH, WARPS = (kernels.constant("impala_cnn.cu", name) for name in ("FRAME_PITCH", "WARPS"))
GRADIENT_SIZE = 9 * 256 + 16  # as there: floats of a warp's gradients, at the end
MANY = 512  # frames from which on blocks take several at a time, where images are small


def is_impala_cnn(cnn, source, *classes):
    """Whether the kernels compute what these classes of a script, `Encoder` and `Residual`, do with the module that they made:
    only if their text in its source is the known one, the parameters have its shapes, and no hook has to be called."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (is_known_text(source, *classes) and [tuple(parameter.shape) for parameter in cnn.parameters()] == SHAPES
            and not any(getattr(module, name) for module in cnn.modules() for name in hooks))


@functools.cache
def is_known_text(source, *classes):
    """Whether these classes have the known text, comments, layout and docstrings aside, and no methods from elsewhere."""
    tree, names = ast.parse(source), [each.__name__ for each in classes]
    texts = [node for name in names for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name]
    for node in [node for text in texts for node in ast.walk(text)]:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            del node.body[0]
    methods = [(f"{each.__name__}.{name}", x.__qualname__) for each in classes for name, x in vars(each).items()
               if isinstance(x, types.FunctionType)]
    text = ast.unparse(ast.Module(texts, []))
    return hashlib.sha256(text.encode()).hexdigest() == KNOWN_TEXT and all(name == own for name, own in methods)


def kernels_run_on(device):
    """Whether that GPU can run the kernels, and they compile."""
    architecture, kernel = kernels.architecture_of(device), f"layer_backward<32, 16, 16, FIRST, 1, {_buffers(device)}>"
    return architecture >= 80 and kernels.can_compile("impala_cnn.cu", kernel, architecture, device)


# What torch.compiler.assume_constant_result does. But that imports the compiler, for which evaluation has no use and which
# takes as long as PyTorch itself.
kernels_run_on._dynamo_marked_constant = True


def _buffers(device):
    """How many images of a kind a block has room for in the backward pass: two, or one on a small GPU, such as a GeForce or an
    A100. Even the smallest blocks from compute capability 8.0 on may have 99 KiB of shared memory."""
    return 2 if torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 226 * 1024 else 1


# What the kernels save, as in srwm_op.py: the weights as fragments of matrices, and of each section what its layers
# computed, from which place each pooled value came, and the output, if another section reads it.
torch.library.define(
    "srwm_cuda::impala_cnn", "(Tensor frames, Tensor[] parameters, bool training)"
    " -> (Tensor features, Tensor fragments, Tensor[] saved)")
torch.library.define(
    "srwm_cuda::impala_cnn_backward", "(Tensor frames, Tensor fragments, Tensor[] saved, Tensor[] parameters,"
    " Tensor gradient) -> Tensor gradients")


@torch.library.register_fake("srwm_cuda::impala_cnn")
def _outputs(frames, parameters, training):
    saved = []
    for W, C in SECTIONS if training else []:
        output = frames.new_empty(len(frames), W, W, C, dtype=torch.bfloat16)
        saved += [output.new_empty(4, *output.shape), frames.new_empty(output.shape), output]
    return frames.new_empty(len(frames), 2048, dtype=torch.bfloat16), parameters[0].new_empty(FRAGMENTS, 4), saved[:-1]


def _forward(frames, parameters, training):
    frames = _aligned(frames)
    N, x, flat = len(frames), frames, torch.cat([parameter.flatten() for parameter in parameters])
    fragments, saved = flat.new_empty(FRAGMENTS, 4), []
    packed = FRAGMENTS if training else FRAGMENTS // 2  # the second half is for the backward pass
    _launch("pack", -(-packed // 256), 256, 0, flat, fragments)
    small = _buffers(frames.device) == 1
    few = N <= torch.cuda.get_device_properties(frames.device).multi_processor_count
    threads = 512 if small or few else 256  # a block that has a multiprocessor to itself is larger
    for section, (W, C) in enumerate(SECTIONS):
        output, inner, argmax = frames.new_empty(N, W, W, C, dtype=torch.bfloat16), None, None
        if training:
            inner, argmax = output.new_empty(4, N, W, W, C), frames.new_empty(N, W, W, C)
        at_once = (1, 2, 2 if small else 4)[section] if N >= MANY else (1, 1, 2)[section]
        images = at_once * (W + 2) ** 2 * C  # and then, in turn, first convolution's input and band, images and weights
        first = (66 * FRAME_PITCH * 4 + 10 * 64 * 16, 34 * 34 * 16 + 10 * 32 * 32,
                 2 * (18 * 18 * 32 + 18 * 16 * 32))[section]
        shared_bytes = 2 * (images + max(first, images + 9 * C * C))
        _launch(f"section_forward<{section}, {at_once}, {threads}>", -(-N // at_once), threads, shared_bytes,
                N, x, flat, fragments, output, inner, argmax)
        saved += [inner, argmax, output]
        x = output
    return x.permute(0, 3, 1, 2).flatten(1), fragments, saved[:-1] if training else []


def _aligned(frames):
    """The kernels read four bytes at a time."""
    frames = frames.contiguous()
    return frames.clone() if frames.data_ptr() % 4 else frames


@torch.library.register_fake("srwm_cuda::impala_cnn_backward")
def _gradients(frames, fragments, saved, parameters, gradient):
    return fragments.new_empty(sum(parameter.numel() for parameter in parameters))


def _backward(frames, fragments, saved, parameters, gradient):
    if not saved:
        _, fragments, saved = _forward(frames, parameters, True)
    sections, device = [_aligned(frames), *saved], frames.device
    N, blocks, buffers = len(frames), torch.cuda.get_device_properties(device).multi_processor_count, _buffers(device)
    numbers = [math.prod(shape) for shape in SHAPES]
    partial = fragments.new_empty(blocks, sum(numbers))  # of each block: no atomics
    gradient = gradient.unflatten(1, (32, 8, 8)).permute(0, 2, 3, 1).contiguous()

    def layer_backward(kind, layer, at_once, gradient, argmax, input, skipping=None):
        (inputs, outputs), W = LAYERS[layer], input.shape[1]
        grad_input, pooled = torch.empty_like(input), kind == "POOLED"
        H = 16 if pooled and W == 32 and buffers == 1 else W  # rows of an image: of a band, or of the whole frame
        values = at_once * (H + 2) * (W + 2) * ((1 if pooled else buffers) * outputs + buffers * inputs)
        more = {"FIRST": (buffers - 1) * 4 * W * W * inputs, "SECOND": 0, "POOLED": 3 * W * W // 4 * outputs}[kind]
        kernel = f"layer_backward<{W}, {inputs}, {outputs}, {kind}, {at_once}, {buffers}>"
        _launch(kernel, blocks, 64 * WARPS, max(2 * values + at_once * more, 4 * WARPS * GRADIENT_SIZE),
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
    _launch("frames_backward", len(of_frames), 256, 2 * (2 * 18 * FRAME_PITCH * 4 + 16 * 64 * 16),
            N, sections[0], gradient, argmax, of_frames)
    return torch.cat([of_frames.sum(0), partial[:, of_frames.shape[1] :].sum(0)])


def _setup_context(ctx, inputs, output):
    frames, parameters, _ = inputs
    _, fragments, saved = output
    ctx.save_for_backward(fragments, frames, *saved, *parameters)
    ctx.set_materialize_grads(False)


@once_differentiable
def _autograd(ctx, gradient, *_):
    fragments, frames, *saved = ctx.saved_tensors
    saved, parameters = saved[: -len(SHAPES)], saved[-len(SHAPES) :]
    gradients = torch.ops.srwm_cuda.impala_cnn_backward(frames, fragments, saved, parameters, gradient)
    parts = gradients.split([math.prod(shape) for shape in SHAPES])
    return None, [part.view(shape) for part, shape in zip(parts, SHAPES)], None


torch.library.impl("srwm_cuda::impala_cnn", "default", _forward)
torch.library.impl("srwm_cuda::impala_cnn_backward", "default", _backward)
torch.library.register_autograd("srwm_cuda::impala_cnn", _autograd, setup_context=_setup_context)


def _launch(kernel, blocks, threads, shared_bytes, *arguments):
    kernels.launch("impala_cnn.cu", kernel, (blocks, 1, 1), (threads, 1, 1), shared_bytes, *arguments)
