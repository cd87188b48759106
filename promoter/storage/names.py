"""What the guest's next boot opens, and the one instant at which that changes.

The guest's own command line names a path. Before the switchover that path is
the old overlay; the commit is one ``rename(2)`` of a prepared name over it:

* in place, the prepared name is a hard link to the new image;
* with a target elsewhere it is a symbolic link that leads nowhere, so that the
  old command line fails loudly instead of booting yesterday's disk.

What a libvirt domain boots from is in its definition, which is libvirt's to
change; here only the old overlay is put aside, when it has been. One on a block
device stays where it is, and so does one on another host, of which nothing is
looked at here: a file that has its name on this host is another file.

`commit` and `revoke` exclude each other: both need the prepared name, and the
file system gives it to one of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from promoter.chain import FileId
from promoter.storage.files import file_id, sync

SPARE = re.compile(r"(.+)\.(new|snapshot-[0-9]{8}T[0-9]{6}Z)-[0-9a-f]{8}")
"""Names that promoter gives a file beside the one that the guest boots from."""


MERGED = re.compile(r"\.merged-[0-9a-f]{8}$")
"""The end of a name that says: what this layer held is in the one below, and nobody needs it."""


def boot_name(file: Path) -> Path:
    """The name by which the guest's command line opens a file that QEMU knows as ``file``.

    A disk that has switched is known to its QEMU by the other name that it was given for that;
    after a commit by the layer's own name, and beside it lies one that leads back (`prepare`).
    """
    own = file_id(file)
    for name in (file, *sorted(file.parent.iterdir())):
        found = SPARE.fullmatch(name.name)
        if found and file_id(name) == own == file_id(name.with_name(found[1])):
            return name.with_name(found[1])
    return file


def merged_name(file: Path, identity: str) -> Path:
    """What a layer is called when an operation has merged it."""
    return file.with_name(f"{file.name}.merged-{identity}")


class Named(Enum):
    """What the guest's path leads to."""

    OLD = "old"
    NEW = "new"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Names:
    """The names of one disk's switch, all in the old overlay's directory but ``target``.

    ``path`` is what the guest's command line opens, ``old`` the overlay it leads to
    before the switch, ``aside`` the name the old overlay keeps, ``prepared`` the name
    that the commit moves over ``path``. ``defined``: the guest is a libvirt domain. Where
    ``aside`` is ``path`` the old overlay keeps its name. ``stays``: its name is nobody's to
    change, since it is a block device, or on another host: ``old`` is None then.
    """

    old: FileId | None
    path: Path
    target: Path
    aside: Path
    prepared: Path
    in_place: bool
    defined: bool = False
    stays: bool = False

    @property
    def remote(self) -> bool:
        """Are the files on another host?"""
        return self.old is None

    def prepare(self) -> None:
        """Make ``aside`` and ``prepared``; the guest's path is untouched. Repeatable."""
        if self.stays:
            return
        with suppress(FileExistsError):
            os.link(self.path, self.aside)
        self.prepared.unlink(missing_ok=True)
        if self.in_place:
            os.link(self.target, self.prepared)
            if not SPARE.fullmatch(self.target.name):
                with suppress(FileExistsError):
                    os.link(self.target, self._way_back)
        elif not self.defined:
            self.prepared.symlink_to(f"promoted to {self.target.name}, kept as {self.aside.name}")
        sync(self.path.parent)

    @property
    def _way_back(self) -> Path:
        """A layer has a name that does not tell whose path it takes; this one tells."""
        return self.path.with_name(self.prepared.name.replace(".next-", ".new-"))

    def is_prepared(self) -> bool:
        if self.aside == self.path:
            return self.target.exists()
        ready = self.defined or os.path.lexists(self.prepared)
        return ready and file_id(self.aside) == self.old

    def commit(self) -> None:
        """The commit record: one rename, then an fsync of the directory.

        Raises FileNotFoundError when the prepared name was revoked.
        """
        self.prepared.rename(self.path)
        sync(self.path.parent)

    def settle(self) -> None:
        """Commit unless somebody has; the commit is durable either way."""
        with suppress(FileNotFoundError):
            self.prepared.rename(self.path)
        sync(self.path.parent)

    def revoke(self) -> bool:
        """Take the prepared name away; False when it is gone: the commit has happened."""
        try:
            self.prepared.unlink()
        except FileNotFoundError:
            return False
        return True

    def put_back(self) -> None:
        """Undo a commit whose switchover failed: the path is the old overlay again."""
        back = self.aside.with_name(f"{self.aside.name}.back")
        back.unlink(missing_ok=True)
        os.link(self.aside, back)
        back.rename(self.path)
        sync(self.path.parent)

    def is_old(self) -> bool:
        """Does the path lead to the old overlay?"""
        return file_id(self.path) == self.old

    def look(self, new: FileId | None) -> Named:
        """What the path leads to now; ``new`` is the new image, once it is made."""
        if self.is_old():
            return Named.OLD
        path = file_id(self.path)
        if self.in_place:
            return Named.NEW if path is not None and path == new else Named.UNKNOWN
        moved = path is None or self.path.is_symlink()
        return Named.NEW if moved and file_id(self.aside) == self.old else Named.UNKNOWN

    def spares(self) -> list[Path]:
        """The other names that promoter gave the new disk and the old overlay."""
        disk = file_id(self.path) if self.in_place else None
        if disk is None:
            return []
        named = (path for path in self.path.parent.iterdir() if SPARE.fullmatch(path.name))
        return [p for p in named if p != self.aside and file_id(p) in (disk, self.old)]

    def is_remembered(self, spare: Path, files: Collection[str]) -> bool:
        """Does a QEMU that knows ``files`` need this one of the `spares`?"""
        if str(spare) in files:
            return True
        disk = file_id(self.path)
        known = [Path(file) for file in files if file_id(Path(file)) == disk]
        leads_back = any(name == self.path or SPARE.fullmatch(name.name) for name in known)
        return file_id(spare) == disk and bool(known) and not leads_back

    def tidy(self) -> None:
        """After the switch: remove the name that leads nowhere, or to a domain's old overlay."""
        if self.in_place or self.stays:
            return
        is_spare = self.is_old() and self.is_prepared() if self.defined else self.path.is_symlink()
        if is_spare and self.aside != self.path:
            self.path.unlink()
            sync(self.path.parent)

    def withdraw(self) -> None:
        """Before any switch: remove the names made by `prepare`."""
        if self.stays:
            return
        self.prepared.unlink(missing_ok=True)
        if self.is_old() and self.aside != self.path:
            self.aside.unlink(missing_ok=True)
            if self.in_place and self._way_back != self.target:
                self._way_back.unlink(missing_ok=True)
        sync(self.path.parent)
