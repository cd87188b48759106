"""Named bugs of QEMU that promoter goes round, by version. Everything else goes by feature."""

from __future__ import annotations

Version = tuple[int, int, int]


def loses_writes_at_start(version: Version) -> bool:
    """Guest writes during a mirror's first allocation scan may never be copied.

    Fixed in 10.0.9 and 10.2.2. 8.0 and 8.1 are counted in: whether they are affected in
    write-blocking mode is not known.
    """
    return (8, 0, 0) <= version < (10, 0, 9) or (10, 1, 0) <= version < (10, 2, 2)


def loses_interrupts(version: Version) -> bool:
    """``stop`` in a guest with iothreads may lose the interrupt of a request that completes
    meanwhile, and the guest waits for it for ever after ``cont``.

    Since 8.2 an iothread raises it only after the drain has seen the request as done, when
    its eventfd may be closed already. 7.2 was never seen to, 10.0.2 once in some 50 stops of
    a busy guest under TCG. No fix is known.
    """
    return version >= (8, 2, 0)


def aborts_on_raw(version: Version, device: str) -> bool:
    """An emulated device that is no virtio one may write while the switchover's permissions
    are on their way to a raw target: an assertion in QEMU's block layer.

    Seen with NVMe and QEMU 7.2 every time. IDE and SATA disks take requests in the same way.
    """
    return version < (9, 0, 0) and device.startswith(("nvme", "ide"))


def hangs_below_a_filter(version: Version) -> bool:
    """A mirror with ``replaces`` takes an iothread's lock twice when it is finalized."""
    return version < (9, 0, 0)


def unmaps_wrongly(version: Version) -> bool:
    """qcow2 may lose a write beside a zero write with ``detect-zeroes=unmap``.

    Fixed in 10.0.11 and 11.0.2.
    """
    return version < (10, 0, 11) or (10, 1, 0) <= version < (11, 0, 2)
