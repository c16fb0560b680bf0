"""The shape of the checkout: what would break Python's own `ssl`, the links, the dependencies."""

import ast
import os
import re
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.mutants import MUTANTS, Mutant, broken

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ssl", "models", "eval", "configs")
LINKS = {**{name: f"../{name}" for name in FOLDERS}, "pretrain.py": "../pretrain.py"}


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_no_init_file(folder: str) -> None:
    """A regular package `ssl` at the root would hide Python's own from everything that is started there."""
    assert list((ROOT / folder).rglob("__init__.py")) == []


def test_an_editable_install_is_found_from_the_folder_above_a_clone(tmp_path: Path) -> None:
    """Where Python would take a clone in a folder of that name, which has no __init__.py, for the package."""
    (tmp_path / "gcssl").symlink_to(ROOT)
    code = "import gcssl, ssl; print(gcssl.__version__, ssl.__file__)"
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=outside, capture_output=True, text=True)
    assert done.returncode == 0 and str(ROOT) not in done.stdout, done.stderr


def test_ssl_is_pythons_own_and_knn_brings_no_heavy_library() -> None:
    assert ssl.create_default_context().verify_mode == ssl.CERT_REQUIRED
    code = (
        "import sys, ssl, asyncio; ssl.create_default_context(); from gcssl.eval.knn import knn_accuracy; "
        "import gcssl.ssl.masking; print(ssl.__file__); "
        "print([m for m in ('datasets', 'faiss', 'accelerate', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stdout.startswith(str(ROOT)), done.stderr
    assert done.stdout.splitlines()[1] == "[]"


@pytest.mark.parametrize("name", LINKS)
def test_links_are_relative_and_lead_somewhere(name: str) -> None:
    link = ROOT / "gcssl" / name
    assert link.is_symlink() and os.readlink(link) == LINKS[name]
    assert link.exists() and link.resolve() == ROOT / name


def test_functions_and_files_stay_short() -> None:
    long = []
    for path in [ROOT / "pretrain.py", *(p for d in ("gcssl", *FOLDERS, "scripts") for p in (ROOT / d).glob("*.py"))]:
        text = path.read_text()
        assert text.count("\n") <= (300 if path.name == "pretrain.py" else 400), path
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        long += [f.name for f in functions if f.end_lineno is not None and f.end_lineno - f.lineno >= 50]
    assert set(long) == {"fit"}  # a step reads in one place


def test_each_mutant_finds_what_it_breaks() -> None:
    for mutant in MUTANTS:
        assert (ROOT / mutant.file).read_text().count(mutant.old) >= 1, mutant.guard
        assert (ROOT / mutant.test.split()[0]).exists(), mutant.guard


def test_a_mutant_that_every_test_would_notice_is_refused() -> None:
    sound, mutant = "x = 1\ndef f():\n    print(2)\n", Mutant("a guard", "pretrain.py", "print(2)", "print(3)", "")
    assert broken(mutant, sound) == sound.replace("2", "3")
    for new, why in (("print(", "never closed"), ("print(y)", "F821"), ("print(x); x = 2", "F823")):
        with pytest.raises((SyntaxError, AssertionError), match=why):
            broken(mutant._replace(new=new), sound)


def test_the_checklist_names_tests_that_are_there() -> None:
    file, named = "", 0
    for path, name in re.findall(r"`(tests/[\w/.]+)?::(test_\w+)`", (ROOT / "docs/checklist.md").read_text()):
        file, named = path or file, named + 1
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
    assert named > 50


def test_one_faiss_only() -> None:
    """faiss-gpu and faiss-cpu install the same folder; each machine must get exactly one of them."""
    from packaging.requirements import Requirement

    text = (
        (ROOT / "setup.py")
        .read_text()
        .replace("{FAISS_GPU}", "platform_system == 'Linux' and platform_machine == 'x86_64'")
    )
    wanted = [Requirement(one) for one in re.findall(r'"(faiss-[^"]+)"', text)]
    assert sorted(one.name for one in wanted) == ["faiss-cpu", "faiss-gpu"]
    machines = [
        ("Linux", "x86_64"),
        ("Linux", "aarch64"),
        ("Darwin", "arm64"),
        ("Darwin", "x86_64"),
        ("Windows", "AMD64"),
    ]
    for system, machine in machines:
        environment = {"platform_system": system, "platform_machine": machine}
        chosen = [one.name for one in wanted if one.marker is not None and one.marker.evaluate(environment)]
        expected = "faiss-gpu" if (system, machine) == ("Linux", "x86_64") else "faiss-cpu"
        assert chosen == [expected], (system, machine)


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# These may import everything.
PROGRAMS = {"__init__.py", "export.py", "pretrain.py", "doctor.py", "dryrun.py", "trial.py", "plan.py"}
ARROWS = {
    "gcssl": ("gcssl.ssl", "gcssl.models", "gcssl.eval", "gcssl.pretrain"),
    "models": ("gcssl.ssl", "gcssl.eval", "gcssl.pretrain", "accelerate", "datasets"),
    "ssl": ("gcssl.eval", "gcssl.pretrain", "gcssl.data", "accelerate", "datasets"),
}


@pytest.mark.parametrize("folder", ARROWS)
def test_dependencies_point_one_way(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        if folder == "gcssl" and path.name in PROGRAMS:
            continue
        for name in imports_of(path):
            wrong = [one for one in ARROWS[folder] if name == one or name.startswith(one + ".")]
            assert not wrong, f"{folder}/{path.name} imports {name}"


def test_folders_are_imported_as_parts_of_gcssl() -> None:
    for path in [
        one
        for folder in ("ssl", "models", "eval", "gcssl", "scripts", "tests")
        for one in (ROOT / folder).rglob("*.py")
    ]:
        bare = {name.split(".")[0] for name in imports_of(path)} & {"models", "eval", "configs"}
        assert not bare, f"{path} imports {bare}"
        assert not {name for name in imports_of(path) if name.startswith("ssl.")} - {"ssl.create_default_context"}
