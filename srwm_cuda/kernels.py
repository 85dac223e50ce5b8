"""Compiles the kernels in the .cu files for the GPU at hand, with NVRTC, which PyTorch brings along, and launches them.

    kernels.launch("srwm.cu", "srwm_forward_kernel<16, 1>", (256, 1, 1), (64, 1, 1), 0, *arguments)

A template's instantiation is compiled, alone, when it is first needed, and its machine code kept in ~/.cache/srwm_cuda. No file
there is ever locked or half written: each gets its name when it is complete, and processes that compile at once write the same.
"""

import contextlib
import ctypes
import functools
import glob
import hashlib
import os
import pathlib
import re
import sys
import threading
import types
import warnings
from typing import NamedTuple

import torch

FOLDER = pathlib.Path(__file__).parent
HEADER = "common.cuh"  # the only file that the .cu files may include
_loading = threading.RLock()  # actor threads may be the first users


def constant(source, name):
    """A number that a .cu file or the header defines, and explains."""
    return int(re.search(rf"\b{name} = (\d+)", (FOLDER / source).read_text())[1])


KERNEL_HEAD_SIZES = (8, 16, 32, 64)
MAX_COLUMNS, LANES = constant(HEADER, "MAX_COLUMNS"), constant(HEADER, "LANES")


def round_up(n, multiple):
    return (n + multiple - 1) // multiple * multiple


class Launch(NamedTuple):
    """How a kernel is launched for given sizes. Called with the number of blocks, one for each environment and head,
    and with the kernel's arguments."""

    source: str
    kernel: str
    threads: int
    shared_bytes: int = 0

    def __call__(self, blocks, *arguments):
        launch(self.source, self.kernel, (blocks, 1, 1), (self.threads, 1, 1), self.shared_bytes, *arguments)


def take(launches, first, columns, training):
    """Whether the forward and, in training, the backward kernel that `launches` gives for a head size, the last of the
    tensor `first`, and for a number of columns can run on it. A warning says what is missing."""
    if not first.is_cuda or first.dtype != torch.float32:
        return False
    most = torch.cuda.get_device_properties(first.device).shared_memory_per_block_optin
    for each in launches(first.shape[-1], columns)[: 1 + training]:
        if each.shared_bytes > most:
            _warn_once(f"srwm_cuda: {each.kernel} needs {each.shared_bytes // 1024} KiB of shared memory, which this "
                       "GPU lacks: PyTorch's version runs, many times slower")
            return False
        if not can_compile(each.source, each.kernel, architecture_of(first.device), first.device):
            return False
    return True


@functools.cache
def _warn_once(message):
    warnings.warn(message, stacklevel=4)


def launch(source, kernel, grid, block, shared_bytes, *arguments):
    """Launches a kernel on the current stream of its tensors' device, compiled and loaded before if it is the first time.

    Args:
        source: the name of its .cu file.
        kernel: what the kernel is called in there, with its template arguments.
        grid, block: how many blocks and threads, three numbers each.
        shared_bytes: dynamic shared memory of a block.
        arguments: of the kernel. A contiguous tensor or None goes as a pointer, an int as int, a float as float, and a tuple
            of ints as a struct of ints, by value.

    Raises:
        RuntimeError: it cannot be compiled or launched; with the compiler's first error or CUDA's text.
    """
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    values = [_as_c(argument) for argument in arguments]
    addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    with torch.cuda.device(device):
        with _loading:
            make_current(device)
            loaded = _load(source, kernel, device)
            if shared_bytes > loaded.shared_bytes:
                driver("cuFuncSetAttribute", loaded.function, 8, shared_bytes)  # 8: how much of it a launch may ask for
                loaded.shared_bytes = shared_bytes
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        driver("cuLaunchKernel", loaded.function, *grid, *block, shared_bytes, stream, addresses, None)


@functools.cache
def can_compile(source, kernel, architecture, device=None):
    """Whether the kernel compiles for GPUs of that architecture, such as 90 for compute capability 9.0, and the device's
    driver, if one is given, loads it; warns if not."""
    with _loading:
        try:
            compiled(source, kernel, architecture)
            if device is not None:
                make_current(device)
                _load(source, kernel, device)
        except (OSError, RuntimeError) as error:
            warnings.warn("srwm_cuda: the kernels cannot be compiled or loaded, so that PyTorch's version of them runs, many "
                          f"times slower: {error}", stacklevel=3)
            return False
        return True


@functools.cache
def compiled(source, kernel, architecture):
    """A kernel's name in its machine code, and that code, from the cache or from the compiler.

    Raises:
        OSError: there is no NVRTC.
        RuntimeError: the kernel does not compile; with the first error.
    """
    texts = (FOLDER / source).read_bytes(), (FOLDER / HEADER).read_bytes()
    options = f"--gpu-architecture=sm_{architecture}".encode(), b"--std=c++17", b"--device-as-default-execution-space"
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "srwm_cuda")
    key = repr((texts, kernel, options, _nvrtc_version()))
    file = folder / f"{pathlib.Path(source).stem}-sm_{architecture}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    with contextlib.suppress(OSError):
        content = file.read_bytes()
        digest, code = content[:32], content[32:]
        if hashlib.sha256(code).digest() == digest:  # not so, for example, after a power failure
            return tuple(code.split(b"\0", 1))
    _announce()
    name, cubin = _compile(source, texts, kernel, options)
    code = name + b"\0" + cubin
    part = file.with_suffix(f".{os.getpid()}")  # of other processes, each writes its own
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_bytes(hashlib.sha256(code).digest() + code)
        part.replace(file)
    except OSError:  # a disk that is full or cannot be written to: the next start compiles again
        with contextlib.suppress(OSError):
            part.unlink()
    return name, cubin


@functools.cache
def _announce():
    print("srwm_cuda: compiling CUDA kernels, which the next start finds in the cache", file=sys.stderr, flush=True)


def _compile(source, texts, kernel, options):
    nvrtc, program = _nvrtc(), ctypes.c_void_p()

    def output(name, size):
        getattr(nvrtc, f"nvrtcGet{name}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{name}")(program, buffer)
        return buffer.raw

    one = ctypes.c_char_p * 1
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), texts[0], source.encode(), 1, one(texts[1]), one(HEADER.encode()))
    try:
        nvrtc.nvrtcAddNameExpression(program, kernel.encode())
        if nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)) != 0:
            lines = output("ProgramLog", ctypes.c_size_t()).rstrip(b"\0").decode(errors="replace").splitlines()
            raise RuntimeError(next((line for line in lines if "error" in line), f"NVRTC failed on {source}"))
        name = ctypes.c_char_p()
        nvrtc.nvrtcGetLoweredName(program, kernel.encode(), ctypes.byref(name))
        return name.value, output("CUBIN", ctypes.c_size_t())
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def _nvrtc():
    """The compiler's library: from the pip package that PyTorch for CUDA depends on, or where the system has it."""
    major = (torch.version.cuda or "13").split(".")[0]
    name = f"nvrtc64_{major}0_0.dll" if os.name == "nt" else f"libnvrtc.so.{major}"
    packages = [file for folder in sys.path for file in glob.glob(f"{folder}/nvidia/*/lib/{name}")]
    for file in (*packages, name):
        with contextlib.suppress(OSError):
            for builtins in glob.glob(f"{os.path.dirname(file)}/libnvrtc-builtins.so.*"):
                ctypes.CDLL(builtins)  # or the compiler would look for it in the system's folders only
            return ctypes.CDLL(file)
    raise OSError(f"{name} was not found")


def _nvrtc_version():
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@functools.cache
def _load(source, kernel, device):
    name, cubin = compiled(source, kernel, architecture_of(device))
    module, function, mode = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int(2)
    driver("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))  # 2: loading is allowed while some thread captures a graph
    try:
        driver("cuModuleLoadData", ctypes.byref(module), cubin)
        driver("cuModuleGetFunction", ctypes.byref(function), module, name)
    finally:
        driver("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    return types.SimpleNamespace(function=function, shared_bytes=0)


def make_current(device):
    """Lets the calling thread's calls of the driver go to that device. In a new thread, PyTorch may not have done so yet."""
    driver("cuCtxSetCurrent", _context(torch.cuda.current_device() if device.index is None else device.index))


@functools.cache
def _context(index):
    """The device's context that PyTorch uses, too."""
    context = ctypes.c_void_p()
    driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), index)
    return context


def architecture_of(device):
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _as_c(argument):
    if argument is None or isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    if isinstance(argument, tuple):
        return (ctypes.c_int * len(argument))(*argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument)


@functools.cache
def _driver():
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def driver(function, *arguments):
    """Calls a function of the CUDA driver. Raises RuntimeError with its text, AttributeError if there is no such function."""
    if error := getattr(_driver(), function)(*arguments):
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(error, ctypes.byref(text))
        raise RuntimeError(f"srwm_cuda: {function}: {(text.value or b'unknown error').decode()}")
