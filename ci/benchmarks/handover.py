"""A disk between two hosts with agents, in network namespaces of their own, over one pool."""

from __future__ import annotations

import asyncio
import time
from dataclasses import astuple
from pathlib import Path

from ci.benchmarks.harness import Measure, Table
from promoter.guests.qmp import QmpGuest
from tests.test_lease_handover import ToAndFro, two_hosts, two_namespaces
from tests.vm import MIB, VM, Bus, Disk, base, blank, linked_clone


def handover(directory: Path, whole: bool) -> Table:
    """From the request on."""
    steps = ("begun", "closed", "claimed", "opened")
    table = Table([Measure(f"{step}, ms") for step in steps])
    for policy in ("detach", "loan", "close"):
        turn = directory / policy
        turn.mkdir()
        with two_namespaces() as network, two_hosts(turn, network) as hosts:
            disk = ToAndFro(turn, hosts, policy)
            disk.next()
            for _ in range(20 if whole else 5):
                (disk.lend if policy == "loan" else disk.next)()
                table.add("", policy, *astuple(disk.times[-1]))
            disk.end()
    return table


def unplug(directory: Path, whole: bool) -> Table:
    """For how long a guest that runs keeps a disk that it is asked to give up."""
    table = Table([Measure("from `device_del` to `DEVICE_DELETED`, ms")])
    for bus in (Bus.SCSI, Bus.VIRTIO):
        turn = directory / bus.name
        turn.mkdir()
        disks = [linked_clone(base(), turn / "root"), blank(turn / "data", 8 * MIB)]
        with VM(turn, [Disk(disk, bus=bus) for disk in disks]) as vm:
            vm.wait_for_acks(20)
            for _ in range(20 if whole else 5):
                table.add("", bus.value, unplugged(vm, bus) * 1000)
    return table


def unplugged(vm: VM, bus: Bus) -> float:
    async def work() -> float:
        guest = await QmpGuest.connect(vm.monitor)
        began = time.monotonic()
        await guest.unplug("/machine/peripheral/vd1")
        took = time.monotonic() - began
        await guest.close()
        return took

    took = asyncio.run(work())
    scsi = {"driver": "scsi-hd", "bus": "host1.0"}
    device = scsi if bus is Bus.SCSI else {"driver": "virtio-blk-pci"}
    vm.qmp("device_add", id="vd1", drive="disk1", **device)
    vm.wait_for_acks(100)  # it finds the disk meanwhile
    return took
