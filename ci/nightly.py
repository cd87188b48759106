"""The nightly's parts, each of 80 minutes at most, and one page of what they found.

A part is chosen by files of tests, so a test that is marked nightly is in the part of its file,
or in one of the two that share it, and a file that no part names is in `others`: none can be
forgotten. A part that fails or takes
too long does not keep the next from running; the exit code is 0 only when all passed.

Each part leaves a JUnit file in `.nightly`, and `.nightly/index.html` shows all that lie there,
also those of parts that ran before: see report.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ci import report
from ci.report import RESULTS, ROOT

LONGEST = 80 * 60.0
GRACE = 60.0  # for pytest to end its guests and write what it has
FILES = {
    "kills": ["test_kills.py", "test_consolidate_kills.py"],
    "matrix-qemu": ["test_matrix.py"],
    "matrix-libvirt": ["test_matrix.py"],
    "coverage": ["test_coverage.py"],
    "fuzz": ["test_fuzz.py", "test_bad_input.py"],
    "lease": ["test_lease_[!f]*.py", "test_lease_fi*.py"],
    "lease-faults": ["test_lease_faults.py"],
    "hosts": ["test_hosts.py"],
}
ONLY = {"matrix-qemu": "not libvirt", "matrix-libvirt": "libvirt"}  # of their file's tests
WHOLE = {"coverage"}  # its table is written only when every cell was tried in one run
ONE_BY_ONE = {"hosts"}  # its tests share their machines
TABLES = {
    "bench-virsh": ["domains", "consolidate", "convergence"],
    "bench-promote": ["load", "guest", "seeds", "growth", "chains", "pauses"],
    "bench-others": ["handover", "unplug", "commands"],
}
COMMANDS = {
    "test": ["ci/test"],
    **{part: ["ci/bench", "--whole", *tables] for part, tables in TABLES.items()},
}
OTHERS = "others"
PARTS = ("test", *FILES, OTHERS, *TABLES)


def files(part: str) -> list[Path]:
    """The files whose nightly tests this part runs."""
    tests = ROOT / "tests"
    if part == OTHERS:
        named = {file for other in FILES for file in files(other)}
        return sorted(set(tests.glob("test_*.py")) - named)
    return sorted(file for pattern in FILES.get(part, []) for file in tests.glob(pattern))


def command(part: str) -> list[str]:
    if part in COMMANDS:
        return COMMANDS[part]
    marked = "nightly or not nightly" if part in WHOLE else "nightly"
    chosen = [str(file.relative_to(ROOT)) for file in files(part)]
    only = ["-k", ONLY[part]] if part in ONLY else []
    workers = "1" if part in ONE_BY_ONE else "2"
    return ["pytest", "-n", workers, "--dist", "worksteal", "-m", marked, *only, *chosen]


def ended(process: subprocess.Popen[bytes]) -> int | None:
    """Its exit code, or None when it had to be stopped."""
    try:
        return process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None


def run(part: str) -> bool:
    """Whether it passed. What it printed and found is in `.nightly` afterwards."""
    junit, log = RESULTS / f"{part}.xml", RESULTS / f"{part}.log"
    junit.unlink(missing_ok=True)
    words, began = command(part), time.monotonic()
    print(f"== {part}: {' '.join(words)}", flush=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, "PYTEST_ADDOPTS": f"--junitxml={junit}"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = ended(process)
    took = time.monotonic() - began
    outcome = "stopped, it took too long" if code is None else f"exit code {code}"
    if code != 0 or not junit.exists():
        report.add(junit, part, took, log, None if code == 0 else outcome)
    print(f"{part}: {outcome}, {took / 60:.1f} min, {log}", flush=True)
    return code == 0


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ci/nightly")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--list", action="store_true", help="name the parts")
    arguments = parser.parse_args(words)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if arguments.list:
        print("\n".join(PARTS))
        return 0
    RESULTS.mkdir(exist_ok=True)
    passed = []
    for part in arguments.parts or PARTS:
        passed.append(run(part))
        report.write(RESULTS)
    print(RESULTS / "index.html")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
