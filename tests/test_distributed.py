"""Several processes under torchrun, on the CPU (gloo)."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import impala_procgen_srwm as script
from housekeeping import checkpoints, launch, processes

ROOT = Path(__file__).parent.parent
WORDS = "--no-cuda --multi-env 2 --num-actors 1 --num-envs 4 --unroll-length 5 --batch-size 4 --log-interval 0".split()
STEPS = 40  # of an update of two processes


def torchrun(folder, script, *words, machine=("--standalone", "--nproc-per-node", "2"), options=(), **keywords):
    command = [sys.executable, "-m", "torch.distributed.run", *machine, *options]
    environment = os.environ | dict(PYTHONPATH=f"{folder}:{ROOT}", OMP_NUM_THREADS="1")
    return subprocess.Popen([*command, ROOT / script, *WORDS, *map(str, words)], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **keywords)


def checkpoint(folder):
    (run,) = (folder / "runs").iterdir()
    return checkpoints.load_checkpoint(run / "checkpoint.pt", None)


@pytest.mark.slow
def test_two_processes_learn_as_one_with_the_joint_batch(command, tmp_path):
    """Their weights are the first's and stay equal, bit for bit, and their first update is that of the mean gradient. One run
    folder, one log, and steps are counted over both; another number of processes can go on. An update that is not finite in one
    process is left out in both."""
    process = torchrun(tmp_path, "tests/train_and_dump.py", "--total-steps", 10 * STEPS)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    first, second = (torch.load(tmp_path / f"process{rank}.pt", weights_only=False) for rank in (0, 1))
    for moment in ("before", "after", "last"):
        assert all(torch.equal(first[moment][name], second[moment][name]) for name in first[moment])
    assert not torch.equal(first["batch"]["obs"], second["batch"]["obs"])
    assert len(first["seeds"]) == 3 and not set(first["seeds"]) & set(second["seeds"])
    cores = os.sched_getaffinity(0)
    assert len(cores) < 2 or first["cores"] | second["cores"] == cores and not first["cores"] & second["cores"]
    assert first["num_cores"] == second["num_cores"] == max(1, processes.num_cores() // 2)
    assert len(first["engine_seeds"]) >= 3 and not set(first["engine_seeds"]) & set(second["engine_seeds"])
    torch.manual_seed(1)
    assert torch.equal(script.Agent(script.Args(cuda=False)).layers[0].W, first["before"]["layers.0.W"])

    for (weights, averages), (new_weights, new_averages) in (part["skipped"] for part in (first, second)):
        assert all(torch.equal(weights[name], new_weights[name]) for name in weights)
        assert all(torch.equal(averages[n]["square_avg"], new_averages[n]["square_avg"]) for n in averages)

    args, _ = script.resolve_args(script.Args(cuda=False, unroll_length=5, batch_size=8))  # as to bfloat16
    agent = script.Agent(args)
    learner = script.Learner(agent, args)
    agent.load_state_dict(first["before"])
    for name in ("obs", "reward", "done", "action", "logits"):
        getattr(learner.batch, name).copy_(torch.cat([part["batch"][name] for part in (first, second)], dim=1))
    learner.backward()
    learner.joint /= 2  # from the sum over a batch to the mean of two
    learner.step()
    for name, weight in agent.state_dict().items():
        change, expected = first["after"][name] - first["before"][name], weight - first["before"][name]
        assert (change - expected).norm() < 0.02 * expected.norm(), name

    assert checkpoint(tmp_path)["step"] == 10 * STEPS and out.count("saved runs/") == 1
    assert checkpoint(tmp_path)["optimizer"]["state"][0]["step"] == 9  # and one was left out
    (run,) = (tmp_path / "runs").iterdir()
    saved = torch.load(run / "checkpoint.pt") | {"script": "impala_procgen_srwm.py"}
    torch.save(saved, run / "checkpoint.pt")
    command(script, "--resume", run, "--total-steps", 10 * STEPS + 20)
    assert checkpoint(tmp_path)["step"] == 10 * STEPS + 20


@pytest.mark.slow
def test_parameters_that_no_process_or_only_one_uses_train_with_the_rest(tmp_path):
    """As in an ablation: the copy of the script takes the place of the original."""
    (tmp_path / "impala_procgen_srwm.py").write_text((ROOT / "impala_procgen_srwm.py").read_text().replace("""
        self.encoder = Encoder(args)
""", """
        self.encoder, self.unused, self.used_by_one = Encoder(args), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(15))
""").replace("""
        return self.policy(h), """, """
        return self.policy(h) * self.used_by_one if RANK == 1 else self.policy(h), """))
    process = torchrun(tmp_path, "tests/train_and_dump.py", "--total-steps", 3 * STEPS)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    first, second = (torch.load(tmp_path / f"process{rank}.pt", weights_only=False)["last"] for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(first["unused"], torch.ones(3)) and not torch.equal(first["used_by_one"], torch.ones(15))


@pytest.fixture
def ahead(tmp_path):
    """A copy of the script that queues an update before it reads the last one's report, as on a GPU. The first process has read
    one more, since it saves after each update."""
    def write(*replacements):
        text = (ROOT / "impala_procgen_srwm.py").read_text()
        for old, new in (("left=int(args.cuda)", "left=1"), *replacements):
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / "impala_procgen_ahead.py").write_text(text)
        return tmp_path / "impala_procgen_ahead.py"
    return write


@pytest.mark.slow
def test_processes_whose_updates_are_not_finite_end_after_the_same_one(ahead, tmp_path):
    no_numbers = "rewards, discounts = batch.reward[1:]", "rewards, discounts = batch.reward[1:] / 0"
    copy = ahead(("MAX_SKIPPED = 50", "MAX_SKIPPED = 3"), no_numbers)
    process = torchrun(tmp_path, copy, "--save-interval", 0)
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "Connection closed" not in out, out
    assert out.count("the last checkpoint is kept: 3 updates in a row, the last after step 80") == 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_of_which_one_is_told_to_stop_end_after_the_same_update(rank, ahead, tmp_path):
    process = torchrun(tmp_path, ahead(), "--save-interval", 0)
    wait_for_steps(process)
    os.kill(workers(process)[rank], signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out.count("saved runs/") == 1, out
    assert checkpoint(tmp_path)["step"] == STEPS * checkpoint(tmp_path)["optimizer"]["state"][0]["step"]


def workers(launcher):
    """The launcher's processes, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = dict(pair.split("=", 1) for pair in (folder / "environ").read_text().split("\0") if "=" in pair)
        except (OSError, ValueError):
            continue
        if parent == launcher.pid and "RANK" in variables:
            found[int(variables["RANK"])] = int(folder.name)
    return found


def wait_for_steps(process, updates=3):
    for line in process.stdout:
        if line.startswith("step"):
            updates -= 1
        if updates == 0:
            return


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_process_that_dies_takes_the_others_with_it(tmp_path):
    process = torchrun(tmp_path, "impala_procgen_srwm.py")
    wait_for_steps(process)
    begin, processes = time.time(), workers(process)
    os.kill(processes[1], signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "SIGKILL" in out or "Signal 9" in out
    assert time.time() - begin < 60 and not Path(f"/proc/{processes[0]}").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_two_machines_recover_from_the_death_of_a_worker(command, tmp_path):
    """Here two agents of torchrun on one, which count restarts each for itself. Before the first checkpoint they begin another
    run, and do not take over an older one of the same arguments; after it they go on from there."""
    words = ["--save-interval", 0.5, "--total-steps", 50 * STEPS]
    command(script, *WORDS, *words[:2], "--total-steps", 20)
    (older,) = tmp_path.glob("runs/*/checkpoint.pt")
    saved = torch.load(older)
    torch.save(saved | {"args": saved["args"] | {"total_steps": 50 * STEPS}}, older)
    before = older.read_bytes()

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    machine = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    agents = [torchrun(tmp_path, "impala_procgen_srwm.py", *words, machine=machine, options=["--max-restarts", "3"])
              for _ in range(2)]

    def kill(rank, when):
        """Kills the worker of that rank when so many runs have files of that name."""
        end, (count, name) = time.time() + 90, when
        while len(list(tmp_path.glob(f"runs/*/{name}"))) < count and time.time() < end:
            time.sleep(0.02)
        os.kill((workers(agents[0]) | workers(agents[1]))[rank], signal.SIGKILL)

    kill(1, when=(2, "lock"))
    kill(0, when=(2, "checkpoint.pt"))
    for agent in agents:
        out, _ = agent.communicate(timeout=120)
        assert agent.returncode == 0, out
    assert older.read_bytes() == before and len(list(tmp_path.glob("runs/*"))) == 3  # the second had no checkpoint
    (new,) = set(tmp_path.glob("runs/*/checkpoint.pt")) - {older}
    state = checkpoints.load_checkpoint(new, None)
    assert state["step"] == 50 * STEPS and state["optimizer"]["state"][0]["step"] == 50


@pytest.mark.slow
def test_processes_that_go_on_from_different_checkpoints_end(tmp_path):
    program = """
import sys, impala_procgen_srwm as script
launch = script.Launch()
launch.agree(lambda: None)
launch.join("gloo", step=int(sys.argv[1]))
"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | dict(PYTHONPATH=str(ROOT), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes = [subprocess.Popen([sys.executable, "-c", program, step], text=True, stderr=subprocess.PIPE,
                                  env=environment | {"RANK": rank}) for rank, step in (("0", "40"), ("1", "0"))]
    for process in processes:
        assert "do not go on from the same checkpoint, but from steps [40, 0]" in process.communicate(timeout=60)[1]
        assert process.returncode != 0


@pytest.mark.slow
def test_a_signal_stops_all_processes_after_the_same_update(tmp_path):
    process = torchrun(tmp_path, "impala_procgen_srwm.py")
    wait_for_steps(process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=40)
    assert "saved runs/" in out, out
    state = checkpoint(tmp_path)
    assert state["optimizer"]["state"][0]["step"] == state["step"] / STEPS


def test_cores_are_neighbours_by_socket_and_physical_core(tmp_path):
    """As on two sockets of two cores with two threads each, whose second threads Linux numbers last."""
    for core, (package, physical) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)] * 2):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{core}/topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{physical}\n")
    assert sorted(range(8), key=lambda core: launch.place_of(core, tmp_path)) == [0, 4, 1, 5, 2, 6, 3, 7]
    assert sorted([2, 10, 1], key=lambda core: launch.place_of(core, tmp_path / "nowhere")) == [1, 2, 10]
