"""How kernels are compiled, cached, loaded and launched. NVRTC needs no GPU, so that most of this runs without one."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import through_a_cuda_graph
from test_srwm import inputs

import srwm_cuda
from srwm_cuda import delta_rule_op, kernels, srwm_op

KERNEL = "delta_rule.cu", "delta_rule_forward_kernel<8>", 90  # quickly compiled


@pytest.fixture
def nvrtc():
    try:
        kernels._nvrtc()
    except OSError as error:
        pytest.skip(f"{error}: pip install nvidia-cuda-nvrtc")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache, and nothing compiled, loaded or found missing so far. Returns the cache's folder."""
    def forget():
        for function in (kernels.compiled, kernels.can_compile, kernels._announce, kernels._nvrtc, kernels._load):
            function.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path / "srwm_cuda"
    forget()


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """A copy of the kernels that may be broken."""
    shutil.copytree(kernels.FOLDER, tmp_path / "sources")
    monkeypatch.setattr(kernels, "FOLDER", tmp_path / "sources")
    return tmp_path / "sources"


def started(*arguments):
    """A process of its own that compiles, as a start does."""
    process = multiprocessing.get_context("fork").Process(target=kernels.compiled, args=arguments)
    process.start()
    return process


def launches(D, widths):
    return sorted({(launch.source, launch.kernel) for width in widths for function in (
        srwm_op.launches, delta_rule_op.launches) for launch in function(D, width)})


@pytest.mark.parametrize("D, architecture, widths", [(16, 90, [52, 400]), *(
    pytest.param(*sizes, marks=pytest.mark.slow) for sizes in (
        (8, 90, [512]), (32, 90, [200, 512]), (64, 90, [200, 384, 512]), (8, 75, [29]), (8, 80, [29]),
        (8, 120, [29])))])
def test_every_kernel_compiles(nvrtc, D, architecture, widths):
    for source, kernel in launches(D, widths):
        name, cubin = kernels.compiled(source, kernel, architecture)
        assert kernel.split("<")[0].encode() in name and cubin.startswith(b"\x7fELF")


def test_every_size_has_a_launch_within_the_limits_of_its_kernel():
    for D in srwm_cuda.KERNEL_HEAD_SIZES:
        for columns in range(1, srwm_cuda.MAX_COLUMNS + 1):
            for launch in (*srwm_op.launches(D, columns), *delta_rule_op.launches(D, columns)):
                most = int(launch.kernel.rstrip(">").split()[-1]) if "Variant" in launch.kernel else 1024
                assert launch.threads % 32 == 0 and 0 < launch.threads <= most


def test_the_next_start_finds_what_was_compiled(nvrtc, capfd, monkeypatch):
    first = kernels.compiled(*KERNEL)
    assert "compiling CUDA kernels" in capfd.readouterr().err
    kernels.compiled.cache_clear()
    monkeypatch.setattr(kernels, "_compile", None)
    assert kernels.compiled(*KERNEL) == first
    assert capfd.readouterr().err == ""


def test_a_changed_header_is_compiled_anew(nvrtc, cache, sources):
    kernels.compiled(*KERNEL)
    kernels.compiled.cache_clear()
    with open(sources / "common.cuh", "a") as header:
        header.write("// changed\n")
    kernels.compiled(*KERNEL)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_compilation_does_not_stop_the_next_start(nvrtc, cache, number):
    slow = "delta_rule.cu", "delta_rule_backward_kernel<16>", 90  # half a second
    ends = []
    for delay in (0.0, 0.05, 0.1, 0.2, 0.4):
        process = started(*slow)
        time.sleep(delay)
        os.kill(process.pid, number)
        process.join()
        ends.append(process.exitcode)
    assert any(ends)
    process = started(*slow)
    process.join(60)
    assert process.exitcode == 0 and list(cache.glob("delta_rule-sm_90-*"))


def test_two_starts_at_once_both_succeed(nvrtc, cache):
    processes = [started(*KERNEL) for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:20], lambda content: content[: len(content) // 2],
    lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
])
def test_a_damaged_file_in_the_cache_is_compiled_anew(nvrtc, cache, damage):
    expected = kernels.compiled(*KERNEL)
    file, = cache.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    kernels.compiled.cache_clear()
    assert kernels.compiled(*KERNEL) == expected
    assert file.read_bytes() == content


def test_a_cache_that_cannot_be_written_to_stops_nothing(nvrtc, cache):
    cache.write_text("a file where the folder should be")
    assert kernels.compiled(*KERNEL)[1].startswith(b"\x7fELF")


def test_a_failing_compiler_is_a_warning_with_its_first_error(nvrtc, sources):
    text = (sources / "srwm.cu").read_text().replace("int start = -1;", "int start = undeclared;", 1)
    (sources / "srwm.cu").write_text(text)
    line = text[: text.index("undeclared")].count("\n") + 1
    with pytest.warns(UserWarning, match=rf"PyTorch's version.*srwm.cu\({line}\): error:.*undeclared"):
        assert not kernels.can_compile("srwm.cu", "srwm_forward_kernel<16, 1>", 90)
    assert kernels.can_compile(*KERNEL)


def test_an_architecture_that_the_compiler_does_not_know_is_a_warning(nvrtc):
    with pytest.warns(UserWarning, match="PyTorch's version.*gpu-architecture"):
        assert not kernels.can_compile("srwm.cu", "srwm_forward_kernel<16, 1>", 999)


def test_a_missing_compiler_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    with pytest.warns(UserWarning, match="PyTorch's version.*99"):
        assert not kernels.can_compile(*KERNEL)


@pytest.mark.gpu
def test_a_kernel_that_does_not_compile_leaves_the_work_to_pytorch(sources):
    (sources / "common.cuh").write_text("#error planted\n")
    arguments = inputs(5, 2, 2, 16, 16, 0.1, torch.float32, "cuda")
    with pytest.warns(UserWarning, match="PyTorch's version.*planted"):
        ours = srwm_cuda.srwm(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, srwm_cuda.reference.srwm(*arguments)))


@pytest.mark.gpu
def test_a_kernel_that_the_driver_does_not_load_leaves_the_work_to_pytorch(cache, monkeypatch):
    """As the code of a compiler that is newer than the driver."""
    monkeypatch.setattr(kernels, "_compile", lambda *words: (b"name", b"no machine code"))
    arguments = inputs(5, 2, 2, 16, 16, 0.1, torch.float32, "cuda")
    with pytest.warns(UserWarning, match="cannot be compiled or loaded.*PyTorch's version"):
        ours = srwm_cuda.srwm(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, srwm_cuda.reference.srwm(*arguments)))


def test_a_write_that_fails_leaves_nothing_in_the_cache(cache, nvrtc):
    """Here because files may not become larger than 100 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        assert kernels.compiled(*KERNEL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(cache.iterdir()) == []


@pytest.mark.gpu
def test_the_kernels_need_no_toolkit_and_no_compiler(tmp_path):
    program = ("import torch, srwm_cuda; x = torch.rand(3, 2, 4, 16, device='cuda', requires_grad=True); "
               "W = torch.rand(4, 16, 52, device='cuda'); y, _ = srwm_cuda.srwm(x, W, W.new_zeros(2, *W.shape), "
               "torch.zeros(3, 2, dtype=torch.bool, device='cuda')); y.sum().backward(); "
               "assert 'srwm_cuda' in str(y.grad_fn)")
    environment = os.environ | {"PATH": "", "CUDA_HOME": "/nowhere", "XDG_CACHE_HOME": str(tmp_path)}
    end = subprocess.run([sys.executable, "-W", "error:srwm_cuda", "-c", program], env=environment, capture_output=True,
                         text=True, cwd=kernels.FOLDER.parent)
    assert end.returncode == 0 and end.stderr.count("compiling") == 1, end.stderr


@pytest.mark.gpu
def test_threads_may_be_the_first_users_all_at_once():
    arguments, results = inputs(5, 2, 2, 16, 16, 0.1, torch.float32, "cuda"), []
    threads = [threading.Thread(target=lambda: results.append(srwm_cuda.srwm(*arguments)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(torch.equal(y, results[0]) for y in results)


@pytest.mark.gpu
def test_a_kernel_may_first_be_loaded_while_a_graph_is_captured():
    arguments = inputs(5, 2, 2, 16, 16, 0.1, torch.float32, "cuda")
    expected = srwm_cuda.srwm(*arguments)

    def run():
        kernels._load.cache_clear()
        return srwm_cuda.srwm(*arguments)

    assert all(torch.equal(a, b) for a, b in zip(through_a_cuda_graph(run), expected))


@pytest.mark.gpu
def test_a_launch_that_cuda_refuses_is_an_error_in_its_words():
    y = torch.zeros(1, device="cuda")
    with pytest.raises(RuntimeError, match="cuLaunchKernel: invalid argument"):
        kernels.launch("srwm.cu", "srwm_forward_kernel<16, 1>", (1, 1, 1), (4096, 1, 1), 0, (1, 1, 1, 1, 37, 0), *[y] * 9)


@pytest.mark.gpu
def test_every_visible_gpu_runs_the_kernels_whichever_is_current():
    arguments = inputs(5, 2, 2, 16, 16, 0.1, torch.float32)
    expected = srwm_cuda.reference.srwm(*arguments)[0]
    for index in range(torch.cuda.device_count()):
        y, _ = srwm_cuda.srwm(*(tensor.to(f"cuda:{index}") for tensor in arguments))
        torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-5)
        assert torch.cuda.current_device() == 0
