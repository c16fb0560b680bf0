"""One torch thread for the tests and the processes they start, and the table of `make test-faults`."""

import gc
import os
import textwrap

os.environ["OMP_NUM_THREADS"] = "1"  # two cores run several processes at once

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    gc.freeze()  # accelerate collects after each run: that need not look through every import again


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """A test that is marked with a fault carries its row in its report, also out of another process."""
    report = (yield).get_result()
    mark = item.get_closest_marker("fault")
    if mark is not None:
        report.user_properties = [("fault", list(mark.args))]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One row a fault, where faults were asked for."""
    if "fault" not in config.getoption("markexpr"):
        return
    terminalreporter.section("faults")
    rows: dict[tuple[str, str], list[str]] = {}  # what was done, what has to hold: outcomes
    for reports in terminalreporter.stats.values():
        for report in reports:
            for _, row in getattr(report, "user_properties", []):
                if report.when == "call" or report.outcome != "passed":
                    rows.setdefault(tuple(row), []).append(report.outcome)
    for (done, holds), outcomes in rows.items():
        counts = {name: outcomes.count(name) for name in ("passed", "failed", "skipped")}
        verdict = "NOT HELD" if counts["failed"] else "held" if counts["passed"] else "not run"
        told = f"{verdict} {counts['passed']}/{counts['passed'] + counts['failed']}"
        cells = [textwrap.wrap(done, 52), textwrap.wrap(holds, 52), [told]]
        for line in range(max(map(len, cells))):
            left, middle, right = (cell[line] if line < len(cell) else "" for cell in cells)
            terminalreporter.line(f"{left:<54}{middle:<54}{right}".rstrip(), red=bool(counts["failed"]))
