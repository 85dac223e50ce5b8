#!/usr/bin/env bash
# NVRTC of CUDA 12.1.105, 12.4.127 and 13.0.88 (nvidia-cuda-nvrtc; Linux, x86-64; no GPU is needed), for whoever compiles
# with it and keeps the cubins:
# - nvrtcGetSupportedArchs names 90 and not 90a, which has instructions of its own, though sm_90a compiles in all three.
# - Compiled for compute_90 instead of sm_90, there is no cubin, and nvrtcGetCUBINSize says so by success and size 0.
# - In 12.1 the name that a program is given changes the cubin's bytes; in 12.4 and 13.0 it does not. Each version gives
#   other bytes for the same source and GPU; one version the same bytes each time.
# - Without any header, std::move, initializer lists, printf and assert compile, but uint32_t and INFINITY do not.
#
# Seen on 30 November 2026 with the kernel below.
#
# Fails if one of these is otherwise in one of the three.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
for package in nvidia-cuda-nvrtc-cu12==12.1.105 nvidia-cuda-nvrtc-cu12==12.4.127 nvidia-cuda-nvrtc==13.0.88; do
  venv/bin/pip install -q --no-deps --target "${package#*==}" "$package" 2>/dev/null
done
cat >compile.py <<'PYTHON'
import ctypes
import sys
from pathlib import Path

(library,) = Path(sys.argv[1]).rglob("libnvrtc.so.1?")
for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
    ctypes.CDLL(str(builtins))
nvrtc = ctypes.CDLL(str(library))
KERNEL = 'extern "C" __global__ void twice(float* x, int n) { if (threadIdx.x < n) x[threadIdx.x] *= 2; }\n'


def cubin(source, architecture, name=b"a.cu"):
    """None if it does not compile."""
    program, size, option = ctypes.c_void_p(), ctypes.c_size_t(), f"--gpu-architecture={architecture}".encode()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name, 0, None, None)
    if nvrtc.nvrtcCompileProgram(program, 1, (ctypes.c_char_p * 1)(option)):
        return None
    assert nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0, "to ask for the size fails"
    code = ctypes.create_string_buffer(size.value)
    assert size.value == 0 or nvrtc.nvrtcGetCUBIN(program, code) == 0
    return code.raw


count = ctypes.c_int()
nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
supported = (ctypes.c_int * count.value)()
nvrtc.nvrtcGetSupportedArchs(supported)
usual, special = cubin(KERNEL, "sm_90"), cubin(KERNEL, "sm_90a")
assert 90 in supported and usual and special and usual != special
assert cubin(KERNEL, "compute_90") == b""
assert cubin(KERNEL, "sm_90") == usual
name_matters = cubin(KERNEL, "sm_90", b"b.cu") != usual
compiles = {what: cubin(source + KERNEL, "sm_90") is not None for what, source in {
    "std::move": "__device__ int one(int x) { return std::move(x); }",
    "initializer list": "__device__ int one() { for (int x : {1, 2}) return x; return 0; }",
    "printf": '__device__ void one() { printf("x"); }', "assert": "__device__ void one() { assert(true); }",
    "uint32_t": "__device__ uint32_t one;", "INFINITY": "__device__ float one() { return INFINITY; }"}.items()}
print(f"{sys.argv[1]}: supported {list(supported)}; a program's name matters: {name_matters}; compiles: {compiles}")
assert name_matters == (sys.argv[1] == "12.1.105")
assert list(compiles.values()) == [True, True, True, True, False, False]
Path(f"{sys.argv[1]}.cubin").write_bytes(usual)
PYTHON
for version in 12.1.105 12.4.127 13.0.88; do
  venv/bin/python compile.py "$version"
done
test "$(sha256sum -- *.cubin | cut -d' ' -f1 | sort -u | wc -l)" = 3 || { echo "two versions give the same bytes"; exit 1; }
