"""libvirt's ``qemu`` hook: a domain's disks are claimed before it starts, and freed after it ends.

libvirtd waits for the hook and must not be called from it. What ``prepare`` refuses does not
start. A lease of a domain's is its host's, with no process that answers: the agent refuses for
it. Two domains of one host are kept apart by the image lock, as everywhere.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from promoter.errors import PromoterError, Refused
from promoter.lease.claim import Acquisition, follow, let_go
from promoter.lease.credentials import Credentials
from promoter.lease.file import LeaseFile
from promoter.lease.host import Host
from promoter.lease.ledger import Ledger
from promoter.lease.liveness import lock_on
from promoter.lease.record import Owner
from promoter.lease.rules import Lock
from promoter.storage.files import write_whole

NAME = "promoter"
PATIENCE = 10.0
LOOK_EVERY = 0.05
SCRIPT = """\
#!/bin/sh
# Made by `promoter hook install`: a domain's disks are held under leases while it runs.
case "$2/$3" in
    prepare/begin | release/end) exec {command} "$@" ;;
esac
"""


def install(directory: Path, python: Path, state: Path, timeout: float) -> Path:
    """Put the hook into libvirt's directory of hooks; the file that was made."""
    words = [str(python), "-m", "promoter", "hook", "run", "--state-dir", str(state.absolute())]
    command = shlex.join([*words, "--timeout", f"{timeout:g}"])
    hooks = directory / "qemu.d"
    hooks.mkdir(parents=True, exist_ok=True)
    hook = hooks / NAME
    write_whole(hook, SCRIPT.format(command=command).encode(), 0o755)
    return hook


@dataclass(frozen=True)
class Domain:
    """A domain as libvirt gives it to a hook: its name in leases, and what it may write on."""

    guest: str
    disks: tuple[Path, ...]


def parse(text: str) -> Domain:
    """From libvirt's XML. Of its disks those that are image files and not read-only."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise Refused(f"what libvirt gave is no XML: {error}", "Nothing was claimed.") from error
    guest = f"domain {root.findtext('name', '')} {root.findtext('uuid', '')}"
    files = {file for disk in _disks(root) if (file := _written(disk))}
    return Domain(guest, tuple(Path(file) for file in sorted(files)))


def _disks(root: Element) -> Sequence[Element]:
    return [disk for disk in root.findall("devices/disk") if disk.get("device", "disk") == "disk"]


def _written(disk: Element) -> str:
    source = disk.find("source")
    if source is None or disk.find("readonly") is not None:
        return ""
    return source.get("file", "")


class Holder:
    """Holds disks for one domain."""

    def __init__(
        self, domain: Domain, host: Host, ledger: Ledger, credentials: Credentials | None
    ) -> None:
        self._domain, self._host, self._ledger = domain, host, ledger
        self._credentials = credentials
        self._owner: Owner = host.owner(guest=domain.guest)

    def claim(self, timeout: float) -> None:
        """All of the domain's disks, or none and the error that says why."""
        claimed = []
        try:
            for disk in self._domain.disks:
                store = LeaseFile(disk, self._ledger)
                asking = Acquisition(store, self._host, self._owner, credentials=self._credentials)
                asking.run(timeout)
                claimed.append(store)
        except PromoterError:
            for store in claimed:
                let_go(store, self._host)
            raise

    def free(self) -> list[PromoterError]:
        """What this host holds for the domain, by whatever name it is known now; what failed."""
        failed = []
        for disk in self._ledger.held().values():
            try:
                self._free(LeaseFile(disk, self._ledger))
            except PromoterError as error:
                failed.append(error)
        return failed

    def _free(self, store: LeaseFile) -> None:
        record = store.read_any()
        owner = record.owner if record else None
        mine = owner and (owner.host, owner.guest) == (self._host.name, self._domain.guest)
        if not mine:
            return
        here = store.disk in {disk.resolve() for disk in self._domain.disks}
        if record and record.elsewhere and not here:  # what moved the disk was interrupted
            follow(store, self._host, gone=Path(record.elsewhere) in self._domain.disks)
            return
        deadline = time.monotonic() + PATIENCE
        while lock_on(store.disk) is Lock.HELD and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY)
        let_go(store, self._host, here=here)
