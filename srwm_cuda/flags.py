"""How a CUDA stream and other processes wait for each other without the thread that started both: flags in shared memory.

    flags = srwm_cuda.Flags(torch.zeros(n, 16, dtype=torch.int32), device)      # shared memory, which is page-locked
    flags.wait(0)      # the stream goes on when all flags are 0
    flags.set(1)       # and then sets them to 1

On a GPU both calls return at once: PyTorch's current stream will read and write the flags by itself, with the driver's stream
memory operations, which a CUDA graph can hold, too. On a CPU, and where a driver has no such operations, the caller waits.
"""

import ctypes
import functools
import os
import time
import weakref

import torch

from . import kernels

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # with fewer, a stream that waits may hold up another
WAIT, SET, EQUAL = 1, 2, 1  # CU_STREAM_MEM_OP_WAIT_VALUE_32, CU_STREAM_MEM_OP_WRITE_VALUE_32, CU_STREAM_WAIT_VALUE_EQ


class Flags:
    """A flag for each of n other processes.

    Args:
        memory: (n, 16) int32 on the CPU; the flags are its first column, so that each has a cache line of its own.
        device: of the stream that waits; on CUDA, memory is page-locked as long as this object lives.
        beside: other tensors on the CPU, page-locked as well, so that the GPU reads and writes them by itself.
    """

    def __init__(self, memory, device, beside=()):
        if memory.dim() != 2 or memory.shape[1] != 16 or memory.dtype != torch.int32 or memory.is_cuda:
            raise ValueError(f"memory must be an int32 tensor of shape (n, 16) on the CPU, got {tuple(memory.shape)}")
        self.memory, self.device, self.values = memory, torch.device(device), memory.numpy()[:, 0]
        if self.device.type == "cuda":
            for tensor in (memory, *beside):
                lock_pages(self, tensor)
        self.on_stream = can_wait_on_stream(self.device)
        self.addresses = _device_addresses(memory) if self.on_stream else []

    def wait(self, value):
        """Waits, or lets the stream wait, until all flags are `value`."""
        if self.on_stream:
            return _queue(self.device, self.addresses, WAIT, value, EQUAL)
        begin = time.monotonic()
        while (self.values != value).any():
            time.sleep(min(1e-3, (time.monotonic() - begin) / 10))

    def set(self, value):
        """Sets all flags to `value`, after all that the stream was to do before."""
        if self.on_stream:
            return _queue(self.device, self.addresses, SET, value)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self.values[:] = value


def lock_pages(owner, tensor):
    """Page-locks a CPU tensor's memory as long as its owner lives, so that the GPU reads and writes there by itself."""
    error = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    torch.cuda.check_error(int(error))
    weakref.finalize(owner, lambda: torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())).atexit = False


@functools.cache
def can_wait_on_stream(device):
    """Whether the streams of that device can wait for flags: whether it is a GPU whose driver has stream memory operations, as
    drivers have from CUDA 11.7 on, and they work."""
    if device.type != "cuda":
        return False
    flags = torch.zeros(1, 16, dtype=torch.int32).pin_memory()
    try:
        _queue(device, _device_addresses(flags), SET, 1)
        _queue(device, _device_addresses(flags), WAIT, 1, EQUAL)
        torch.cuda.current_stream(device).synchronize()
    except (AttributeError, RuntimeError):
        return False
    return flags[0, 0].item() == 1


class _Operation(ctypes.Structure):
    """CUstreamBatchMemOpParams, of which the last two are not for us."""

    _fields_ = [("operation", ctypes.c_uint), ("address", ctypes.c_uint64), ("value", ctypes.c_uint64),
                ("option", ctypes.c_uint), ("alias", ctypes.c_uint64), ("padding", ctypes.c_uint64)]


def _device_addresses(memory):
    """Where a GPU sees the flags in page-locked memory."""
    address = ctypes.c_uint64()
    kernels.driver("cuMemHostGetDevicePointer_v2", ctypes.byref(address), ctypes.c_void_p(memory.data_ptr()), 0)
    return range(address.value, address.value + memory.nbytes, memory.nbytes // len(memory))


def _queue(device, addresses, operation, value, option=0):
    """Queues one operation for each flag on the current stream."""
    operations = (_Operation * len(addresses))(*[_Operation(operation, each, value, option) for each in addresses])
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    kernels.make_current(device)
    kernels.driver("cuStreamBatchMemOp_v2", stream, len(operations), operations, 0)
