"""Every benchmark on this machine, one after another:   python -m scripts.bench [word in a benchmark's command ...]

Writes docs/results/bench-<hardware>.md, with the commands and what they printed, and the json of each. About twenty
minutes on a CPU. A benchmark asked for by name replaces its own part of an earlier page.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from gcssl.errors import UserError
from gcssl.runtime import entry
from scripts.timing import hardware

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs/results"
ON_CPU = (
    "bench_model --variant gcvit_xxtiny gcvit_tiny --bf16",
    "bench_masked --variant gcvit_xxtiny",
    "bench_masked --variant gcvit_tiny",
    "bench_input",
    "bench_eval",
    "bench_scale --parts checkpointing processes",
    "bench_scale --parts growth",
    "bench_scale --parts objectives",
)
ON_GPU = (
    "bench_model --variant gcvit_tiny gcvit_base --profile",
    "bench_masked --variant gcvit_xxtiny --ratio 0.6 0.75 --batch 64 --bf16",
    "bench_masked --variant gcvit_tiny --ratio 0.6 0.75 --batch 64 --bf16",
    "bench_eval --batch 64",
    "bench_input",
    "bench_model --variant gcvit_tiny --compile --kinds train",  # last: compiling may take what is left
)
COMMANDS = ON_GPU if torch.cuda.is_available() else ON_CPU


def run(command: str) -> dict[str, object]:
    """What the benchmark printed, and its json."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        argv = [sys.executable, "-m", *f"scripts.{command} --out {out}".split()]
        done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"{command}: failed with {done.returncode}; what it said is above")
        return {"command": command, "printed": done.stdout.strip(), **json.loads(out.read_text())}


def page(name: str, found: list[dict[str, object]]) -> str:
    parts = [f"# Benchmarks on {name}\n\n`make bench`; the rows, with versions, are in the json beside this page."]
    for one in found:
        parts.append(f"## `python -m scripts.{one['command']}`\n\nCommit {one['commit']}.\n\n{one['printed']}")
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> None:
    chosen = [command for command in COMMANDS if not argv or any(word in command for word in argv)]
    if not chosen:
        raise UserError(f"{' '.join(argv)}: no such benchmark; expected a word of {', '.join(COMMANDS)}")
    name = hardware()
    path = RESULTS / f"bench-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    found = {one["command"]: one for one in json.loads(path.read_text())} if path.exists() else {}
    for command in chosen:
        print(f"python -m scripts.{command}", flush=True)
        found[command] = run(command)
        print(f"{found[command]['printed']}\n", flush=True)
        rows = [found[c] for c in (*COMMANDS, *(c for c in found if c not in COMMANDS)) if c in found]
        path.write_text(json.dumps(rows, indent=1) + "\n")
        path.with_suffix(".md").write_text(page(name, rows))
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    entry(main)
