"""A user's copy is the experiment that its text says: a changed CNN, buffers, BatchNorm, dropout."""

import importlib
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import first_fast
from test_scripts import SCRIPTS
from test_training import parts, play, update

import impala_procgen_srwm
import srwm_cuda
from housekeeping import checkpoints
from reporting import playing

INIT = "        self.cnn = nn.Sequential(*layers)"
CONV = "return self.cnn(frames.permute(0, 3, 1, 2).to(self.dtype) / 255.0).flatten(1)"
RESIDUAL = "return x + self.conv1(F.relu(self.conv0(F.relu(x))))"
CHANGED_CNNS = {
    "gain of ones": ("INIT", "        self.gain = nn.Parameter(torch.ones(2048))\n", CONV, CONV + " * self.gain"),
    "branch that starts at zero": ("INIT", "        self.branch = nn.Parameter(torch.zeros(1))\n",
                                   CONV, CONV + " + self.branch * frames.float().mean()"),
    "squeeze and excite": (RESIDUAL, "y = self.conv1(F.relu(self.conv0(F.relu(x))))\n"
                                     "        return x + y * torch.sigmoid(y.mean((2, 3), keepdim=True))"),
    "buffer that starts at zero": ("INIT", '        self.register_buffer("shift", torch.zeros(2048))\n',
                                   CONV, CONV + " + self.shift"),
    "augmentation in training": (CONV, "frames = frames.roll(2, 1) if torch.is_grad_enabled() else frames\n        " + CONV),
    "detached input": (RESIDUAL, "return x.detach() + self.conv1(F.relu(self.conv0(F.relu(x))))"),
    "ReLU6": (RESIDUAL, RESIDUAL.replace("F.relu(x)", "F.relu6(x)")),
    "clamped": (CONV, CONV + ".clamp(-100, 100)"),
    "rounded": (CONV, CONV + ".mul(1e6).round().div(1e6)"),
    "leaky": (RESIDUAL, RESIDUAL.replace("F.relu(x)", "F.leaky_relu(x, 0.001)")),
    "mask of bright pixels": (CONV, CONV.replace("frames.permute", "frames.masked_fill(frames > 250, 0).permute")),
    "divided by 256": (CONV, CONV.replace("255.0", "256.0")),
    "subclass": ("self.encoder = Encoder(args)", "self.encoder = type('Mine', (Encoder,), dict(conv=Encoder.conv))(args)"),
    "layer added later": ("self.encoder = Encoder(args)",
                          "self.encoder = Encoder(args)\n        self.encoder.cnn.append(nn.Tanh())"),
    "stride changed later": ("self.encoder = Encoder(args)",
                             "self.encoder = Encoder(args)\n        self.encoder.cnn[0].stride = 2, 2"),
    "hook": ("self.encoder = Encoder(args)", "self.encoder = Encoder(args)\n"
             "        self.encoder.cnn[2].register_forward_hook(lambda module, inputs, output: 2 * output)"),
    "another class of the same name": ("@dataclass\nclass ModelArgs:", "class Residual(Residual):\n    def forward(self, x):\n"
                                       "        return x.tanh()\n\n\n@dataclass\nclass ModelArgs:"),
    "method from elsewhere": ("@dataclass\nclass ModelArgs:", "Residual.forward = lambda self, x: x\n\n\n@dataclass\n"
                              "class ModelArgs:"),
    "hook of the gradient": ("self.encoder = Encoder(args)", "self.encoder = Encoder(args)\n"
                             "        self.encoder.cnn[2].register_full_backward_hook(lambda *words: None)"),
    "wider": ("for out in (16, 32, 32)", "for out in (24, 32, 32)"),
}


def kernels_would_run(script):
    encoder = script.Agent(script.Args(cuda=False, bf16=True)).encoder
    encoder.kernels = True  # as on a GPU
    return encoder.fused()


@pytest.mark.parametrize("stem", SCRIPTS)
def test_the_kernels_compute_the_cnn_of_the_scripts(stem):
    script = importlib.import_module(stem)
    assert kernels_would_run(script)
    agent = script.Agent(script.Args(cuda=False, bf16=False))
    frames = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    theirs = srwm_cuda.impala_cnn(frames, *agent.encoder.cnn.parameters())
    torch.testing.assert_close(theirs, agent.encoder.conv(frames))


@pytest.mark.parametrize("change", CHANGED_CNNS.values(), ids=CHANGED_CNNS)
def test_a_changed_cnn_does_not_run_in_the_kernels(change, own_copy):
    change = (INIT, change[1] + INIT, *change[2:]) if change[0] == "INIT" else change
    assert not kernels_would_run(own_copy(*change))


def test_a_text_that_changed_after_the_start_is_as_it_was_then(own_copy, tmp_path):
    script = own_copy(CONV, CONV.replace("255.0", "128.0"))
    (tmp_path / "my_ablation.py").write_text(Path(impala_procgen_srwm.__file__).read_text())
    assert not kernels_would_run(script)
    (tmp_path / "my_ablation.py").write_text("class Encoder(")
    assert not kernels_would_run(script)


def test_a_comment_or_another_model_does_not_keep_the_kernels_from_the_cnn(own_copy):
    assert kernels_would_run(own_copy(CONV, CONV + "  # 2048 of them", "hidden_size: Positive = 128", "hidden_size: int = 64"))


@pytest.mark.gpu
def test_a_changed_cnn_trains_on_the_gpu_compiled_and_all_of_it(own_copy, command, tmp_path, capsys):
    script = own_copy(INIT, "        self.gain = nn.Parameter(torch.ones(2048))\n" + INIT, CONV, CONV + " * self.gain")
    words = "--cuda --multi-env 2 --num-actors 2 --num-envs 8 --batch-size 8 --total-steps 8000"
    command(script, *words.split())
    assert "the CNN: PyTorch, since Encoder was changed" in capsys.readouterr().out
    (run,) = (tmp_path / "runs").iterdir()
    gain = checkpoints.load_checkpoint(run / "checkpoint.pt", None)["model"]["encoder.gain"]
    assert (gain != 1).float().mean() > 0.5
    agent = script.Agent(script.resolve_args(script.Args(cuda=True, bf16=True))[0]).cuda()
    frames = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8, device="cuda")
    with torch.no_grad():
        compiled = agent.encoder(frames)
        assert agent.encoder.compiled
        agent.encoder.compiled = None
        torch.testing.assert_close(compiled, agent.encoder(frames), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_an_unchanged_cnn_is_said_to_run_in_the_kernels(command, capsys):
    words = "--cuda --multi-env 2 --num-actors 2 --num-envs 8 --batch-size 8 --total-steps 400"
    command(impala_procgen_srwm, *words.split())
    assert "the CNN: kernels" in capsys.readouterr().out


def test_a_parameter_without_a_gradient_is_named_once(own_copy, train, capsys):
    train("--total-steps", 60, script=own_copy(INIT, "        self.unused = nn.Parameter(torch.ones(3))\n" + INIT))
    assert capsys.readouterr().out.count("no gradient reaches encoder.unused\n") == 1


INPUT = "h = self.input(torch.cat([features, last_reward], dim=-1))"
MODES = {
    "buffer": 'self.register_buffer("core", torch.rand(args.hidden_size))',
    "BatchNorm": "self.core = nn.BatchNorm1d(args.hidden_size)",
    "dropout": "self.core = nn.Dropout(0.5)",
    "slice": "self.core = nn.Parameter(torch.rand(args.hidden_size, 8)[:, :1])",
}


def copy_with(own_copy, kind):
    uses = {"buffer": "h * self.core", "slice": "h * self.core[:, 0]"}
    use = f"{INPUT}\n        h = " + uses.get(kind, "self.core(h.flatten(0, 1)).unflatten(0, h.shape[:2])")
    layers = "        self.layers = nn.ModuleList(SRWM"
    return own_copy(layers, f"        {MODES[kind]}\n{layers}", INPUT, use)


@pytest.mark.parametrize("kind", first_fast("BatchNorm", "buffer", "dropout", "slice"))
def test_the_policy_that_acts_is_the_one_that_v_trace_compares_with(kind, own_copy):
    """At lag 0 their ratio is 1, also after updates: buffers and averages travel, and actors drop nothing out."""
    script = copy_with(own_copy, kind)
    args = script.Args(cuda=False, bf16=False, num_actors=1, num_envs=6, num_servers=1, unroll_length=20, batch_size=6)
    actor, learner, unroll, _ = parts(args, script=script)
    for _ in range(3):
        play(actor, unroll)
        learner.batch.copy_from(unroll, 0, 6)
        statistics, finite = update(learner, args.learning_rate)
        assert finite and statistics["policy_lag"] == 0
        assert statistics["vtrace/mean_rho"] == pytest.approx(1, abs=1e-4)
    for ours, theirs in zip(learner.agent.buffers(), actor.agent.buffers()):
        actor.weights.fetch(actor.agent)
        assert torch.equal(ours, theirs)


def test_a_state_may_have_parts_of_any_shape_and_type_each_with_its_own_bound():
    state = (torch.tensor([[1.0], [200.0], [1.0]]), torch.tensor([500.0, 500.0, torch.nan]),
             torch.tensor([True, True, True]), torch.tensor([[7, 7]] * 3))
    assert srwm_cuda.reset_diverged(state, (100.0, math.inf, math.inf, math.inf)) == 2
    assert [part[0].max().item() for part in state] == [1, 500, True, 7]
    assert all((part[1:] == 0).all() for part in state)
    assert srwm_cuda.reset_diverged((torch.zeros(3, 0),), 100.0) == 0
    with pytest.raises(ValueError, match="state_bound must be a number, or one for each of 4 parts, got"):
        srwm_cuda.reset_diverged(state, [100.0, 100.0])


@pytest.mark.slow
def test_an_optimizer_may_have_two_groups_of_parameters(own_copy, train, command):
    script = own_copy("self.parameters, self.learning_rate, args.alpha",
                      "[dict(params=self.parameters[:9]), dict(params=self.parameters[9:], momentum=0.5)],"
                      " self.learning_rate, args.alpha")
    run = train("--total-steps", 40, script=script)
    command(script, "--resume", run, "--total-steps", 60)
    state = checkpoints.load_checkpoint(run / "checkpoint.pt", None)["optimizer"]
    assert len(state["param_groups"]) == 2 and {each["step"].item() for each in state["state"].values()} == {3}


ARGUMENTS = """    data: Path | None = None
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[Path, float] = (Path("a"), 0.5)
    names: list[Path] = field(default_factory=list)
    colour: Colour = Colour.RED
    more: More = field(default_factory=More)
    carry_state: bool = True"""
TYPES = """class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass
class More:
    x: float = 1.0
    files: tuple[Path, ...] = ()


@dataclass
class EnvironmentArgs:"""


@pytest.mark.slow
def test_arguments_of_a_copy_of_any_type_come_back_from_a_checkpoint(own_copy, train):
    script = own_copy("@dataclass\nclass EnvironmentArgs:", TYPES, "    carry_state: bool = True", ARGUMENTS,
                      "import contextlib\n", "import contextlib\nimport enum\n",
                      "from dataclasses import dataclass,", "from dataclasses import dataclass, field,")
    words = "--data a/b --sizes 3 4 5 --pair c 2 --names d --colour BLUE --more.x 2 --more.files a b".split()
    words += ["--save-extra-checkpoint", "20"]
    run = train("--total-steps", 40, *words, script=script)
    saved = checkpoints.load_checkpoint(run / "checkpoint.pt", None)["args"]
    args = script.from_plain(saved)
    assert (args.data, args.sizes, args.colour) == (Path("a/b"), (3, 4, 5), script.Colour.BLUE)
    assert (args.pair, args.names) == ((Path("c"), 2.0), [Path("d")])
    assert args.more == script.More(2.0, (Path("a"), Path("b")))
    shutil.copy(run / "checkpoint_20.pt", run / "checkpoint.pt")  # as of an unfinished run
    assert train("--total-steps", 40, *words, "--resume", "auto", script=script) is None  # no new one
    assert checkpoints.load_checkpoint(run / "checkpoint.pt", None)["step"] == 40


def test_an_argument_of_a_copy_that_a_checkpoint_cannot_hold_is_refused(own_copy, command, refused):
    unit = "class Unit:\n    def __init__(self, x: int = 1):\n        self.x = x\n\n\n@dataclass\nclass EnvironmentArgs:\n"
    script = own_copy("@dataclass\nclass EnvironmentArgs:\n", unit + "    unit: Unit = field(default_factory=Unit)\n",
                      "from dataclasses import dataclass,", "from dataclasses import dataclass, field,")
    refused(lambda: command(script, "--no-cuda", "--total-steps", 1), "cannot hold an argument of type Unit")


def test_a_difference_between_the_modes_that_starts_hidden_is_found(own_copy):
    """Dropout before a head that starts at zero."""
    head, end = "return self.policy(h), self", "    def initial_state(self, batch_size):  # zeros (B"
    script = own_copy(head, "h = F.dropout(h, 0.5, self.training)\n        " + head,
                      end, "    def zeroed(self):\n        nn.init.zeros_(self.policy.weight)\n        return self\n\n" + end)
    args = script.Args(cuda=False, bf16=False, num_actors=1, num_envs=6, unroll_length=5, batch_size=1)
    agent = script.Agent(args).zeroed()
    before = [x.clone() for x in agent.parameters()]
    assert script.Learner(agent, args).modes_differ
    assert all(map(torch.equal, before, agent.parameters()))


@pytest.mark.parametrize("stem", SCRIPTS)
def test_the_scripts_agents_compute_the_same_in_both_modes(stem):
    """So that no update pays for a second pass."""
    script = importlib.import_module(stem)
    args = script.Args(cuda=False, bf16=False, num_actors=1, num_envs=6, unroll_length=2, batch_size=2)
    assert not script.Learner(script.Agent(args), args).modes_differ


@pytest.mark.slow
def test_averages_are_of_training_alone(own_copy):
    """Neither a learner's start nor an update that is not finite changes them."""
    script = copy_with(own_copy, "BatchNorm")
    args = script.Args(cuda=False, bf16=False, num_actors=1, num_envs=6, num_servers=1, unroll_length=20, batch_size=6)
    actor, learner, unroll, _ = parts(args, script=script)
    mean = learner.agent.core.running_mean
    assert (mean == 0).all() and learner.agent.training and not actor.agent.training
    play(actor, unroll)
    learner.batch.copy_from(unroll, 0, 6)
    learner.batch.reward.fill_(torch.nan)
    assert not update(learner, args.learning_rate)[1] and (mean == 0).all()
    learner.batch.reward.zero_()
    assert update(learner, args.learning_rate)[1] and (mean != 0).any()


@pytest.mark.slow
def test_a_level_s_return_is_the_same_in_whatever_company_with_batchnorm_too(own_copy, few_slots):
    script = copy_with(own_copy, "BatchNorm")
    args = script.Args(cuda=False, bf16=False)
    agent = script.Agent(args)
    agent.core.running_mean.normal_()
    alone = playing.play(script, agent, args, [("bigfish", 2)], greedy=False)
    together = playing.play(script, agent, args, [("bigfish", level) for level in range(4)], greedy=False)
    assert alone[0] == together[2] and agent.core.num_batches_tracked == 0


def test_an_episode_begins_without_a_last_reward_in_training_as_in_evaluation():
    script = impala_procgen_srwm
    agent = script.Agent(script.Args(cuda=False, bf16=False))
    obs = torch.randint(0, 256, (1, 2, 64, 64, 3), dtype=torch.uint8)
    done = torch.tensor([[True, False]])
    with torch.no_grad():
        some, none = (agent(obs, torch.full((1, 2), reward), done, agent.initial_state(2))[0][0] for reward in (1.0, 0.0))
    assert torch.equal(some[0], none[0]) and not torch.equal(some[1], none[1])


def test_a_copy_may_stack_frames(own_copy, train, score):
    """By a wrapper in make_envs and another FRAME_SHAPE: in training and in evaluation."""
    wrapper = '''
class Stack:
    def __init__(self, envs):
        self.envs, self.act, self.last = envs, envs.act, None
        self.get_state, self.call_c_func = envs.get_state, envs.call_c_func

    def observe(self):
        reward, obs, first = self.envs.observe()
        frames = obs["rgb"].copy()
        last = frames if self.last is None else np.where(first[:, None, None, None], frames, self.last)
        self.last = frames
        return reward, dict(rgb=np.concatenate([last, frames], -1)), first


def make_envs('''
    script = own_copy("FRAME_SHAPE, NUM_ACTIONS, FEATURES = (64, 64, 3)", "FRAME_SHAPE, NUM_ACTIONS, FEATURES = (64, 64, 6)",
                      "\ndef make_envs(", wrapper, "    return ProcgenGym3Env(num,", "    return Stack(ProcgenGym3Env(num,",
                      "num_threads=num_threads,\n                          **options)",
                      "num_threads=num_threads,\n                          **options))")
    args = script.Args(cuda=False, bf16=False, num_actors=1, num_envs=6, num_servers=1, unroll_length=20, batch_size=6)
    actor, _, unroll, _ = parts(args, script=script)
    play(actor, unroll)
    same = (unroll.obs[1:, :, :, :, :3] == unroll.obs[:-1, :, :, :, 3:]).flatten(2).all(-1)
    assert (same | unroll.done[1:]).all() and not (unroll.obs[1:, ..., :3] == unroll.obs[1:, ..., 3:]).all()
    run = train("--total-steps", 20, script=script)
    score(run, "--num-levels", 1, "--env", "fruitbot")
    assert (run / "evaluation_fruitbot_easy_0_1.json").exists()
