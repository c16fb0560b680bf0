"""The wheel holds the whole program: installed elsewhere, it pretrains and evaluates without the checkout."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def call(*argv: object, cwd: Path) -> str:
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(a) for a in argv], cwd=cwd, capture_output=True, text=True, env=outside)
    assert done.returncode == 0, f"{argv}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def test_installed_wheel_pretrains_and_evaluates(tmp_path: Path) -> None:
    source, venv = tmp_path / "source", tmp_path / "venv"
    call("git", "clone", "-q", ROOT, source, cwd=tmp_path)  # what is committed is what a user gets
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    call(*build, cwd=tmp_path)
    (wheel,) = tmp_path.glob("gcssl-*.whl")
    call(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin/python"
    call(sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", wheel, cwd=tmp_path)
    packages = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    # The other packages are borrowed. A .pth line adds the folder alone: its own .pth (our editable install) is
    # not read.
    (Path(packages) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    find = "import gcssl, gcssl.configs as c; print(gcssl.__file__, list(c.__path__)[0])"
    package, configs = call(python, "-c", find, cwd=tmp_path).split()
    assert str(venv) in package
    yaml = Path(configs) / "pretrain/simmim_gcvit_nano.yaml"
    small = ["data.shapes_n=64", "data.workers=0", "train.batch_size=16", "train.steps=2", "eval.online_every=0"]
    call(python, "-m", "gcssl.pretrain", yaml, "out=run", *small, cwd=tmp_path)
    call(python, "-m", "gcssl.eval.knn", "backbone=run", "data.workers=0", cwd=tmp_path)
    assert (tmp_path / "run/backbone.safetensors").exists() and (tmp_path / "run/eval/knn.json").exists()
