"""Whoever else reads an image is found: by real overlays, and real processes that have it open."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from promoter.chain import BackingChain, DiskOptions, Image
from promoter.chain import Disk as GuestDisk
from promoter.storage.siblings import Reader, Registered, Siblings, find_siblings
from tests.cli import promoter
from tests.domains import Domain, Libvirtd
from tests.vm import MIB, VM, Disk, blank, linked_clone, qemu_img

MANY = 300
LONGEST_HEADER = 4096


def image(path: Path, data_file: Path | None = None) -> Image:
    return Image(str(path), "qcow2", path, "file", "file", MIB, 0, data_file=data_file)


def disk(*paths: Path, name: str = "vd0") -> GuestDisk:
    """A disk with this chain, the active layer first."""
    chain = BackingChain(tuple(map(image, paths)))
    return GuestDisk(name, name, frozenset(), str(paths[0]), chain, DiskOptions())


def find(*paths: Path, scan: tuple[Path, ...] = ()) -> Siblings:
    return find_siblings([disk(*paths)], os.getpid(), scan)


def readers(*paths: Path, scan: tuple[Path, ...] = ()) -> list[Path | None]:
    """Who reads the lowest image of this chain."""
    lowest = find(*paths, scan=scan).readers["vd0", str(paths[-1])]
    return [reader.path for reader in lowest]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "vm").mkdir()
    return blank(tmp_path / "vm" / "base.qcow2", MIB)


@pytest.fixture
def clone(base: Path) -> Path:
    return linked_clone(base, base.with_name("clone.qcow2"))


def test_nobody_reads_a_chain_that_is_alone(base: Path, clone: Path) -> None:
    found = find(clone, base)
    assert set(found.readers.values()) == {()}


def test_readers_that_a_list_names_are_readers_wherever_they_are(base: Path, clone: Path) -> None:
    """Those of a layer read through all that lies below it; the disk itself is none."""
    top = linked_clone(clone, base.with_name("top.qcow2"))
    away = base.parent.parent / "away.qcow2"
    away.touch()
    missing = Path("/elsewhere/web.qcow2")
    listed = Registered({base: [top, away], clone: [missing]})
    found = find_siblings([disk(top, clone, base)], os.getpid(), registered=listed)
    both = (Reader(away, listed=True), Reader(missing, listed=True))
    assert found.readers["vd0", str(base)] == both
    assert found.readers["vd0", str(clone)] == both[1:]
    assert found.readers["vd0", str(top)] == ()
    assert [str(reader) for reader in both] == [f"{r.path} (listed in a lease)" for r in both]


def nested(base: Path) -> str:
    file = {"driver": "file", "filename": str(base)}
    return "json:" + json.dumps({"driver": "qcow2", "file": file})


def dotted(base: Path) -> str:
    return "json:" + json.dumps({"driver": "qcow2", "file.filename": str(base)})


def by_symbolic_link(base: Path) -> str:
    base.with_name("link").symlink_to("base.qcow2")
    return "link"


def by_hard_link(base: Path) -> str:
    other = base.with_name("other")
    other.mkdir()
    os.link(base, other / "same")
    return str(other / "same")


SPELLINGS: dict[str, Callable[[Path], str]] = {
    "absolute": str,
    "relative": lambda base: base.name,
    "roundabout": lambda base: f"../{base.parent.name}/{base.name}",
    "file": lambda base: f"file:{base}",
    "nested json": nested,
    "dotted json": dotted,
    "symbolic link": by_symbolic_link,
    "hard link": by_hard_link,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_powered_off_sibling_is_found_however_it_spells_its_base(
    base: Path, clone: Path, spelling: str
) -> None:
    name = SPELLINGS[spelling](base)
    sibling = base.with_name("sibling.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2", sibling)
    found = find(clone, base)
    assert readers(clone, base) == [sibling]
    assert found.readers["vd0", str(clone)] == ()


def test_a_name_in_another_directory_counts_from_there_or_from_where_a_link_leads(
    base: Path, clone: Path
) -> None:
    away = base.parent.parent / "away"
    away.mkdir()
    sibling = linked_clone(base, away / "sibling.qcow2")
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", sibling)
    assert readers(clone, base, scan=(away,)) == []  # there it means another base
    link = base.with_name("link.qcow2")
    link.symlink_to(sibling)
    assert readers(clone, base) == [link]


def test_what_reads_through_an_overlay_is_a_reader_too(base: Path, clone: Path) -> None:
    away = base.parent.parent / "away"
    away.mkdir()
    between = linked_clone(base, away / "between.qcow2")
    sibling = linked_clone(between, base.with_name("sibling.qcow2"))
    assert readers(clone, base) == [between, sibling]  # it is read where the sibling names it
    upper = linked_clone(clone, base.with_name("upper.qcow2"))
    found = find(clone, base)
    assert [reader.path for reader in found.readers["vd0", str(clone)]] == [upper]
    assert readers(clone, base) == [between, sibling, upper]


def test_elsewhere_a_sibling_is_found_only_where_one_looks(base: Path, clone: Path) -> None:
    away = base.parent.parent / "away" / "deep"
    away.mkdir(parents=True)
    sibling = linked_clone(base, away / "sibling.qcow2")
    below = base.with_name("below")
    below.mkdir()
    other = linked_clone(base, below / "other.qcow2")
    assert readers(clone, base) == []
    assert readers(clone, base, scan=(away.parent,)) == [sibling]
    assert readers(clone, base, scan=(base.parent.parent,)) == [sibling, other]


def test_the_guest_is_not_its_own_reader_under_any_name(base: Path, clone: Path) -> None:
    top = linked_clone(clone, base.with_name("top.qcow2"))
    os.link(clone, base.with_name("same.qcow2"))
    base.with_name("link.qcow2").symlink_to(top)
    with VM(base.parent, [Disk(top)], extra=("-S",)) as vm:
        found = find_siblings([disk(top, clone, base)], vm.pid)
    assert set(found.readers.values()) == {()}


def test_a_base_of_two_disks_is_read_by_the_other_one(base: Path, clone: Path) -> None:
    second = linked_clone(base, base.with_name("second.qcow2"))
    above = linked_clone(second, base.with_name("above.qcow2"))
    disks = [disk(clone, base), disk(above, second, base, name="vd1")]
    found = find_siblings(disks, os.getpid())
    assert found.readers["vd0", str(base)] == (Reader(above, disk="vd1"),)
    assert found.readers["vd1", str(base)] == (Reader(clone, disk="vd0"),)
    assert found.readers["vd1", str(second)] == ()


def test_an_old_overlay_that_promoter_kept_is_marked(base: Path, clone: Path) -> None:
    aside = linked_clone(base, base.with_name("web.qcow2.aside-0123abcd"))
    found = find(clone, base)
    assert found.readers["vd0", str(base)] == (Reader(aside, aside=True),)
    os.link(aside, base.with_name("web.qcow2"))
    found = find(clone, base)
    assert found.readers["vd0", str(base)] == (Reader(base.with_name("web.qcow2")),)


def test_an_image_that_shares_an_external_data_file_is_a_reader(base: Path) -> None:
    owner, data = base.with_name("owner.qcow2"), base.with_name("data.raw")
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data}", owner, MIB)
    sharing = Path(shutil.copy(owner, base.with_name("sharing.qcow2")))
    chain = BackingChain((image(owner, data),))
    own = GuestDisk("vd0", "vd0", frozenset(), str(owner), chain, DiskOptions())
    found = find_siblings([own], os.getpid())
    assert found.readers["vd0", str(owner)] == (Reader(sharing),)


def corrupt(path: Path, at: int, what: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(what)


def test_a_backing_files_name_ends_at_its_nul_as_it_does_for_qemu(base: Path, clone: Path) -> None:
    sibling = linked_clone(base, base.with_name("sibling.qcow2"))
    corrupt(sibling, 16, (300).to_bytes(4, "big"))  # the name's length
    shown = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", sibling))
    assert shown["full-backing-filename"] == str(base)
    assert readers(clone, base) == [sibling]


def test_what_makes_no_sense_is_named_and_nothing_hangs(base: Path, clone: Path) -> None:
    place = base.parent
    linked_clone(base, place / "endless-name.qcow2")
    corrupt(place / "endless-name.qcow2", 16, b"\xff\xff\xff\xff")
    linked_clone(base, place / "cut-short.qcow2")
    os.truncate(place / "cut-short.qcow2", 80)
    linked_clone(base, place / "from-the-future.qcow2")
    corrupt(place / "from-the-future.qcow2", 4, b"\0\0\0\x04")
    linked_clone(base, place / "deep.qcow2")
    deep = b"json:" + b"[" * 1000
    corrupt(place / "deep.qcow2", 8, (3000).to_bytes(8, "big") + len(deep).to_bytes(4, "big"))
    corrupt(place / "deep.qcow2", 3000, deep)
    blank(place / "bad-extensions.qcow2", MIB)
    corrupt(place / "bad-extensions.qcow2", 72, (4).to_bytes(8, "big"))
    corrupt(place / "bad-extensions.qcow2", 116, b"\xff\xff\xff\xff")
    for number in (1, 2):  # they name each other, and themselves by ever longer names
        linked_clone(base, place / f"loop{number}.qcow2")
        name = f"../{place.name}/loop{3 - number}.qcow2"
        qemu_img(
            "rebase", "-u", "-f", "qcow2", "-b", name, "-F", "qcow2", place / f"loop{number}.qcow2"
        )
    linked_clone(base, place / "\x1b[2J\n.qcow2")
    os.mkfifo(place / "fifo.qcow2")
    linked_clone(base, place / "on-fifo.qcow2")
    qemu_img(
        "rebase", "-u", "-f", "qcow2", "-b", "fifo.qcow2", "-F", "qcow2", place / "on-fifo.qcow2"
    )
    (place / "dangling").symlink_to("nowhere")
    (place / "itself").symlink_to("itself")
    (place / "directory.qcow2").mkdir()
    (place / "short").write_bytes(b"QFI\xfb")
    (place / "not-utf8-\udcff").write_bytes(bytes(100))
    with socket.socket(socket.AF_UNIX) as server, inside(place):
        server.bind("socket.qcow2")
        found = find(clone, base)
    [reader] = found.readers["vd0", str(base)]
    assert str(reader) == repr(str(place / "\x1b[2J\n.qcow2"))
    unreadable = {item.path.name for item in found.unreadable} - {"proc"}
    wanted = {"endless-name", "cut-short", "from-the-future", "deep", "bad-extensions"}
    assert unreadable == {f"{name}.qcow2" for name in wanted}


@contextmanager
def inside(directory: Path) -> Iterator[None]:
    """A socket's path has at most 107 bytes."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def test_an_image_that_is_not_there_is_not_taken_for_one_without_readers(
    base: Path, clone: Path
) -> None:
    base.unlink()
    assert str(base) in {str(item.path) for item in find(clone, base).unreadable}


def test_of_each_file_at_most_its_header_is_read(base: Path, clone: Path) -> None:
    for number in range(MANY):
        (base.parent / f"big{number}").write_bytes(bytes(16 * LONGEST_HEADER))
    before = bytes_read()
    find(clone, base)
    processes = 2 * MIB  # /proc, whatever runs on this host
    assert bytes_read() - before < MANY * LONGEST_HEADER + processes


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


LOOK = """
import sys, json, os
from pathlib import Path
from tests.test_siblings import find
found = find(*map(Path, sys.argv[1:]))
lowest = found.readers["vd0", sys.argv[-1]]
print(json.dumps([list(map(str, lowest)), list(map(str, found.unreadable))]))
"""


def look(*paths: Path, under: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The readers of the lowest image and what is unreadable, seen by another process."""
    command = [*under, sys.executable, "-c", LOOK, *map(str, paths)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    found, unreadable = json.loads(done.stdout)
    return found, unreadable


def test_what_may_not_be_looked_into_is_named(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="siblings-", dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o755)
        base = blank(place / "base.qcow2", MIB)
        clone = linked_clone(base, place / "clone.qcow2")
        (place / "closed").mkdir(mode=0o700)
        hidden = linked_clone(base, place / "closed" / "hidden.qcow2")
        linked_clone(hidden, place / "above.qcow2")
        mine = linked_clone(base, place / "mine.qcow2")
        mine.chmod(0o600)
        nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        found, unreadable = look(clone, base, under=nobody)
        assert found == []
        denied = [f"{path}: Permission denied" for path in (hidden, mine)]
        assert sorted(line for line in unreadable if "/proc" not in line) == denied
        assert any("processes have open: Permission denied" in line for line in unreadable)
        found, unreadable = look(place / "closed" / "hidden.qcow2", base, under=nobody)
        assert f"{place / 'closed'}: Permission denied" in unreadable


def test_a_process_that_cannot_be_seen_is_known_by_its_image_lock(base: Path, clone: Path) -> None:
    sibling = linked_clone(base, base.parent.parent / "sibling.qcow2")
    apart = ("unshare", "--pid", "--fork", "--mount-proc")
    assert look(clone, base, under=apart)[0] == []
    with VM(base.parent.parent, [Disk(sibling)], extra=("-S",)):
        assert look(clone, base, under=apart)[0] == ["a process that cannot be seen from here"]


def test_who_has_an_upper_layer_open_too_reads_the_lower_one(base: Path, clone: Path) -> None:
    """An overlay elsewhere, of which only its process is seen, reads every layer below it."""
    overlay = linked_clone(clone, clone.with_name("overlay.qcow2"))
    opened = ["sleep", "infinity"]
    with base.open("rb") as lower, clone.open("rb") as upper:
        process = subprocess.Popen(opened, pass_fds=[lower.fileno(), upper.fileno()])
    try:
        found = find(overlay, clone, base)
        for layer in (clone, base):
            (reader,) = found.readers["vd0", str(layer)]
            assert [holder.pid for holder in reader.holders] == [process.pid]
        assert found.readers["vd0", str(overlay)] == ()
    finally:
        process.kill()
        process.wait()


def test_a_loop_device_reads_the_file_behind_it(base: Path) -> None:
    raw = blank(base.with_name("raw"), MIB, "raw")
    done = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", raw], stdout=subprocess.PIPE, check=True
    )
    device = done.stdout.decode().strip()
    try:
        [reader] = find(raw).readers["vd0", str(raw)]
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert str(reader) == device


# --- as an operator sees it -----------------------------------------------------------------


def shown(vm: VM, *words: object) -> dict[str, Any]:
    """`promoter chain --json`."""
    ran = promoter(vm.directory, "chain", vm.monitor, "--json", *words)
    assert ran.code == 0, ran
    return ran.result


def lowest_read_by(vm: VM, *words: object) -> list[dict[str, Any]]:
    read_by: list[dict[str, Any]] = shown(vm, *words)["disks"][0]["chain"][-1]["read_by"]
    return read_by


def test_chain_shows_siblings_that_run_and_siblings_that_do_not(base: Path, clone: Path) -> None:
    place = base.parent
    away = place.parent / "away"
    away.mkdir()
    running = linked_clone(base, place / "mail.qcow2")
    off = linked_clone(base, place / "off.qcow2")
    far = linked_clone(base, away / "far.qcow2")
    with (
        VM(place, [Disk(clone)], extra=("-S",)) as vm,
        VM(place, [Disk(running)], extra=("-S", "-name", "guest=mail,debug-threads=on")) as mail,
        VM(place, [Disk(far)], extra=("-S", "-name", "far")) as other,
    ):
        holders = [{"name": "mail", "pid": mail.pid}]
        no = {"disk": None, "aside": False, "listed": False}
        mails = {"path": str(running), "holders": holders, **no}
        offs: dict[str, object] = {"path": str(off), "holders": [], **no}
        fars = [{"name": "far", "pid": other.pid}]
        unnamed = {"path": None, "holders": fars, **no}
        assert lowest_read_by(vm) == [mails, offs, unnamed]
        named = unnamed | {"path": str(far)}
        assert lowest_read_by(vm, "--scan", away) == [named, mails, offs]
        out = promoter(place, "chain", vm.monitor).out
        assert f"read by {running} (open in mail, pid {mail.pid})\n" in out
        assert f"read by {off}\n" in out
        assert f"read by far, pid {other.pid}\n" in out
        active = shown(vm)["disks"][0]["chain"][0]
        assert active["read_by"] == []


def test_chain_shows_many_siblings_in_a_few_lines(base: Path, clone: Path) -> None:
    for number in range(MANY):
        shutil.copy(clone, base.with_name(f"sibling{number:03}.qcow2"))
    with VM(base.parent, [Disk(clone)], extra=("-S",)) as vm:
        out = promoter(base.parent, "chain", vm.monitor).out
        assert len(lowest_read_by(vm)) == MANY
    assert f"read by {MANY - 6} more, see --json" in out
    assert out.count("read by") == 7


def test_a_directory_to_scan_that_is_not_there_is_a_usage_error(base: Path) -> None:
    ran = promoter(base.parent, "chain", "/no/matter", "--scan", base.parent / "nowhere")
    assert ran.code == 2
    assert "does not exist" in ran.err


def test_a_domain_is_named_as_the_reader_it_is(libvirtd: Libvirtd, base: Path, clone: Path) -> None:
    sibling = linked_clone(base, base.with_name("sibling.qcow2"))
    with (
        Domain(libvirtd, base.parent, [Disk(sibling)], name="web07"),
        VM(base.parent, [Disk(clone)], extra=("-S",)) as vm,
    ):
        [reader] = lowest_read_by(vm)
        assert reader["path"] == str(sibling)
        assert [holder["name"] for holder in reader["holders"]] == ["web07"]
