"""Bad input, bad places and bad moments: a clear error, its exit code, a hint, nothing changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import records
from tests.cli import Ran, ended, promoter, start
from tests.vm import (
    KEY,
    MIB,
    SPARE_OFFSET,
    VM,
    Disk,
    Monitor,
    base,
    blank,
    encrypted_clone,
    linked_clone,
    qemu_img,
    wait_for,
)

SMALL = 16 * MIB
CALM: dict[str, object] = {"lanes": 1, "rate": 20}  # a delta that stays small
PROMPTLY = 10.0
HMP = "hmp.sock"


# --- what there is, and that it stays ------------------------------------------------------


def listing(directory: Path, active: frozenset[Path] = frozenset()) -> dict[str, tuple[int, ...]]:
    """Each file's inode, size and time; of an active image, which its guest writes, the inode."""
    found = {path: path.lstat() for path in directory.rglob("*")}
    return {
        str(path): (at.st_ino,) if path in active or path.is_dir() else written(at)
        for path, at in found.items()
    }


def written(at: os.stat_result) -> tuple[int, ...]:
    return at.st_ino, at.st_size, at.st_mtime_ns


def graph(vm: VM) -> tuple[object, ...]:
    """The nodes, what each device writes to, and the jobs."""
    nodes = {node["node-name"] for node in vm.qmp("query-named-block-nodes", flat=True)}
    devices = {entry["qdev"]: entry["inserted"]["node-name"] for entry in vm.qmp("query-block")}
    jobs = {(job["id"], job["type"]) for job in vm.qmp("query-jobs")}
    return nodes, devices, jobs


@contextmanager
def unchanged(vm: VM, *directories: Path) -> Iterator[None]:
    """The files, the guest's graph and its jobs are afterwards what they were before.

    A guest that wrote before goes on writing.
    """
    active = frozenset(disk.path for disk in vm.disks)
    writes = vm.qmp("query-status")["running"]

    def seen() -> tuple[object, ...]:
        files = [listing(directory, active) for directory in directories]
        return files, written(base().stat()), graph(vm)

    before = seen()
    yield
    assert seen() == before
    if writes:
        vm.wait_for_acks(10)


def assert_error(ran: Ran, code: int, *said: str) -> None:
    """The plain form: a message with each of ``said`` in it (a pattern), then a hint."""
    assert ran.code == code, ran
    assert "Traceback" not in ran.err
    if code != 2:  # usage errors have typer's own form
        assert re.fullmatch(r"error: \S.*\n  \S.*\n", ran.err), ran.err
    for pattern in said:
        assert re.search(pattern, ran.err), ran.err


# --- guests and places ---------------------------------------------------------------------


@contextmanager
def mounted(directory: Path, options: str) -> Iterator[Path]:
    """A file system in memory; of its own, so that it can be full or read-only."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@contextmanager
def short_directory() -> Iterator[Path]:
    """A socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="bad-", dir="/tmp") as name:
        yield Path(name)


def small_clone(directory: Path, name: str, **options: str) -> Path:
    """A small overlay on a small base of its own, `NAME-base.qcow2`, half full."""
    below = blank(directory / f"{name}-base.qcow2", SMALL)
    subprocess.run(["qemu-io", "-c", f"write -q -P 7 0 {SMALL // 2}", str(below)], check=True)
    return linked_clone(below, directory / f"{name}.qcow2", **options)


def halted(directory: Path, disks: Sequence[Disk], *extra: str) -> VM:
    """A guest that has not begun to run: enough where nothing needs it to write."""
    return VM(directory, disks, extra=("-S", *extra))


@dataclass(frozen=True)
class Place:
    """The guest that all refusals share, and directories to point promoter at."""

    vm: VM
    images: Path
    sockets: Path
    readonly: Path
    small: Path
    state: Path

    def promote(self, *words: object) -> Ran:
        return promoter(self.state, "promote", self.vm.monitor, *words)

    def unchanged(self) -> AbstractContextManager[None]:
        return unchanged(self.vm, self.images, self.small)

    def fill_in(self, text: str) -> list[str]:
        """The words of a command, `{images}` and the names of disks filled in."""
        known = {**vars(self), **DISKS, "monitor": self.vm.monitor, "long": "n" * 250}
        return [word.format(**known) for word in text.split()]


NAMES = (
    *("running", "second", "full", "busy", "exported"),
    *("snapshots", "encrypted", "missing", "replaced", "broken", "corrupt", "spelled"),
)
DISKS = {name: f"vd{number}" for number, name in enumerate(NAMES)}


def shared_disks(images: Path) -> list[Disk]:
    """One disk for each of NAMES."""
    paths = {name: images / f"{name}.qcow2" for name in NAMES}
    linked_clone(base(), paths["running"])
    blank(paths["full"], SMALL)
    encrypted_base = blank(images / "encrypted-base.qcow2", SMALL)
    encrypted_clone(encrypted_base, paths["encrypted"])
    for name in set(NAMES) - {"running", "full", "encrypted"}:
        small_clone(images, name)
    qemu_img("snapshot", "-c", "before-upgrade", paths["snapshots"])
    options = {
        "encrypted": "encrypt.format=luks,encrypt.key-secret=key",
        "spelled": "backing=spelled-base",
    }
    devices = {"exported": "share-rw=on"}
    return [
        Disk(path, options=options.get(name, ""), device=devices.get(name, ""))
        for name, path in paths.items()
    ]


def spoil(images: Path) -> None:
    """What happens to bases behind a running guest's back."""
    (images / "missing-base.qcow2").unlink()
    copy = shutil.copy(images / "replaced-base.qcow2", images / "copy")
    Path(copy).rename(images / "replaced-base.qcow2")
    with (images / "broken-base.qcow2").open("r+b") as file:
        file.write(bytes(512))
    with (images / "corrupt-base.qcow2").open("r+b") as file:
        file.seek(72)  # the incompatible features
        file.write((1 << 1).to_bytes(8, "big"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("guest")
    images = directory / "images"
    images.mkdir()
    (images / "taken").write_bytes(b"somebody's")
    (images / "dangling").symlink_to("nowhere")
    with ExitStack() as stack:
        sockets = stack.enter_context(short_directory())
        readonly = stack.enter_context(mounted(directory / "readonly", "ro,size=64m"))
        small = stack.enter_context(mounted(directory / "small", "size=14m"))
        below = f"node-name=spelled-base,driver=qcow2,file.driver=file,file.filename={images}"
        extra = (
            *("-object", KEY, "-monitor", f"unix:{sockets / HMP},server=on,wait=off"),
            *("-blockdev", f"{below}/spelled-base.qcow2"),
        )
        vm = stack.enter_context(VM(directory, shared_disks(images), extra=extra))
        spoil(images)
        vm.wait_for_acks(1)
        yield Place(vm, images, sockets, readonly, small, directory / "state")


# --- a guest that cannot be reached --------------------------------------------------------


@contextmanager
def listener(path: Path, *conversations: Callable[[socket.socket], None]) -> Iterator[Path]:
    """Somebody who listens on `path` and has one conversation with each who comes."""

    def serve() -> None:
        for converse in conversations:
            with suppress(OSError), server.accept()[0] as client:
                converse(client)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=serve, name=f"listener on {path}")
        thread.start()
        try:
            yield path
        finally:
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            thread.join()


def say(text: bytes) -> Callable[[socket.socket], None]:
    """Says it, then is silent until the other one leaves."""

    def converse(client: socket.socket) -> None:
        client.sendall(text)
        client.recv(1)

    return converse


def nothing(place: Place, directory: Path) -> Iterator[Path]:
    yield directory / "nothing"


def regular_file(place: Place, directory: Path) -> Iterator[Path]:
    (directory / "file").write_text("not a socket")
    yield directory / "file"


def below_a_file(place: Place, directory: Path) -> Iterator[Path]:
    (directory / "file").write_text("not a directory")
    yield directory / "file" / "monitor"


def loop_of_links(place: Place, directory: Path) -> Iterator[Path]:
    (directory / "loop").symlink_to("loop")
    yield directory / "loop"


def too_long_a_name(place: Place, directory: Path) -> Iterator[Path]:
    yield directory / ("n" * 300)


def closed_socket(place: Place, directory: Path) -> Iterator[Path]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / "closed"))
    yield directory / "closed"


def left_by_a_killed_qemu(place: Place, directory: Path) -> Iterator[Path]:
    with halted(directory, [Disk(blank(directory / "disk.qcow2", MIB))]) as vm:
        vm.kill()
        yield vm.monitor


def monitor_in_use(place: Place, directory: Path) -> Iterator[Path]:
    other = Monitor(place.vm.monitor)
    try:
        yield place.vm.monitor
    finally:
        other.close()


def human_monitor(place: Place, directory: Path) -> Iterator[Path]:
    yield place.sockets / HMP


def below_a_long_path(place: Place, directory: Path) -> Iterator[Path]:
    """QEMU can have made it, by a path relative to its own directory."""
    deep = directory / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    (directory / "short").symlink_to(deep)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / "short" / "monitor"))
    yield deep / "monitor"


def speaker(text: bytes) -> Callable[[Place, Path], Iterator[Path]]:
    def speaks(place: Place, directory: Path) -> Iterator[Path]:
        with listener(directory / "speaker", say(text)) as path:
            yield path

    return speaks


UNREACHABLE = {
    "nothing there": (nothing, "no such socket"),
    "a regular file": (regular_file, "not a socket"),
    "below a regular file": (below_a_file, "no such socket|[Nn]ot a directory"),
    "a loop of links": (loop_of_links, "links"),
    "a name no file can have": (too_long_a_name, "no such socket|too long"),
    "a closed socket": (closed_socket, "nobody listens"),
    "left by a killed QEMU": (left_by_a_killed_qemu, "nobody listens"),
    "a monitor in use": (monitor_in_use, "another client.*\n.*second +monitor.*-qmp"),
    "a silent listener": (speaker(b""), "does not greet.*\n.*second +monitor.*-qmp"),
    "a human monitor": (human_monitor, "not.* QMP"),
    "garbage": (speaker(b"\xff\x00 garbage\n"), "not.* QMP"),
    "garbage without end": (speaker(b"\xff\x00 garbage"), "not.* QMP"),
    "JSON, but no greeting": (speaker(b'{"hello": 1}\n'), "not.* QMP"),
    "a path too long for a socket": (below_a_long_path, "cannot connect|nobody listens"),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", UNREACHABLE)
def test_a_guest_that_cannot_be_reached_is_said_so_promptly(place: Place, case: str) -> None:
    make, said = UNREACHABLE[case]
    with short_directory() as directory, place.unchanged():
        with contextmanager(make)(place, directory) as path:
            began = time.monotonic()
            ran = promoter(place.state, "promote", path)
            assert time.monotonic() - began < PROMPTLY
        assert_error(ran, 3, said, re.escape(str(path)))


def test_a_guest_that_is_shutting_down_is_not_promoted(tmp_path: Path) -> None:
    disk = Disk(linked_clone(base(), tmp_path / "clone.qcow2"))
    with VM(tmp_path, [disk], extra=["-no-shutdown"]) as vm:
        vm.wait_for_acks(1)
        vm.qmp("system_powerdown")
        wait_for(lambda: vm.qmp("query-status")["status"] == "shutdown", "the guest's end", 30)
        with unchanged(vm, tmp_path):
            ran = promoter(tmp_path.parent / f"{tmp_path.name}-state", "promote", vm.monitor)
        assert_error(ran, 3, "shutting down")


def qemu_of(version: str, before: bytes = b"") -> Callable[[socket.socket], None]:
    """A QEMU that only has a version: no disk, no job. Says something ``before`` each answer."""
    major, minor, micro = map(int, version.split("."))
    number = {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": ""}
    greeting = {"QMP": {"version": number, "capabilities": []}}
    replies: dict[str, Any] = {
        "query-version": number,
        "query-status": {"status": "running", "running": True},
        "x-debug-query-block-graph": {"nodes": [], "edges": []},
        "qmp_capabilities": {},
    }

    def converse(client: socket.socket) -> None:
        client.sendall(b"%s\r\n" % json.dumps(greeting).encode())
        while data := client.recv(65536):  # a command at a time: qemu.qmp waits for its reply
            asked = json.loads(data)
            reply = {"return": replies.get(asked["execute"], [])}
            reply |= {key: asked[key] for key in asked if key == "id"}
            client.sendall(b"%s%s\r\n" % (before, json.dumps(reply).encode()))

    return converse


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("6.2.0", "7.2 or newer"),
        ("7.1.9", "7.2 or newer"),
    ],
)
def test_a_qemu_that_cannot_do_it_is_refused(tmp_path: Path, version: str, said: str) -> None:
    with (
        short_directory() as directory,
        listener(directory / "monitor", qemu_of(version)) as path,
    ):
        ran = promoter(tmp_path / "state", "promote", path)
    assert_error(ran, 4, re.escape(version), said)


def test_an_event_before_the_first_answer_is_no_reason_to_give_up(tmp_path: Path) -> None:
    event = b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 0}}\r\n'
    with (
        short_directory() as directory,
        listener(directory / "monitor", qemu_of("7.1.9", event), qemu_of("7.1.9")) as path,
    ):
        ran = promoter(tmp_path / "state", "promote", path)
    assert_error(ran, 4, re.escape("7.1.9"))


# --- refusals ------------------------------------------------------------------------------

REFUSED = {
    "no such disk": ("vda", 4, ["no such disk: vda", "vd0.*vd1.*vd9"]),
    "one of two is no disk": ("vd0 vda", 4, ["no such disk: vda", "vd0.*vd1.*vd9"]),
    "the target exists": ("vd0 --target {images}/taken", 4, ["images/taken", "exists"]),
    "the target is a dead link": ("vd0 --target {images}/dangling", 4, ["dangling", "exists"]),
    "the target is a directory": ("vd0 --target {images}", 4, ["images", "exists"]),
    "the target is the source": ("vd0 --target {images}/running.qcow2", 4, ["disk itself"]),
    "the target directory is the source's": ("vd0 --target-dir {images}", 4, ["disk itself"]),
    "the target is read-only": ("vd0 --target {readonly}/new", 4, ["readonly", "read-only file"]),
    "the target directory is read-only": ("vd0 --target-dir {readonly}", 4, ["read-only file"]),
    "the target is nowhere": ("vd0 --target {images}/no/new", 4, ["no such directory.*/no\n"]),
    "the target directory is not there": ("vd0 --target-dir {images}/no", 4, ["no such dir"]),
    "the target directory is a file": ("vd0 --target-dir {images}/taken", 4, ["taken"]),
    "too little space": (
        "vd0 --target-dir {small}", 4, ["small", r"[\d,]{10,} bytes needed, 14,680,064 free"]
    ),
    "too little space for both": (
        "vd1 vd3 --target-dir {small}", 4, [r"1\d,\d{3},\d{3} bytes needed, 14,680,064 free"]
    ),
    "the target's name leaves no room": ("vd1 --target {images}/{long}", 4, ["name", "too long"]),
    "one target for two disks": ("vd0 vd1 --target {images}/new", 4, ["--target", "--target-dir"]),
    "target and target directory": (
        "vd0 --target {images}/new --target-dir {small}", 2, ["--target", "--target-dir"]
    ),
    "a speed that is a word": ("vd0 --speed abc", 2, ["--speed", "abc", "50M"]),
    "a negative speed": ("vd0 --speed -5", 2, ["--speed", "-5", "50M"]),
    "an unknown unit": ("vd0 --speed 10X", 2, ["--speed", "10X", "50M"]),
    "a speed beyond QEMU's": ("vd1 --speed 99999999999T", 2, ["--speed"]),
    "a cluster size that is none": ("vd0 --cluster-size 3k", 2, ["--cluster-size", "3k"]),
    "subclusters of nothing": ("vd0 --cluster-size 4k --extended-l2", 2, ["16k"]),
    "clusters in a raw image": ("vd0 --format raw --cluster-size 64k", 2, ["raw"]),
    "a raw image in place": ("vd0 --format raw", 4, ["raw", "--target"]),
    "no disk at once": ("vd0 --parallel 0", 2, ["--parallel"]),
    "internal snapshots": ("{snapshots}", 4, ["before-upgrade", "snapshot -d"]),
    "an encrypted layer": ("{encrypted}", 4, ["encrypted", "--lose encryption"]),
    "a clear disk in an encrypted one's place": (
        "{encrypted} --lose encryption", 4, ["with a key", "--target"]
    ),
    "the command line names the base": ("{spelled}", 4, ["spells out", "--target"]),
    "the base is missing": ("{missing}", 4, ["missing-base.qcow2"]),
    "the base was replaced": ("{replaced}", 4, ["replaced-base.qcow2", "not the file"]),
    "the base is broken": ("{broken}", 4, ["broken-base.qcow2"]),
    "the base is marked corrupt": ("{corrupt}", 4, ["corrupt-base.qcow2 is marked corrupt"]),
    "one of two is broken": ("{second} {broken}", 4, ["broken-base.qcow2"]),
}  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_says_why_and_changes_nothing(place: Place, case: str) -> None:
    text, code, said = REFUSED[case]
    journal = listing(place.state)
    with place.unchanged():
        ran = place.promote(*place.fill_in(text))
    assert_error(ran, code, *said)
    assert ran.out == ""
    assert listing(place.state) == journal


@pytest.mark.parametrize(
    ("text", "kind", "code", "said"),
    [
        ("{monitor} vda", "Refused", 4, "no such disk: vda"),
        ("{monitor} {missing}", "Refused", 4, "missing-base.qcow2"),
        ("{images}/no.sock", "Unreachable", 3, "no such socket"),
    ],
)
def test_with_json_an_error_is_one_line(
    place: Place, text: str, kind: str, code: int, said: str
) -> None:
    with place.unchanged():
        ran = promoter(place.state, "promote", *place.fill_in(text), "--json")
    assert (ran.code, ran.err) == (code, "")
    (line,) = ran.lines
    assert line.keys() == {"event", "error", "message", "hint", "exit_code"}
    assert (line["event"], line["error"], line["exit_code"]) == ("error", kind, code)
    assert said in line["message"]
    assert line["hint"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("job", ["block-stream", "blockdev-backup", "blockdev-mirror"])
def test_a_disk_with_a_job_is_refused_and_the_job_goes_on(place: Place, job: str) -> None:
    vm, node = place.vm, f"disk{NAMES.index('busy')}"
    arguments = {"device": node, "job_id": "nightly", "speed": 1}
    if job != "block-stream":
        vm.qmp("blockdev-add", driver="null-co", node_name="nowhere", size=SMALL)
        arguments |= {"target": "nowhere", "sync": "full"}
    vm.qmp(job, **arguments)
    try:
        with place.unchanged():
            ran = place.promote(DISKS["busy"])
        assert_error(ran, 4, DISKS["busy"], "nightly")
    finally:
        vm.qmp("block-job-cancel", device="nightly", force=True)
        wait_for(lambda: not vm.qmp("query-jobs"), "the job's end", 30)
        if job != "block-stream":
            vm.qmp("blockdev-del", node_name="nowhere")


@contextmanager
def exported(vm: VM, node: str, socket_path: Path, *, writable: bool) -> Iterator[None]:
    """An NBD export of a node, as somebody else than promoter made it."""
    address = {"type": "unix", "data": {"path": str(socket_path)}}
    vm.qmp("nbd-server-start", addr=address)
    vm.qmp("block-export-add", type="nbd", id="look", node_name=node, writable=writable)
    try:
        yield
    finally:
        vm.qmp("nbd-server-stop")


def test_a_disk_that_is_written_over_nbd_too_is_refused(place: Place) -> None:
    node = f"disk{NAMES.index('exported')}"
    with exported(place.vm, node, place.sockets / "nbd", writable=True), place.unchanged():
        assert_error(place.promote(DISKS["exported"]), 4, "NBD", "block-export-del")


def test_a_disk_that_is_read_over_nbd_is_promoted(tmp_path: Path) -> None:
    disk = Disk(small_clone(tmp_path, "clone"))
    with (
        short_directory() as directory,
        halted(tmp_path, [disk]) as vm,
        exported(vm, "disk0", directory / "nbd", writable=False),
    ):
        ran = promoter(tmp_path / "state", "promote", vm.monitor)
        assert ran.code == 0, ran
    assert "backing file" not in qemu_img("info", disk.path)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("disks", [[], ["vd0"], ["vd0", "vd1"]])
def test_full_clones_leave_nothing_to_do(tmp_path: Path, disks: list[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    full = [Disk(blank(images / f"{number}.qcow2", SMALL)) for number in range(2)]
    with halted(tmp_path, full) as vm, unchanged(vm, images):
        ran = promoter(tmp_path / "state", "promote", vm.monitor, *disks)
        assert (ran.code, ran.err) == (0, "")
        assert re.search("^vd0: nothing to do", ran.out)
        as_json = promoter(tmp_path / "state", "promote", vm.monitor, *disks, "--json")
    assert as_json.code == 0
    assert (as_json.result["event"], as_json.result["status"]) == ("result", "done")
    assert as_json.lines[0]["nothing_to_do"] == (disks or ["vd0", "vd1"])


@pytest.mark.parametrize(
    "state", ["images/taken", "images/taken/state", "readonly", "readonly/state"]
)
def test_without_a_journal_nothing_is_begun(place: Place, state: str) -> None:
    directory = place.images.parent / state
    with place.unchanged():
        ran = promoter(directory, "promote", place.vm.monitor, DISKS["second"])
    assert ran.out.startswith("vd1")  # the plan; then
    assert_error(ran, 1, "cannot keep the journal", str(directory), "--state-dir")


# --- bad moments ---------------------------------------------------------------------------


@contextmanager
def promoting(
    state: Path, vm: VM, *words: object, hang: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """A promotion under way, which does not outlive the block; it stops itself at `hang`."""
    struck, module = ((hang, "hang", vm.pid), "tests.struck") if hang else ((), "promoter")
    with start(state, *struck, "promote", vm.monitor, *words, module=module) as process:
        try:
            yield process
        finally:
            process.kill()


def part_in(directory: Path) -> Path | None:
    """The seed that grows in `directory`, once it has data."""
    parts = [path for path in directory.glob("*.part-*") if path.stat().st_blocks]
    return parts[0] if parts else None


def wait_for_phase(seed: str, vm: VM, directory: Path, process: subprocess.Popen[str]) -> None:
    """Waits until the base is copied: by the seed, or (`--seed none`) by the mirror."""

    def begun() -> bool:
        assert process.poll() is None, process.communicate()
        if seed != "none":
            return part_in(directory) is not None
        return any(job["current-progress"] for job in vm.qmp("query-jobs"))

    wait_for(begun, "the promotion's beginning", 30)


def only_job(state: Path) -> dict[str, Any]:
    (job,) = promoter(state, "job", "list", "--json").lines
    return job


def fill(directory: Path, room: Callable[[], int]) -> Path:
    """Somebody else's file takes all of a file system but `room()` bytes."""
    filler = directory / "somebody-elses"
    with filler.open("wb", buffering=0) as file, suppress(OSError):  # it is full
        while (more := os.statvfs(directory).f_bavail * os.sysconf("SC_PAGE_SIZE") - room()) > 0:
            file.write(bytes(min(more, MIB)))
    return filler


def prove(vm: VM, disk: Path) -> None:
    """The disk is a full clone now, and every record is there."""
    vm.wait_for_acks(10)
    vm.kill()
    records.check(disk, "qcow2", vm.log).raise_if_bad()
    assert "backing file" not in qemu_img("info", disk)


def is_stopped(process: subprocess.Popen[str]) -> bool:
    assert process.poll() is None, process.communicate()
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def fill_in_the_seed(vm: VM, small: Path, process: subprocess.Popen[str]) -> Path:
    wait_for_phase("convert", vm, small, process)
    return fill(small, lambda: MIB)


def fill_in_the_mirror(vm: VM, small: Path, process: subprocess.Popen[str]) -> Path:
    """The seed finds room, the delta does not."""
    wait_for_phase("convert", vm, small, process)
    part = part_in(small)
    assert part
    return fill(small, lambda: base().stat().st_size - part.stat().st_blocks * 512 + 4 * MIB)


def fill_at_the_switchover(vm: VM, small: Path, process: subprocess.Popen[str]) -> Path:
    """The mirror was ready, and fails by a guest's write before it is told to complete."""
    wait_for(lambda: is_stopped(process), "the mirror", 30)
    filler = fill(small, lambda: 0)
    wait_for(lambda: vm.qmp("query-jobs")[0]["status"] == "concluded", "the mirror's end", 30)
    process.send_signal(signal.SIGCONT)
    return filler


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("take_space", "hang"),
    [
        (fill_in_the_seed, ""),
        (fill_in_the_mirror, ""),
        (fill_at_the_switchover, "before SWITCH_OVER"),
    ],
)
def test_without_space_it_stops_and_resumes_when_there_is_room(
    tmp_path: Path, take_space: Callable[[VM, Path, subprocess.Popen[str]], Path], hang: str
) -> None:
    images, state = tmp_path / "images", tmp_path / "state"
    images.mkdir()
    clone = linked_clone(base(), images / "clone.qcow2")
    delta = f"write -q -P 9 {SPARE_OFFSET} 12M"
    subprocess.run(["qemu-io", "-c", delta, str(clone)], check=True)
    with (
        mounted(tmp_path / "small", "size=128m") as small,
        VM(tmp_path, [Disk(clone)], writer=CALM) as vm,
    ):
        vm.wait_for_acks(1)
        words = ("--target-dir", small, "--speed", "20M", "--on-full", "fail", "--json")
        with unchanged(vm, images):
            with promoting(state, vm, *words, hang=hang) as process:
                filler = take_space(vm, small, process)
                ran = ended(process)
            assert (ran.code, ran.result["error"], ran.result["exit_code"]) == (5, "NoSpace", 5)
            assert "No space left" in ran.result["message"]
            assert list(small.iterdir()) == [filler]
        job = only_job(state)
        assert job["status"] == "interrupted"
        assert f"promoter job resume {job['id']}" in ran.result["hint"]
        filler.unlink()
        resumed = promoter(state, "job", "resume", job["id"])
        assert resumed.code == 0, resumed
        assert only_job(state)["status"] == "done"
        prove(vm, small / clone.name)


def test_a_full_journal_stops_it_and_it_resumes_when_there_is_room(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    clone = linked_clone(base(), images / "clone.qcow2")
    with mounted(tmp_path / "state", "size=1m") as state, halted(tmp_path, [Disk(clone)]) as vm:
        with unchanged(vm), promoting(state, vm, "--speed", "20M") as process:
            wait_for_phase("convert", vm, images, process)
            filler = fill(state, lambda: 0)
            ran = ended(process)
        job = only_job(state)
        assert job["status"] == "interrupted"
        filler.unlink()
        resumed = promoter(state, "job", "resume", job["id"])
        assert resumed.code == 0, resumed
    assert "backing file" not in qemu_img("info", clone)
    assert not list(images.glob("*.part-*"))
    assert ran.code in (5, 9)
    assert_error(ran, ran.code, "journal", f"promoter job resume {job['id']}")


def test_a_guest_that_goes_away_ends_the_seed_and_leaves_nothing_behind(tmp_path: Path) -> None:
    images, state = tmp_path / "images", tmp_path / "state"
    images.mkdir()
    disk = Disk(linked_clone(base(), images / "clone.qcow2"))
    before = listing(images)
    with halted(tmp_path, [disk]) as vm, promoting(state, vm, "--speed", "1M") as process:
        wait_for_phase("convert", vm, images, process)
        vm.kill()
        ran = ended(process, PROMPTLY)
    assert_error(ran, 3, "went away", "untouched")
    assert listing(images) == before
    assert only_job(state)["status"] == "failed"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", ["convert", "copy", "none"])
def test_ctrl_c_puts_everything_back(place: Place, tmp_path: Path, seed: str) -> None:
    with place.unchanged():
        words = ("vd0", "--seed", seed, "--speed", "1M")
        with promoting(tmp_path, place.vm, *words) as process:
            wait_for_phase(seed, place.vm, place.images, process)
            process.send_signal(signal.SIGINT)
            ran = ended(process, PROMPTLY)
        assert_error(ran, 7, "cancelled", "unchanged on its old chain")
    assert only_job(tmp_path)["status"] == "cancelled"


@pytest.mark.nightly
@pytest.mark.parametrize("seed", ["convert", "none"])
def test_sigterm_leaves_it_for_resume(tmp_path: Path, seed: str) -> None:
    images, state = tmp_path / "images", tmp_path / "state"
    images.mkdir()
    clone = linked_clone(base(), images / "clone.qcow2")
    with VM(tmp_path, [Disk(clone)], writer=CALM) as vm:
        vm.wait_for_acks(1)
        with promoting(state, vm, "--seed", seed, "--speed", "20M") as process:
            wait_for_phase(seed, vm, images, process)
            process.send_signal(signal.SIGTERM)
            ran = ended(process, PROMPTLY)
        job = only_job(state)
        assert_error(ran, 9, f"promoter job resume {job['id']}")
        assert job["status"] == "interrupted"
        assert bool(vm.qmp("query-jobs")) is (seed == "none")
        vm.wait_for_acks(10)
        resumed = promoter(state, "job", "resume", job["id"])
        assert resumed.code == 0, resumed
        assert only_job(state)["status"] == "done"
        prove(vm, clone)


def test_a_socket_of_this_directory_that_is_taken_for_a_domain_is_named(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "web.qmp"))
        nowhere = f"qemu+unix:///system?socket={tmp_path / 'nothing'}"
        process = start(
            tmp_path, "chain", "web.qmp", "-c", nowhere, enter=["env", "--chdir", tmp_path]
        )
        ran = ended(process)
    assert ran.code == 3
    assert ran.err.endswith("For the socket of this directory: ./web.qmp\n")


def test_without_libvirts_module_a_domain_cannot_be_reached_and_the_rest_works(
    tmp_path: Path,
) -> None:
    (tmp_path / "libvirt.py").write_text('raise ModuleNotFoundError("No module named libvirt")')
    without = {"PYTHONPATH": str(tmp_path)}
    ran = ended(start(tmp_path, "chain", "web01", environment=without))
    assert ran.code == 3
    assert "cannot be reached from this Python: No module named libvirt\n" in ran.err
    assert "Traceback" not in ran.err
    version = ended(start(tmp_path, "--version", environment=without))
    assert (version.code, version.err) == (0, "")
    assert version.out.endswith("\nlibvirt not found\n")
    doctor = ended(start(tmp_path, "doctor", environment=without))
    assert doctor.code == 0, doctor
    assert "note: libvirt: libvirt's domains cannot be reached" in doctor.out
