"""The project's plan: what imports what, and what has to be installed for it."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("housekeeping", "reporting", "srwm_cuda", "benchmarks", "tests")
FILES = [path for folder in (".", *FOLDERS) for path in (ROOT / folder).glob("*.py")]
OWN = {path.stem for path in FILES} | set(FOLDERS)


def imported(path):
    """The first parts of the names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", sorted(ROOT.glob("impala_procgen_*.py")), ids=lambda path: path.stem)
def test_of_the_project_a_script_imports_srwm_cuda_and_housekeeping(path):
    assert set(imported(path)) & OWN == {"srwm_cuda", "housekeeping"}


@pytest.mark.parametrize("folder, below", [("srwm_cuda", set()), ("housekeeping", {"srwm_cuda"})])
def test_what_scripts_share_imports_nothing_that_is_above_it(folder, below):
    for path in (ROOT / folder).glob("*.py"):
        assert set(imported(path)) & OWN <= below | {path.stem}, path  # a standard module may have the name of one of ours


def test_only_evaluate_py_imports_reporting():
    importers = {path.relative_to(ROOT) for path in FILES if "reporting" in imported(path)}
    assert {path for path in importers if path.parts[0] not in ("tests", "reporting")} == {Path("evaluate.py")}


def test_reporting_does_not_import_evaluate():
    assert not [path for path in (ROOT / "reporting").glob("*.py") if "evaluate" in imported(path)]


@pytest.mark.parametrize("module", ["evaluate", "impala_procgen_srwm"])
def test_a_start_does_not_wait_for_the_import_of_pytorch_s_compiler(module):
    program = f"import sys, {module}; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, check=True)


def test_no_script_in_particular_is_needed_to_evaluate():
    used = {name for path in (ROOT / "evaluate.py", *(ROOT / "reporting").glob("*.py")) for name in imported(path)}
    assert not [name for name in used if name.startswith("impala_procgen_")]


def test_the_requirements_name_all_that_is_imported():
    required = {re.split(r"[=; ]", line)[0].lower() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    distributions = packages_distributions()
    for name in {name for path in FILES for name in imported(path)} - OWN - sys.stdlib_module_names:
        if name in distributions:
            assert {candidate.lower().replace("_", "-") for candidate in distributions[name]} & required, name
        else:  # what another Python needs: procgen comes as procgen-mirror
            assert any(each.startswith(name.replace("_", "-")) for each in required), name
