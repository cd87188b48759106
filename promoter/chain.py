"""Images, backing chains and disks, as values.

A *backing chain* starts at the *active layer*, the only image the guest
writes to, and ends at the *base*. Everything here is pure: no file is opened
and no guest is asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FileId:
    """Which file a name leads to: device and inode number."""

    device: int
    inode: int


@dataclass(frozen=True)
class FileStamp:
    """A file as it was at one moment; equal stamps mean it was not written since."""

    id: FileId
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Image:
    """One image of a backing chain, as the running guest has it open.

    ``file`` is None when the image, or its external data file, is not a plain local
    file. Sizes are in bytes. It is ``writable`` where QEMU has it open for writing, whether or not
    anybody may write. Source: QAPI ``query-named-block-nodes``.
    """

    node: str
    format: str
    file: Path | None
    file_driver: str
    file_node: str | None
    virtual_size: int
    allocated: int
    cluster_size: int | None = None
    compat: str | None = None
    extended_l2: bool = False
    encrypted: bool = False
    data_file: Path | None = None
    snapshots: tuple[str, ...] = ()
    bitmaps: tuple[str, ...] = ()
    writable: bool = field(default=False, compare=False)

    @property
    def granularity(self) -> int:
        """The unit of allocation in bytes: a cluster, or a subcluster with extended L2."""
        cluster = self.cluster_size or 64 * 1024
        return cluster // 32 if self.extended_l2 else cluster

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the image."""
        return tuple(file for file in (self.file, self.data_file) if file)


@dataclass(frozen=True)
class BackingChain:
    """A disk's images, the active layer first."""

    images: tuple[Image, ...]

    @property
    def active(self) -> Image:
        return self.images[0]

    @property
    def below(self) -> tuple[Image, ...]:
        """The images under the active layer: read-only while the guest runs."""
        return self.images[1:]

    def __iter__(self) -> Iterator[Image]:
        return iter(self.images)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class DiskOptions:
    """How QEMU opened a disk; the disk that replaces it is opened the same way."""

    cache_direct: bool = False
    cache_no_flush: bool = False
    writeback: bool = True
    detect_zeroes: str = "off"
    aio: str | None = None
    discard: str | None = None
    locking: str | None = None


@dataclass(frozen=True)
class LibvirtDisk:
    """What libvirt believes of a disk: the files of its chain, the active layer first; the
    file that the next boot opens, None for a transient domain or disk; and the file that a
    block job of its own copies to, if one does.
    """

    chain: tuple[str, ...]
    next_boot: str | None
    mirror: str | None = None


@dataclass(frozen=True)
class Disk:
    """A guest's disk: its names, its backing chain and who else works on it.

    ``key`` finds the same disk again after a switchover or a reboot. ``node`` is its root:
    the active layer, or the uppermost of the throttle filters above it; ``filters`` are the
    others. ``device`` is the QOM type of what the guest sees it by, "" where that is not known.
    ``backing_given``: the guest's command line says what lies below the active layer.
    ``libvirt`` is None for a guest that is not libvirt's.
    """

    key: str
    name: str
    aliases: frozenset[str]
    node: str
    chain: BackingChain
    options: DiskOptions
    read_only: bool = False
    filters: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    other_writers: int = 0
    backing_given: bool = False
    device: str = ""
    libvirt: LibvirtDisk | None = None

    def answers_to(self, name: str) -> bool:
        """Is ``name`` this disk's device id, device name or node-name?"""
        return name == self.name or name in self.aliases

    @property
    def differences(self) -> tuple[str, ...]:
        """Where libvirt's picture of the disk is not QEMU's."""
        if self.libvirt is None:
            return ()
        files = tuple(str(image.file or "") for image in self.chain)
        found = []
        if self.libvirt.chain != files:
            found.append(f"libvirt believes: {' on '.join(self.libvirt.chain)}")
        if self.libvirt.next_boot not in (None, files[0]):
            found.append(f"the next boot opens: {self.libvirt.next_boot}")
        return tuple(found)


def image_spec(images: tuple[Image, ...]) -> str:
    """Describe a chain to qemu-img exactly as the guest has it open.

    Built from the running graph and not from image headers, which may name
    other backing files than the ones in use. Source: the ``json:`` pseudo
    protocol of QEMU's block layer.
    """
    spec: dict[str, Any] | None = None
    for image in reversed(images):
        layer: dict[str, Any] = {
            "driver": image.format,
            "file": {"driver": image.file_driver, "filename": str(image.file)},
        }
        if image.format != "raw":
            layer["backing"] = spec
        if image.data_file:
            layer["data-file"] = {"driver": "file", "filename": str(image.data_file)}
        spec = layer
    return "json:" + json.dumps(spec)
