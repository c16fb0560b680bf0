"""Break each guard once on purpose and see its test fail.     python -m scripts.mutants [word in the guard's name ...]

The guards are in scripts/mutants.yaml. Works on a copy of the checkout; prints a row a guard, and exits with 1 when
the tests did not notice one.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    guard: str
    file: str
    old: str
    new: str
    test: str  # what has to notice: a file, and what -k takes


MUTANTS = [Mutant(**entry) for entry in yaml.safe_load((ROOT / "scripts/mutants.yaml").read_text())]


def passes(test: str, copy: Path) -> bool:
    argv = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *test.split()]
    env = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    code = subprocess.run(argv, cwd=copy, env=env, capture_output=True, timeout=900).returncode
    assert code in (0, 1), f"{test}: pytest could not run (exit {code})"
    return code == 0


def broken(mutant: Mutant, sound: str) -> str:
    """The file with its guard broken; refuses one that every test would notice: it must compile and know its names."""
    assert mutant.old in sound, f"{mutant.guard}: {mutant.file} no longer has {mutant.old!r}"
    text = sound.replace(mutant.old, mutant.new, 1)
    if mutant.file.endswith(".py"):
        compile(text, mutant.file, "exec")
        ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--quiet", "--output-format", "concise"]
        ruff += ["--select", "F821,F823", "--stdin-filename", mutant.file, "-"]
        done = subprocess.run(ruff, input=text, capture_output=True, text=True)
        assert done.returncode == 0, f"{mutant.guard}: {done.stdout}{done.stderr}"
    return text


def noticed(mutant: Mutant, copy: Path) -> bool:
    """Does the test fail on the broken copy?"""
    path = copy / mutant.file
    sound = path.read_text()
    path.write_text(broken(mutant, sound))
    passed = passes(mutant.test, copy)
    path.write_text(sound)
    return not passed


def main() -> None:
    chosen = [m for m in MUTANTS if not sys.argv[1:] or any(word in m.guard for word in sys.argv[1:])]
    if not chosen:
        sys.exit(f"{' '.join(sys.argv[1:])}: no guard in scripts/mutants.yaml has that in its name")
    unnoticed = 0
    with tempfile.TemporaryDirectory(prefix="gcssl-mutants-") as folder:
        copy = Path(folder) / "gcssl"
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
        for test in sorted({mutant.test for mutant in chosen}):
            assert passes(test, copy), f"{test}: fails although nothing is broken"
        for mutant in chosen:
            found = noticed(mutant, copy)
            unnoticed += not found
            print(f"{'noticed' if found else 'UNNOTICED':<10} {mutant.guard:<50} {mutant.test}", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} broken guards were noticed")
    sys.exit(bool(unnoticed))


if __name__ == "__main__":
    main()
