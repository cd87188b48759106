"""An operation and the leases of the disks that it changes.

A disk without a lease has none of this, and gets none. One with a lease is changed only on the
host, and under the process, that holds it, and is held while the operation works: nobody is
given it meanwhile, and who asks hears how far it is. In the lease the operation leaves up to
three records:

    join       before its first act: the operation works on the disk
    announce   before the names change: which file may take the disk's place
    leave      at its end: which one lies there

The lease names a file, and the commit record of an operation in place is a rename that puts
another there. Between `announce` and `leave` either file is the disk, so that at every instant,
whoever dies, the lease is about the file that the path leads to. Nothing here is remembered: each
act looks at the lease and can be repeated, by ``job resume`` too.

With a target elsewhere there is another path, and a lease there. At `announce` that one is made, as
its owner's, and each lease names the other's path; at `leave` the lease of the file that is not the
disk becomes free, and says where the disk is. In between nobody else can have either.

The readers that a base's lease lists are taken off it when they do not read through it any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from promoter.blockjob import Progress
from promoter.chain import Disk, FileId
from promoter.errors import LeaseHeld, PromoterError, Refused
from promoter.lease import rules
from promoter.lease.claim import describe
from promoter.lease.file import LeaseFile, directory_of
from promoter.lease.host import Host, new_stamp, runs_under, this_host
from promoter.lease.ledger import Ledger
from promoter.lease.readers import enter, lease_of
from promoter.lease.record import DiskIdentity, LeaseRecord, Operation, Owner, State, Work
from promoter.operations.move import DiskIntent, Move, Old, Way
from promoter.storage.names import boot_name
from promoter.storage.siblings import Registered, Unreadable

TELL_EVERY = 1.0
Write = Callable[[LeaseRecord], LeaseRecord | None]


# --- before anything is done -----------------------------------------------------------------


def check_leases(intents: Iterable[DiskIntent], old: Old, pid: int | None, state: Path) -> None:
    """May these disks be changed here? Raises `Refused` or `LeaseHeld`."""
    for intent in intents:
        if intent.names.remote:
            continue
        if store := lease_of(intent.names.path):
            host = this_host(state)
            _check_disk(store, intent.name, intent.identity, pid, host)
            _check_way(store, intent)
            _check_target(intent)
            if old is Old.DELETE and intent.way is not Way.SNAPSHOT:
                _check_unread(store, intent)
        for image in intent.chain.below:
            if base := lease_of(image.file):
                _check_layer(base, intent.name, this_host(state))


def check_lease(disk: Disk, pid: int | None, state: Path) -> LeaseRecord | None:
    """May a disk that a guest has open be changed here, by its lease; its newest record.

    None: it has no lease. Raises `Refused` or `LeaseHeld`.
    """
    file = disk.chain.active.file
    if file is None or (store := lease_of(boot_name(file))) is None:
        return None
    _check_disk(store, disk.name, "", pid, this_host(state))
    return _read(store)


def _check_disk(store: LeaseFile, disk: str, identity: str, pid: int | None, host: Host) -> None:
    record = _read(store)
    _check_owner(store, record, disk, host)
    why = ""
    owner = record.owner
    if record.state is State.RELEASING:
        why = "it is being given to another host"
        hint = f"See to whom: promoter lease show {store.disk}"
    elif record.state is not State.HELD or owner is None:
        why = f"its lease is {record.state}, and the guest has it open"
        hint = "Run the guest under its lease: promoter run"
    elif host.lives(owner) and not _is_under(pid, owner):
        why = f"it is held by {describe(owner)}, which did not start this guest"
        hint = "Change the disk in the guest that runs under its lease, or end that process."
    elif record.operation and host.works(record):
        why = f"{record.operation.kind} {record.operation.id} works on it"
        hint = f"See: promoter job watch {record.operation.id}"
    if why:
        raise Refused(f"{disk}: {store.disk}: {why}", hint)
    _begun(host, Operation(identity, "", ""), record)  # raises what stands in its way


def _check_owner(store: LeaseFile, record: LeaseRecord, disk: str, host: Host) -> None:
    owner = record.responsible
    if owner and owner.host != host.name:
        raise LeaseHeld(
            f"{disk}: {store.disk} is held by {describe(owner)}; this is host {host.name}",
            f"Change it there, or have it first: promoter lease request {store.disk}",
        )


def _is_under(pid: int | None, owner: Owner) -> bool:
    with suppress(OSError):  # another user's: its files could not be seen either
        return pid is not None and runs_under(pid, owner)
    return False


def _check_way(store: LeaseFile, intent: DiskIntent) -> None:
    """Does the disk keep the path that its lease lies beside?"""
    names = intent.names
    if _moves(intent) and intent.way is not Way.MIRROR:
        raise Refused(
            f"{intent.name}: {store.disk} has a lease, which does not follow it to {names.target}",
            "Where the old file stays below the new one, or the new one is a layer, that is done"
            " under a lease only in place: plain QEMU. A domain's disk can be promoted.",
        )
    if names.path.is_symlink():
        raise Refused(
            f"{intent.name}: {names.path} is a symbolic link, and the lease lies beside"
            f" {store.disk}",
            "Start the guest with the disk's own path.",
        )


def _moves(intent: DiskIntent) -> bool:
    """Does the disk get another path?"""
    return intent.way is not Way.COMMIT_BELOW and not intent.names.in_place


def _check_target(intent: DiskIntent) -> None:
    """Can the lease follow the disk there?"""
    if not _moves(intent):
        return
    target = intent.names.target
    if target.exists() and not target.is_file():
        raise Refused(
            f"{intent.name}: it has a lease, which cannot follow it to {target}",
            "Leases lie beside image files: choose a file.",
        )
    there = _left_at(target)
    if there and (record := there.read_any()) and record.state is not State.FREE:
        raise Refused(
            f"{intent.name}: {target} has a lease already: {record.state} by"
            f" {describe(record.responsible)}",
            "Choose another target.",
        )


def _check_unread(store: LeaseFile, intent: DiskIntent) -> None:
    if others := _others(_read(store).readers, intent):
        raise Refused(
            f"{intent.name}: {store.disk} is read by others too, by its lease: {', '.join(others)}",
            "It cannot be deleted: leave out --old delete.",
        )


def _check_layer(store: LeaseFile, disk: str, host: Host) -> None:
    """Can its readers be changed when this is over?"""
    record = _read(store)
    if record.owner:
        _check_owner(store, record, disk, host)


def _read(store: LeaseFile) -> LeaseRecord:
    record = store.read()
    assert record, "epochs are never removed"
    return record


def registered(disks: Iterable[Disk]) -> Registered:
    """The readers that the leases of the disks' layers list. Blocks: for a thread."""
    readers: dict[Path, tuple[Path, ...]] = {}
    unreadable: list[Unreadable] = []
    for file in dict.fromkeys(image.file for disk in disks for image in disk.chain):
        try:
            if store := lease_of(file):
                readers[store.disk] = tuple(map(Path, _read(store).readers))
        except PromoterError as error:
            assert file, "it has a lease"
            unreadable.append(Unreadable(file, error.message))
    return Registered(readers, tuple(unreadable))


# --- while it works --------------------------------------------------------------------------


class Leases:
    """The leases of one operation's disks. Its methods that are not async block on storage."""

    def __init__(self, identity: str, kind: str, lock: Path) -> None:
        self._operation = Operation(identity, kind, str(lock))
        self._state = lock.parent
        self._joined: set[Path] = set()
        self._written: list[dict[str, object]] = []
        self._progress: dict[str, tuple[str, Progress]] = {}

    def written(self) -> list[dict[str, object]]:
        """The epochs that were written since this was asked last."""
        written, self._written = self._written, []
        return written

    def _put(self, store: LeaseFile, make: Write) -> bool:
        return self._note(store, _write(store, make))

    def _note(self, store: LeaseFile, record: LeaseRecord | None) -> bool:
        if record:
            self._written.append({"file": str(store.disk), "epoch": record.epoch})
        return record is not None

    def join(self, disks: Iterable[DiskIntent]) -> None:
        """The operation works on the disks from now on. Raises `Refused` when it may not."""
        for disk in disks:
            if store := _of(disk):
                host = this_host(self._state)
                self._put(store, partial(_begun, host, self._operation))
                self._joined.add(store.disk)

    def announce(self, disk: DiskIntent, new: FileId | None) -> None:
        """This file may take the disk's place from now on."""
        if (store := _of(disk)) is None:
            return
        if _moves(disk):
            self._announce_move(disk, store)
            return
        if not disk.names.in_place or new is None:
            return
        host = this_host(self._state)

        def write(record: LeaseRecord) -> LeaseRecord | None:
            if new.inode in _inodes(record):
                return None
            alternate = DiskIdentity(record.disk.uuid, new.device, new.inode)
            return rules.work(record, host.name, self._operation, new_stamp(), alternate)

        self._put(store, write)

    def _announce_move(self, disk: DiskIntent, store: LeaseFile) -> None:
        """First the lease of the new file: there is no moment at which the disk has none."""
        host, target = this_host(self._state), str(disk.names.target)
        there = LeaseFile(disk.names.target, Ledger(self._state, host.name))
        self._note(there, _move_in(there, _read(store), str(store.disk), host))
        self._joined.add(there.disk)
        enter(there.disk, host)

        def write(record: LeaseRecord) -> LeaseRecord | None:
            if record.elsewhere == target:
                return None
            return rules.work(record, host.name, self._operation, new_stamp(), elsewhere=target)

        self._put(store, write)

    def leave(self, disks: Iterable[DiskIntent]) -> None:
        """The operation is over: the disk is the file that lies there."""
        for disk in disks:
            if _moves(disk):
                self._leave_moved(disk)
            elif store := _of(disk):
                self._put(store, partial(_ended, this_host(self._state), self._operation))
        self._joined.clear()

    def _leave_moved(self, disk: DiskIntent) -> None:
        if disk.names.remote:
            return
        host, paths = this_host(self._state), [disk.names.target, disk.names.path]
        if disk.names.is_old():
            self._take_off_everywhere(disk, {disk.names.target})
            paths.reverse()
        stays, goes = (_left_at(path, Ledger(self._state, host.name)) for path in paths)
        if stays:
            self._note(stays, _end(stays, partial(_ended, host, self._operation)))
        if goes:
            self._note(goes, _end(goes, partial(_gone, host, self._operation)))

    def note(self, disk: str, phase: str, progress: Progress) -> None:
        """How far the operation is with a disk."""
        self._progress[disk] = (phase, progress)

    async def keep_telling(self) -> None:
        """Tell whoever asks for the disks how far it is, every second."""
        while True:
            if self._joined and self._progress:
                await asyncio.to_thread(self._tell, self._work())
            await asyncio.sleep(TELL_EVERY)

    def _work(self) -> Work:
        phases = ", ".join(dict.fromkeys(phase for phase, _ in self._progress.values()))
        return Work(
            self._operation.id,
            f"{self._operation.kind} {self._operation.id} works on it: {phases}",
            sum(int(progress.done) for _, progress in self._progress.values()),
            sum(int(progress.total) for _, progress in self._progress.values()),
        )

    def _tell(self, work: Work) -> None:
        for path in self._joined:
            with suppress(PromoterError):  # it is only told
                LeaseFile(path).tell(work)

    def take_off_readers(self, disk: DiskIntent) -> None:
        """Take those who read no more through a layer off its lease, when the disk has switched."""
        for file, gone in _gone_readers(disk).items():
            if gone and (store := lease_of(file)):
                self._take_off(store, gone)

    def put_on_readers(self, disk: DiskIntent) -> None:
        """Enter a disk that went back in the leases of the layers through which it reads again."""
        enter(disk.names.path, this_host(self._state))

    def _take_off_everywhere(self, disk: DiskIntent, gone: Collection[Path]) -> None:
        for image in disk.chain.below:
            if store := lease_of(image.file):
                self._take_off(store, gone)

    def _take_off(self, store: LeaseFile, gone: Collection[Path]) -> None:
        host = this_host(self._state)

        def write(record: LeaseRecord) -> LeaseRecord | None:
            for reader in record.readers:
                if Path(reader) in gone:
                    return rules.remove_reader(record, host.name, reader, new_stamp())
            return None

        while self._put(store, write):
            pass


def _begun(host: Host, operation: Operation, record: LeaseRecord) -> LeaseRecord | None:
    """The record under which the operation works on a disk; None: it is the newest."""
    if record.operation == operation and record.state is State.HELD:
        return None
    mine = record.operation is not None and record.operation.id == operation.id
    kept = (record.alternate, record.elsewhere) if mine else (None, None)
    return rules.work(record, host.name, operation, new_stamp(), *kept)


def _ended(host: Host, operation: Operation, record: LeaseRecord) -> LeaseRecord | None:
    """The record under which it does no more; None: the lease does not say that it does."""
    if record.operation is None or record.operation.id != operation.id:
        return None
    return rules.work_done(record, host.name, operation.id, new_stamp())


def _gone(host: Host, operation: Operation, record: LeaseRecord) -> LeaseRecord | None:
    """The record that says where the disk is; None: the lease does not say that it was moved."""
    if record.operation is None or record.operation.id != operation.id or not record.elsewhere:
        return None
    return rules.moved(record, host.name, new_stamp())


def _move_in(there: LeaseFile, moving: LeaseRecord, path: str, host: Host) -> LeaseRecord | None:
    """Have the new file be its owner's, before the disk at ``path`` moves to it; None: it is."""
    while True:
        before, stamp = there.read_any(), new_stamp()
        now = there.identity(before.disk.uuid if before else stamp.nonce)
        if before is None or before.operation != moving.operation:
            made = rules.move_in(before, now, moving, path, stamp)
        elif before.disk.inode != now.inode:  # it was made anew
            assert moving.operation, "looked at"
            again = rules.work(before, host.name, moving.operation, stamp, elsewhere=path)
            made = rules.repin(again, now)
        else:
            return None
        if there.compare_and_swap(before.epoch if before else 0, made):
            return made


def _end(store: LeaseFile, make: Write) -> LeaseRecord | None:
    """Write the record that ``make`` makes of the newest one, whatever file is there; None when
    it makes none.
    """
    while record := store.read_any():
        made = make(record)
        if made is None:
            return None
        if store.compare_and_swap(record.epoch, made):
            return made
    raise AssertionError("epochs are never removed")


def _left_at(path: Path, ledger: Ledger | None = None) -> LeaseFile | None:
    """The lease at a path, also of a file that is not there any more; None: it has none."""
    if not (path.is_file() or directory_of(path).is_dir()):
        return None
    store = LeaseFile(path, ledger)
    return store if store.read_any() else None


def _of(disk: DiskIntent) -> LeaseFile | None:
    return None if disk.names.remote else lease_of(disk.names.path)


def _write(store: LeaseFile, make: Write) -> LeaseRecord | None:
    """Write the record that ``make`` makes of the newest one; None when it makes none."""
    while True:
        record = _read(store)
        made = make(record)
        if made is None:
            return None
        if store.compare_and_swap(record.epoch, made):
            return made


def _inodes(record: LeaseRecord) -> set[int]:
    return {record.disk.inode} | ({record.alternate.inode} if record.alternate else set())


def _gone_readers(disk: DiskIntent) -> Mapping[Path, set[Path]]:
    """Who reads no more through which layer: the disk through those that left its chain, and
    layers whose files are gone through any. The layer that the disk is now keeps it: it is not
    to be had by its own name.
    """
    own = {name for name in (disk.names.path, disk.chain.active.file) if name}
    vanished = {image.file for image in disk.gone if image.file and not image.file.exists()} - own
    left = set() if disk.way is Way.COMMIT_BELOW else {image.file for image in disk.gone}
    if _moves(disk):  # what stays below it has it as a reader by its new path
        left |= {image.file for image in disk.chain.below}
    below = [image.file for image in disk.chain.below if image.file]
    return {file: vanished | (own if file in left else set()) for file in below}


def _others(readers: Iterable[str], disk: DiskIntent) -> list[str]:
    """Those of the readers that are not of the disk's own chain."""
    own = {disk.names.path, *(file for image in disk.chain for file in image.files)}
    return [reader for reader in readers if Path(reader) not in own]


def is_listed(file: Path, disk: DiskIntent) -> bool:
    """Does a lease list somebody else who reads through this layer?"""
    store = lease_of(file)
    return store is not None and bool(_others(_read(store).readers, disk))


def leave(move: Move, lock: Path) -> None:
    """What an operation that has ended may not have come to."""
    Leases(move.id, str(move.kind), lock).leave(move.disks)
