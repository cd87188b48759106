"""`promoter doctor` on guests that are well, and on what is left when something was killed."""

from __future__ import annotations

import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from promoter.storage.abilities import abilities, mount_of, nfs_faults
from promoter.storage.denials import Denial, denials
from tests.cli import Ran, ended, promoter, start
from tests.deltas import read_until
from tests.domains import Domain, Libvirtd
from tests.struck import POINTS
from tests.test_bad_input import promoting
from tests.test_kills import Case
from tests.test_lease_operations import Leased
from tests.test_lease_run import LeasingHost
from tests.vm import VM, Disk, base, blank, chain, file_system, linked_clone, qemu_img

CLUSTER = 1 << 16
SAMPLE = ("before MIRROR", "before AWAIT_READY", "renamed")


def doctor(case: Case | VM | Domain, state: Path, *words: object) -> Ran:
    address = case.vm.address if isinstance(case, Case) else case.address
    return promoter(state, "doctor", *address, *words, "--json")


def said(ran: Ran, event: str) -> str:
    lines = [line for line in ran.lines if line["event"] == event]
    return "\n".join(f"{line['about']}: {line['message']}" for line in lines)


def files(directory: Path) -> dict[str, int]:
    """The images that are there, by name; which file each is."""
    return {path.name: path.lstat().st_ino for path in directory.glob("*.qcow2*")}


def size(vm: VM) -> int:
    return int(vm.qmp("query-block")[0]["inserted"]["image"]["virtual-size"])


def nodes(vm: VM) -> set[str]:
    return {node["node-name"] for node in vm.qmp("query-named-block-nodes", flat=True)}


@contextmanager
def _header(image: Path) -> Iterator[tuple[int, int]]:
    """Where a qcow2 image's first refcount block and its L1 table are."""
    with image.open("rb") as file:
        header = file.read(64)
        (l1, refcounts) = struct.unpack(">QQ", header[40:56])
        file.seek(refcounts)
        yield struct.unpack(">Q", file.read(8))[0], l1


def leak(image: Path) -> None:
    """Have one more cluster that is counted as used, and which nothing refers to."""
    with _header(image) as (block, _):
        end = -(-image.stat().st_size // CLUSTER)
        with image.open("r+b") as file:
            file.truncate((end + 1) * CLUSTER)
            file.seek(block + 2 * end)
            file.write(struct.pack(">H", 1))


def corrupt(image: Path) -> None:
    """Have the cluster of the L1 table counted as free."""
    with _header(image) as (block, l1), image.open("r+b") as file:
        file.seek(block + 2 * (l1 // CLUSTER))
        file.write(struct.pack(">H", 0))


@pytest.mark.parametrize("qemu", ["system", "newest"], indirect=True)
def test_a_guest_that_is_well_gets_no_findings_also_after_a_promotion_and_a_reboot(
    tmp_path: Path, qemu: str
) -> None:
    case = Case(tmp_path, target=False)
    with case.vm as vm:
        vm.wait_for_acks(60)
        well = doctor(case, case.state)
        assert (well.code, well.result["findings"]) == (0, []), well.out
        assert str(case.clone) in said(well, "note"), "what could not be checked is said"
        assert {each["directory"] for each in well.result["directories"]} == {
            *map(str, (tmp_path, case.state))
        }
        assert promoter(case.state, "promote", *vm.address, "--json").code == 0
        promoted = doctor(case, case.state)
        assert (promoted.code, promoted.result["findings"]) == (0, []), promoted.out
        vm.wait_for_acks(20)
        vm.kill()
        case.boot()
        spares = [name for name in files(tmp_path) if ".new-" in name]
        looked = doctor(case, case.state)
        assert (looked.code, looked.result["findings"]) == (0, []), looked.out
        assert spares[0] in said(looked, "note")
        assert spares[0] in files(tmp_path), "looking changes nothing"
        assert doctor(case, case.state, "--repair").code == 0
        assert spares[0] not in files(tmp_path)
        vm.wait_for_acks(20)
        case.prove(promoted=True)


@pytest.mark.parametrize(
    "point",
    [pytest.param(p, marks=() if p in SAMPLE else pytest.mark.nightly) for p in POINTS],
)
def test_what_a_kill_left_is_named_and_repaired(tmp_path: Path, point: str) -> None:
    case = Case(tmp_path, target=False)
    digest = sha256(base().read_bytes()).hexdigest()
    with case.vm as vm:
        vm.wait_for_acks(60)
        assert ended(case.strike(point, "promoter")).code == -signal.SIGKILL
        vm.wait_for_acks(40)  # a guard may have been at work
        before = (files(tmp_path), nodes(vm), [job["id"] for job in vm.qmp("query-jobs")])
        found = doctor(case, case.state)
        assert found.code == 9, found.out
        assert "stopped half-way" in said(found, "finding")
        assert found.result["findings"][0]["remedy"].startswith("promoter job resume ")
        assert before[0] == files(tmp_path)
        assert before[1] == nodes(vm), "only --repair changes anything"
        mended = doctor(case, case.state, "--repair")
        assert (mended.code, mended.result["findings"]) == (0, []), mended.out
        assert vm.qmp("query-jobs") == []
        vm.wait_for_acks(40)
        again = doctor(case, case.state)
        assert (again.code, again.result["findings"]) == (0, []), again.out
        case.prove(promoted=True)
    assert sha256(base().read_bytes()).hexdigest() == digest


def test_without_a_guest_the_host_and_its_journal_are_looked_at(tmp_path: Path) -> None:
    case = Case(tmp_path, target=False)
    with case.vm as vm:
        vm.wait_for_acks(60)
        assert ended(case.strike("before PREPARE", "both")).code == -signal.SIGKILL
        vm.wait()
        words = ("--connect", "qemu+unix:///system?socket=/nowhere", "--json")
        found = promoter(case.state, "doctor", *words)
        assert found.code == 9, found.out
        assert f"vd0: the next boot opens {case.clone}" in said(found, "finding")
        assert "/nowhere" in said(found, "note"), "libvirt does not answer, and nobody needs it"
        mended = promoter(case.state, "doctor", "--repair", *words)
        assert (mended.code, mended.result["findings"]) == (0, []), mended.out
        assert set(files(tmp_path)) == {"clone.qcow2"}
        case.boot()
        case.prove(promoted=False)


def test_a_guest_on_which_an_operation_runs_is_left_alone(tmp_path: Path) -> None:
    case = Case(tmp_path, target=False)
    with case.vm as vm:
        vm.wait_for_acks(20)
        with promoting(case.state, vm, "--speed", "1M", "--json") as process:
            read_until(process, '"phase": "seed"')
            found = doctor(case, case.state, "--repair")
            assert (found.code, found.result["repaired"]) == (0, []), found.out
            assert "runs; what it works on was not looked into" in said(found, "note")
            process.send_signal(signal.SIGINT)
            assert ended(process).code == 7
        assert doctor(case, case.state).code == 0
        vm.wait_for_acks(20)
        case.prove(promoted=False)


def test_orphans_are_removed_only_where_they_are_certainly_ours(tmp_path: Path) -> None:
    case = Case(tmp_path, target=False)
    with case.vm as vm:
        vm.wait_for_acks(20)
        done = promoter(case.state, "promote", *vm.address, "--json").result["id"]
        for identity in (done, "deadbeef"):
            file = blank(tmp_path / f"{identity}.img", size(vm))
            (tmp_path / f"clone.qcow2.part-{identity}").touch()
            vm.qmp(
                "blockdev-add",
                driver="qcow2",
                node_name=f"promoter-{identity}-7",
                file={"driver": "file", "filename": str(file)},
            )
        root = vm.qmp("query-block")[0]["inserted"]["node-name"]
        vm.qmp("blockdev-mirror", device=root, target="promoter-deadbeef-7", sync="full",
               job_id="promoter-deadbeef-7", speed=1, auto_dismiss=False)  # fmt: skip
        found = doctor(case, case.state)
        assert found.code == 9, found.out
        assert "promoter-deadbeef-7" in said(found, "finding")
        assert "part-deadbeef" in said(found, "note")
        mended = doctor(case, case.state, "--repair")
        assert mended.code == 9, mended.out
        assert [each["remedy"] for each in mended.result["findings"]] == [None]
        assert not {n for n in nodes(vm) if n.startswith(f"promoter-{done}-7")}
        assert [job["id"] for job in vm.qmp("query-jobs")] == ["promoter-deadbeef-7"]
        left = {name for name in files(tmp_path) if ".part-" in name}
        assert left == {"clone.qcow2.part-deadbeef"}
        vm.qmp("block-job-cancel", device="promoter-deadbeef-7", force=True)
        vm.wait_for_acks(20)


def test_a_job_of_an_operation_that_has_ended_is_ended(tmp_path: Path) -> None:
    case = Case(tmp_path, target=False)
    with case.vm as vm:
        vm.wait_for_acks(20)
        done = promoter(case.state, "promote", *vm.address, "--json").result["id"]
        node = f"promoter-{done}-7"
        file = {"driver": "file", "filename": str(blank(tmp_path / "x.img", size(vm)))}
        vm.qmp("blockdev-add", driver="qcow2", node_name=node, file=file)
        root = vm.qmp("query-block")[0]["inserted"]["node-name"]
        vm.qmp("blockdev-mirror", device=root, target=node, sync="full", job_id=node, speed=1,
               filter_node_name=f"{node}-mirror", auto_dismiss=False)  # fmt: skip
        assert vm.qmp("query-jobs")[0]["status"] == "running"
        mended = doctor(case, case.state, "--repair")
        assert (mended.code, mended.result["findings"]) == (0, []), mended.out
        assert vm.qmp("query-jobs") == []
        assert not {n for n in nodes(vm) if n.startswith(node)}
        vm.wait_for_acks(20)
        case.prove(promoted=True)


def test_a_layer_that_does_not_add_up_is_found_while_the_guest_runs(tmp_path: Path) -> None:
    layers = chain(tmp_path, 3)
    with VM(tmp_path, [Disk(layers[-1])], writer={"rate": 0}) as vm:
        vm.wait_for_acks(20)
        assert doctor(vm, tmp_path / "state").code == 0
        vm.kill()
        leak(layers[1])
        vm.start()
        found = doctor(vm, tmp_path / "state")
        assert found.code == 8, found.out
        assert "1 leaked clusters" in said(found, "finding")
        vm.wait_for_acks(20)


def test_a_snapshot_that_somebody_else_took_is_seen_to_be_lost_at_the_next_boot(
    tmp_path: Path,
) -> None:
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    with VM(tmp_path, [Disk(clone)], writer={"rate": 0}) as vm:
        vm.wait_for_acks(20)
        overlay = tmp_path / "overlay.qcow2"
        vm.qmp("blockdev-snapshot-sync", device="disk0", snapshot_file=str(overlay),
               format="qcow2", node_name="disk0", snapshot_node_name="above")  # fmt: skip
        found = doctor(vm, tmp_path / "state", "--repair")
        assert found.code == 8, found.out
        assert f"writes to {overlay}, but its command line opens {clone}" in said(found, "finding")


def test_a_domain_whose_definition_names_another_disk(tmp_path: Path, libvirtd: Libvirtd) -> None:
    state = tmp_path / "state"
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    other = linked_clone(base(), tmp_path / "other.qcow2")
    with Domain(libvirtd, tmp_path, [Disk(clone)]) as domain:
        domain.wait_for_acks(20)
        well = doctor(domain, state)
        assert (well.code, well.result["findings"]) == (0, []), well.out
        right, domain.disks = domain.disks, (Disk(other),)
        domain.define()
        found = doctor(domain, state, "--repair")
        assert found.code == 8, found.out
        assert f"the next boot opens: {other}" in said(found, "finding")
        assert domain.next_boot() == [str(other)], "it is libvirt's to change"
        domain.disks = right
        domain.define()
        domain.shutdown()
        assert doctor(domain, state).code == 0
        leak(clone)
        found = doctor(domain, state)
        assert found.code == 8, found.out
        assert "leaked" in said(found, "finding")
        qemu_img("check", "-q", "-r", "leaks", clone)
        assert doctor(domain, state).code == 0
        corrupt(clone)
        found = doctor(domain, state)
        assert found.code == 8, found.out
        assert f"{clone}" in found.result["findings"][0]["about"]
        qemu_img("check", "-q", "-r", "all", clone)
        (tmp_path / "clone.qcow2").rename(tmp_path / "gone.qcow2")
        found = doctor(domain, state)
        assert found.code == 8, found.out
        assert "No such file" in said(found, "finding")


@pytest.mark.nightly
def test_a_domain_that_was_pivoted_and_not_defined(tmp_path: Path, libvirtd: Libvirtd) -> None:
    state = tmp_path / "state"
    clone = linked_clone(base(), tmp_path / "clone.qcow2")
    with Domain(libvirtd, tmp_path, [Disk(clone)]) as domain:
        domain.wait_for_acks(20)
        words = ("pivoted", "promoter itself", libvirtd.pid, "promote", *domain.address, "--json")
        ended(start(state, *words, module="tests.struck"))
        assert domain.paused
        found = doctor(domain, state)
        assert found.code == 9, found.out
        assert "stopped half-way; next: continue; vda:" in said(found, "finding")
        mended = doctor(domain, state, "--repair")
        assert (mended.code, mended.result["findings"]) == (0, []), mended.out
        assert domain.next_boot() == domain.files() != [str(clone)]
        domain.wait_for_acks(20)


@pytest.mark.parametrize(("kind", "reflink"), [("ext4", False), ("xfs", True)])
def test_a_file_system_is_tried_and_left_as_it_was(
    tmp_path: Path, kind: str, reflink: bool
) -> None:
    with file_system(kind, tmp_path, 400 << 20) as mounted:
        before = sorted(mounted.iterdir())
        found = abilities(mounted)
        assert found.file_system == kind == mount_of(mounted).kind
        assert found.reflink is reflink
        assert found.hard_links
        assert found.ofd_locks
        assert found.flock
        assert found.direct_io
        assert found.faults == ()
        assert sorted(mounted.iterdir()) == before


def test_what_of_an_nfs_mount_breaks_locks_or_leases() -> None:
    common = ["rw", "rsize=1048576", "hard", "proto=tcp", "sec=sys"]
    assert nfs_faults([*common, "vers=4.2", "local_lock=none", "lookupcache=none"]) == ()
    wrong = ["rw", "vers=3", "soft", "nolock", "nocto", "local_lock=all"]
    assert [fault.partition(":")[0] for fault in nfs_faults(wrong)] == [
        "it is NFS 3",
        "it is mounted soft",
        "its locks are this host's own (nolock or local_lock)",
        "it is mounted nocto",
        "it is mounted without lookupcache=none",
    ]


def test_apparmors_denials_are_read_from_its_own_lines() -> None:
    line = (
        'kernel: audit: type=1400 audit(1700000000.123:45): apparmor="DENIED" operation="open"'
        ' class="file" profile="libvirt-5c1f" name={} pid=4321 comm="qemu-system-x86"'
        ' requested_mask="wr" denied_mask="wr" fsuid=64055 ouid=0\n'
    )
    plain, spaced = Path("/vm/base.qcow2"), Path("/vm/a b.qcow2")
    text = line.format(f'"{plain}"') * 2 + line.format(str(spaced).encode().hex().upper())
    expected = [Denial(file, "open", "libvirt-5c1f", "wr") for file in (plain, spaced)]
    assert list(denials(text, [plain, spaced], 1_699_999_999)) == expected
    assert denials(text, [Path("/vm/other.qcow2")], 0) == ()
    assert denials(text, [plain], 1_700_000_002) == ()


def test_a_leased_disk_is_well_on_its_host_and_nowhere_else(tmp_path: Path) -> None:
    hosts = LeasingHost(tmp_path, "host-a"), LeasingHost(tmp_path, "host-b")
    leased = Leased(tmp_path, hosts)
    try:
        leased.boot()
        well = leased.perform("doctor")
        assert (well.code, well.result["findings"]) == (0, []), well.out
        elsewhere = leased.perform("doctor", host=leased.b)
        assert elsewhere.code == 10, elsewhere.out
        assert "is held by host host-a" in said(elsewhere, "finding")
        leased.strike("announced", "promote")
        assert leased.perform("doctor").code == 9
        mended = leased.perform("doctor", "--repair")
        assert (mended.code, mended.result["findings"]) == (0, []), mended.out
        assert leased.names_its_file()
        leased.write(20)
        leased.passes_to_the_other_host()
    finally:
        for host in hosts:
            host.close()
        leased.close()
