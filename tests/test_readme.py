"""The READMEs and docs/: every command is accepted, every link leads somewhere, every name in code style exists.

The commands run in a folder as a reader has it: the project, the runs that the text speaks of, and the README's ablation. They
run for real up to the point where procgen's engine would start: by then a script has checked its arguments, and evaluate.py has
loaded its runs.
"""

import contextlib
import functools
import importlib.util
import io
import json
import operator
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.run
import tyro
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_scripts import apply

import evaluate
import impala_procgen_srwm

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "tests/README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
SHORT = "--no-cuda --num-actors 1 --num-envs 6 --unroll-length 5 --batch-size 4 --total-steps 20".split()
MADE = re.compile(r"(runs/.*|\w+\.(pt|json)|out\.\w+)$")  # by the commands


@functools.cache
def read(document):
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document):
    """Language and text of each code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", read(document), re.MULTILINE | re.DOTALL)


def prose(document):
    return re.sub(r"^```.*?^```$", "", read(document), flags=re.MULTILINE | re.DOTALL)


def spans(document):
    """What stands in code style in the text; of a table with the flags of others, only the column with ours."""
    text = re.sub(r"^\| .* \| (.*) \|$", r"\1", prose(document), flags=re.MULTILINE) if "flags" in document else prose(document)
    return list(dict.fromkeys(span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text)))


def split(line):
    """The commands of a line of shell, as lists of words."""
    commands = [[]]
    for word in shlex.split(line, comments=True):
        if word == "&&":
            commands.append([])
        else:
            commands[-1].append(word)
    return [words for words in commands if words]


def is_command(span):
    return re.match(r"(python|torchrun|pip|uv|tensorboard|diff|apt|docker) |[\w/]+\.py ", span)


def is_path(span):
    return re.fullmatch(r"[\w./-]+(\.(py|cu|cuh|md|txt|pt|json|png|gif|mp4)|/)|runs/\w+", span)


def commands():
    for document in DOCUMENTS:
        shell = "\n".join(text for language, text in blocks(document) if language == "bash").replace("\\\n", "")
        for line in [*shell.splitlines(), *filter(is_command, spans(document))]:
            for words in split(line):
                marks = [] if document == "README.md" else pytest.mark.slow
                yield pytest.param(words, id=f"{document}: {' '.join(words)}", marks=marks)


class Accepted(Exception):
    """Nothing is wrong with a command: the engine would start, a subcommand, or a program with this command line."""


def stop(*args, **options):
    raise Accepted(*args)


def execute(words):
    """Follows a command as far as `Accepted`. SystemExit if it is refused, AssertionError if there is no such file."""
    program, *words = words
    if program.endswith(".py"):
        program, words = "python", [program, *words]
    if program in ("diff", "tensorboard", "pip", "uv"):
        files = [word for last, word in zip([program, *words], words) if program == "diff" or last in ("--logdir", "-r")]
        assert all(Path(file).exists() for file in files), files
    elif program == "torchrun":
        launch = torch.distributed.run.get_args_parser().parse_args(words)
        execute(["python", launch.training_script, *launch.training_script_args])
    elif program == "python" and words[0] == "-m":
        assert importlib.util.find_spec(words[1]), words[1]
        if words[2:]:
            sys.argv[:] = words[1:] + ["--collect-only"] * (words[1] == "pytest")  # it must find some, and run none
            runpy.run_module(words[1], run_name="__main__")
    elif program == "docker":
        assert Path("Dockerfile").is_file()
        if "python" in words:  # what a container runs
            execute(words[words.index("python"):])
    elif program == "python":
        assert Path(words[0]).is_file(), f"there is no {words[0]}"
        if words[1:]:
            sys.argv[:] = words
            runpy.run_path(words[0], run_name="__main__")
    else:
        assert program == "apt", f"{program}: this test does not know how to follow it"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the project's files, the runs A, B and NAME, and the README's ablation in a copy of its own."""
    folder = tmp_path_factory.mktemp("project")
    for path in ROOT.iterdir():
        if path.name not in ("runs", "wandb") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    (diff,) = [text for language, text in blocks("README.md") if language == "diff"]
    (folder / "impala_procgen_gated.py").write_text(apply(diff, Path(impala_procgen_srwm.__file__).read_text()))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["torchrun"])
        execute(first_commands()[1] + SHORT)
    (run,) = (folder / "runs").iterdir()
    torch.save(torch.load(run / "checkpoint.pt") | {"step": 10}, run / "checkpoint.pt")  # as of an unfinished run
    shutil.copy(run / "checkpoint.pt", run / "best.pt")
    for name in ("A", "B", "NAME"):
        shutil.copytree(run, folder / "runs" / name)
    return folder


@pytest.fixture
def follow(project, monkeypatch, capsys):
    """Follows a command in the project's folder. Returns what was said of it if it was refused, and None if it was not."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["torchrun"])
    for engine in impala_procgen_srwm.ProcgenGym3Env.__mro__[:-1]:
        monkeypatch.setattr(engine, "__init__", stop)
    monkeypatch.setattr(subprocess, "Popen", stop)
    parse = tyro.extras.subcommand_cli_from_dict
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", lambda subcommands, **options: parse(
        {name: functools.wraps(function)(functools.partial(stop)) for name, function in subcommands.items()}, **options))

    def run(words):
        try:
            execute(words)
        except SystemExit as end:
            return f"{' '.join(words)}: {capsys.readouterr().err or end.code}" if end.code else None
        except Accepted as accepted:
            if accepted.args and isinstance(accepted.args[0], list):  # a benchmark's, which passes words on to the scripts
                _, *launched = map(str, accepted.args[0])
                return run(["torchrun", *launched[2:]] if launched[0] == "-m" else ["python", *launched])
        except AssertionError as error:
            return str(error)

    return run


def first_commands():
    language, text = blocks("README.md")[0]
    return [words for line in text.splitlines() for words in split(line)]


@pytest.mark.slow
def test_the_readme_s_first_commands_install_train_and_score(project, few_slots, monkeypatch, capsys):
    """With a few steps and levels; the rest of the tests needs the first to be done."""
    install, train, *scores = first_commands()
    assert install == "pip install -r requirements.txt".split() and train[:1] == ["python"] and len(scores) == 2
    monkeypatch.chdir(project)
    for score in scores:
        assert score[:2] == ["python", "evaluate.py"]
        monkeypatch.setattr(sys, "argv", score[1:] + "--num-levels 1 --env starpilot --no-cuda".split())
        evaluate.main()
        assert re.search(r"^starpilot +srwm +1 +-?\d", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("words", list(commands()))
def test_commands_are_accepted(words, follow):
    refused = follow(words)
    assert refused is None, refused


@pytest.mark.parametrize("document", DOCUMENTS)
def test_arguments_in_the_text_are_those_of_a_script_or_of_evaluate(document, follow):
    programs = ["impala_procgen_srwm.py", "evaluate.py"]
    if document == "docs/evaluation.md":  # the likelier first: it is quicker to accept than to refuse
        programs.reverse()
    for span in spans(document):
        words = span.split()
        if len(words) > 1 and span.startswith("--"):
            assert None in map(follow, ([program, *words] for program in programs)), span
        elif span.startswith("--"):
            assert is_flag(span), span


@functools.cache
def is_flag(word):
    """Whether a parser knows it, with or without a value."""
    for args in (impala_procgen_srwm.Args, evaluate.Args):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                tyro.cli(args, args=[word])
                return True
            except SystemExit:
                if "Unrecognized" not in output.getvalue():
                    return True
    return word in torch.distributed.run.get_args_parser().format_help()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_in_the_text_exist(document, project):
    folders = {project, (project / document).parent}
    missing = [span for span in spans(document) if is_path(span) and not MADE.match(span)
               and not any((folder / span).exists() for folder in folders)]
    assert not missing


@functools.cache
def vocabulary():
    folders = ("srwm_cuda", "housekeeping", "reporting")
    files = [ROOT / "impala_procgen_srwm.py", ROOT / "evaluate.py"]
    files += [path for folder in folders for path in ROOT.glob(f"{folder}/*.py")]
    return set(re.findall(r"\w+", " ".join(path.read_text(encoding="utf-8") for path in files))) | {"GAME", "NAME", "HOST"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_in_the_text_are_those_of_the_code(document):
    """A.b is an attribute of A in the SRWM script; other names, and the parts of TensorBoard's tags, occur somewhere."""
    for name in spans(document):
        if re.fullmatch(r"[A-Za-z]\w*(\.\w+)+", name) and not is_path(name):
            assert operator.attrgetter(name)(impala_procgen_srwm)
        elif re.fullmatch(r"[A-Za-z]\w*(/\w+)?", name):
            assert set(re.findall(r"\w+", name.removeprefix("valid_"))) <= vocabulary(), name


def anchors(document):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(document):
    return re.findall(r"\]\(([^()\s]+)\)", prose(document))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for link in links(document):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = ((ROOT / document).parent / file).resolve() if file else ROOT / document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.relative_to(ROOT)), link


def test_the_readme_names_every_document():
    assert set(DOCUMENTS[1:]) <= {link.split("#")[0] for link in links("README.md")}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_code_block_says_what_it_is(document):
    assert all(language in ("bash", "text", "diff", "bibtex", "python") for language, _ in blocks(document))
    assert not any(is_command(line) for language, text in blocks(document) if language == "text" for line in text.splitlines())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_lines_are_short_and_the_readme_is_too(document):
    lines = read(document).splitlines()
    assert max(map(len, lines)) <= 120 and (len(lines) <= 220 or document != "README.md")


def test_the_container_has_what_the_readme_says_is_needed_and_its_command_is_accepted(follow):
    text = (ROOT / "Dockerfile").read_text()
    (needed,) = [span.split()[2:] for span in spans("README.md") if span.startswith("apt install")]
    assert set(needed) <= set(text.split()) and "pip install --no-cache-dir -r requirements.txt" in text
    (command,) = re.findall(r"^CMD (.*)$", text, re.MULTILINE)
    assert follow(json.loads(command)) is None and len(text.splitlines()) <= 10


def test_what_git_ignores_the_container_leaves_out_too():
    ignored, left_out = ((ROOT / name).read_text().split() for name in (".gitignore", ".dockerignore"))
    assert {name.rstrip("/") for name in ignored} | {".git"} == {name.removeprefix("**/") for name in left_out}


def test_the_lines_of_python_that_load_an_agent_and_let_it_act_do_so(project, monkeypatch):
    monkeypatch.chdir(project)
    (text,) = [text for language, text in blocks("docs/evaluation.md") if language == "python"]
    names = {}
    exec(compile(text, "docs/evaluation.md", "exec"), names)
    assert names["total"] >= 10  # at least one crossing


@pytest.mark.slow
def test_the_notebook_plays_a_level_and_draws_what_the_matrices_do(tmp_path, few_slots, monkeypatch):
    pytest.importorskip("matplotlib")
    cells = json.loads((ROOT / "notebooks/srwm.ipynb").read_text())["cells"]
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr(sys, "path", [*sys.path])
    names, code = {}, ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for text in code:
        exec(compile(text, "notebooks/srwm.ipynb", "exec"), names)
    assert len(code) == 5 and len(names["frames"]) == len(names["rewards"]) > 100 and sum(names["rewards"]) > 10
    assert Image.open("out.png").size[0] > 1000
    assert sum(names["without"]) != 0 and not any(cell.get("outputs") for cell in cells)


@pytest.mark.slow
def test_every_tag_of_a_run_is_explained(command, tmp_path):
    words = "--num-actors 1 --num-envs 4 --unroll-length 20 --batch-size 4 --log-interval 0 --valid-num-levels 2"
    command(impala_procgen_srwm, "--no-cuda", "--env", "leaper", "--total-steps", 800, *words.split())
    (run,) = tmp_path.glob("runs/*")
    accumulator = EventAccumulator(str(run)).Reload()
    tags = {tag.replace("leaper", "GAME") for tag in accumulator.Tags()["scalars"]}
    assert {"return/GAME", "valid_return/GAME", "SPS"} <= tags
    explained = {span for line in read("docs/training.md").splitlines() if line.startswith("| `")
                 for span in re.findall("`([^`]+)`", line)}
    assert {tag.removeprefix("valid_") for tag in tags} <= explained


def test_what_differs_from_the_paper_is_numbered_and_names_the_code():
    (part,) = re.findall(r"^## Details that differ.*?(?=^## )", read("docs/differences.md"), re.MULTILINE | re.DOTALL)
    details = re.split(r"^\d+\. ", part, flags=re.MULTILINE)[1:]
    numbers = list(map(int, re.findall(r"^(\d+)\. ", part, re.MULTILINE)))
    named = [re.findall(r"`(\w+)`", detail) for detail in details]
    assert numbers == list(range(1, len(details) + 1)) and sum(map(bool, named)) >= len(details) - 1
    assert all(hasattr(impala_procgen_srwm, name) for names in named for name in names)


def test_the_film_moves_and_is_small():
    film = ROOT / "docs/agent.gif"
    assert Image.open(film).n_frames > 1 and film.stat().st_size <= 3 * 10**6
