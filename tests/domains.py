"""Real libvirt domains with the disks of vm.py, under a libvirtd that the tests start.

Without systemd, as root, in a mount namespace where libvirt's directories are empty and its
own: a libvirtd of this machine and its domains are neither seen nor touched.
"""

import json
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import libvirt

from tests.vm import (
    AGENT,
    BOOT_TIMEOUT_S,
    KERNEL,
    MIB,
    NICE,
    ROOT,
    ROOTS,
    Bus,
    Disk,
    accelerator,
    ack_count,
    blank,
    can_be_saved,
    images,
    qemu_img,
    saved_state,
    wait_for,
    wait_until_saveable,
)

ENTER = """
set -e
mount --make-rprivate /
for directory in /run /var/lib /var/log /var/cache /etc; do
    mkdir -p $directory/libvirt
    mount -t tmpfs none $directory/libvirt
done
mkdir /var/lib/libvirt/qemu
cp qemu.conf /etc/libvirt/
exec sleep infinity
"""
DAEMON = """
unix_sock_dir = "{sockets}"
auth_unix_rw = "none"
log_outputs = "2:stderr"
"""
QEMU = """
user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""
BOTH = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
BUSES = {Bus.VIRTIO: ("virtio", "vd"), Bus.SCSI: ("scsi", "sd"), Bus.SATA: ("sata", "sd")}


class Libvirtd:
    """A libvirtd of its own, from entering the `with` block on; `uri` is for promoter."""

    def __init__(self, directory: Path, listen: str = "") -> None:
        """`listen` are the lines of its configuration by which it can be reached over TCP."""
        self.directory, self._listen = directory, listen
        # Not in the directory: a socket's path has at most 107 bytes.
        self._sockets = Path(tempfile.mkdtemp(prefix="libvirt-", dir="/tmp"))
        self.socket = self._sockets / "libvirt-sock"
        self.uri = f"qemu+unix:///system?socket={self.socket}"
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        (self.directory / "qemu.conf").write_text(QEMU)
        config = DAEMON.format(sockets=self._sockets) + self._listen
        (self.directory / "libvirtd.conf").write_text(config)
        self._holder = self.run("unshare", "--mount", "bash", "-c", ENTER)
        wait_for(self._is_ready, "the mount namespace", 10)
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self.connect() as connection:
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                domain.destroy()
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        shutil.rmtree(self._sockets)

    def _is_ready(self) -> bool:
        return Path(f"/proc/{self._holder.pid}/comm").read_text() == "sleep\n"

    def run(self, *command: str) -> subprocess.Popen[bytes]:
        """A process that ends with the daemon's block; what it prints is in the log."""
        with (self.directory / "libvirtd.log").open("ab") as log:
            process = subprocess.Popen(
                ("setpriv", "--pdeathsig", "KILL", *command),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._processes.append(process)
        return process

    def start(self) -> None:
        """Runs the daemon; it answers when this returns."""
        config = ("-f", str(self.directory / "libvirtd.conf"))
        self._daemon = self.run(
            *(*NICE, *self.enter, "libvirtd", *config, "-p", str(self._sockets / "pid")),
            *["--listen"] * bool(self._listen),
        )
        wait_for(self._answers, "libvirtd", 30)

    @property
    def enter(self) -> tuple[str, ...]:
        return ("nsenter", "--target", str(self._holder.pid), "--mount")

    @contextmanager
    def seeing(self, directory: Path, at: Path) -> Iterator[None]:
        """The daemon and its QEMUs see `directory` as `at`, which here is something else."""
        self._mount("--bind", directory, at)
        yield
        subprocess.run([*self.enter, "umount", "--lazy", at], check=True)

    @contextmanager
    def small(self, directory: Path, size: str) -> Iterator[None]:
        """The daemon and its QEMUs have a file system of this size there."""
        self._mount("-t", "tmpfs", "-o", f"size={size}", "none", directory)
        yield
        subprocess.run([*self.enter, "umount", "--lazy", directory], check=True)

    def grow(self, directory: Path, size: str) -> None:
        self._mount("-o", f"remount,size={size}", directory)

    def _mount(self, *words: object) -> None:
        subprocess.run([*self.enter, "mount", *map(str, words)], check=True)

    @property
    def pid(self) -> int:
        return self._daemon.pid

    def restart(self) -> None:
        """Waits for the daemon's end and runs it again."""
        self._daemon.wait(60)
        self.start()

    def _answers(self) -> bool:
        try:
            self.connect().close()
        except libvirt.libvirtError:
            return False
        return True

    def log(self) -> str:
        """The last lines that the daemon wrote."""
        return "\n".join((self.directory / "libvirtd.log").read_text().splitlines()[-20:])

    def connect(self) -> libvirt.virConnect:
        """A connection that is the tests' own."""
        return libvirt.open(self.uri)


class Domain:
    """A persistent domain that runs from entering the `with` block on, until leaving it."""

    def __init__(
        self,
        libvirtd: Libvirtd,
        directory: Path,
        disks: Sequence[Disk],
        name: str = "web01",
        emulator: Path | None = None,
        pool: str = "",
        spelled_out: bool = False,
        agent: int | None = None,
        boots: bool = False,
    ) -> None:
        """In the definition the disks are volumes of the `pool`, or all of their chain is
        `spelled_out`.  With `agent` there is a guest agent, whose freeze takes so many seconds
        longer.  At first it goes on from a saved state (see vm.Machine), unless it `boots`.
        """
        self._agent = agent
        self._emulator = f"<emulator>{emulator}</emulator>" if emulator else ""
        self.libvirtd, self.disks = libvirtd, tuple(disks)
        self._pool, self._spelled_out = pool, spelled_out
        self._boots = boots or not can_be_saved(accelerator(), self.disks)
        self.name, self.uuid = name, uuid.uuid4() if self._boots else _uuid(name)
        self.console, self.log = directory / "console.log", directory / "acks.log"

    def __enter__(self) -> Self:
        self._connect()
        self.define()
        try:
            if self._boots:
                self.start()
            else:
                self._connection.restoreFlags(str(self._state()), self.xml())
        except libvirt.libvirtError:
            self.domain.undefine()
            raise
        return self

    def _connect(self) -> None:
        self._daemon = self.libvirtd.pid
        self._connection = self.libvirtd.connect()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
        self.domain.undefineFlags(
            libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        )
        self._connection.close()

    @property
    def address(self) -> list[object]:
        """How promoter is told of this guest."""
        return [self.name, "--connect", self.libvirtd.uri]

    def start(self) -> None:
        """Boots it as it is defined now."""
        self.domain.create()

    def _state(self) -> Path:
        return saved_state(self._stand_in(Path()), self._save)

    def _save(self, directory: Path, target: Path) -> None:
        for index, disk in enumerate(self.disks):
            blank(directory / f"disk{index}", 256 * MIB, disk.fmt)
        stand_in = self._connection.createXML(self._stand_in(directory))
        try:
            wait_until_saveable(directory / self.console.name)
            stand_in.save(str(target))
        except BaseException:
            stand_in.destroy()
            raise

    def _stand_in(self, directory: Path) -> str:
        """The definition of one whose disks are empty, and which waits."""
        disks = [replace(d, path=directory / f"disk{i}") for i, d in enumerate(self.disks)]
        return self._xml("".join(map(_disk, disks, count())), directory, "hold")

    def kill(self) -> None:
        """Pulls its plug."""
        if self.domain.isActive():
            self.domain.destroy()

    def pause(self) -> None:
        self.domain.suspend()

    def cont(self) -> None:
        self.domain.resume()

    @property
    def paused(self) -> bool:
        return bool(self.domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED)

    def files(self) -> list[str]:
        """The file of each disk, as libvirt has it."""
        return [source.get("file", "") for source in self._sources(0)]

    def next_boot(self) -> list[str]:
        """The file of each disk, as it is defined."""
        return [s.get("file", "") for s in self._sources(libvirt.VIR_DOMAIN_XML_INACTIVE)]

    def _sources(self, flags: int) -> list[Element]:
        return ElementTree.fromstring(self.domain.XMLDesc(flags)).findall("devices/disk/source")

    def define(self) -> None:
        """Gives libvirt the domain's definition, once more if need be."""
        try:
            self._connection.defineXML(self.xml())
        except libvirt.libvirtError as error:
            error.add_note(self.libvirtd.log())  # it may know a cause that libvirt does not tell
            raise

    def plug(self, disk: Disk) -> str:
        """Gives the running domain one more disk; its target."""
        self.domain.attachDeviceFlags(_disk(disk, len(self.files())), BOTH)
        targets = ElementTree.fromstring(self.domain.XMLDesc(0)).findall("devices/disk/target")
        return targets[-1].get("dev", "")

    def unplug(self, target: str) -> None:
        """Takes a disk away and waits until the guest has let it go."""
        left = len(self.files()) - 1
        disk = f"<disk type='file' device='disk'><target dev='{target}'/></disk>"
        self.domain.detachDeviceFlags(disk, BOTH)
        wait_for(lambda: len(self.files()) == left, f"the guest to let {target} go", 60)

    @property
    def domain(self) -> libvirt.virDomain:
        if self._daemon != self.libvirtd.pid:
            self._connect()
        return self._connection.lookupByName(self.name)

    def wait_for_acks(self, count: int, timeout: float = BOOT_TIMEOUT_S) -> None:
        """Waits for `count` records more."""
        wanted = ack_count(self.log) + count
        wait_for(lambda: ack_count(self.log) >= wanted, f"{count} more records", timeout)

    def shutdown(self, timeout: float = 60) -> None:
        """Presses the power button and waits."""
        self.domain.shutdown()
        wait_for(lambda: not self.domain.isActive(), "the guest to power off", timeout)

    def xml(self) -> str:
        """The domain's definition; its first disk boots."""
        disks = "".join(
            _disk(disk, index, self._pool, spelled_out=self._spelled_out)
            for index, disk in enumerate(self.disks)
        )
        return self._xml(disks, self.console.parent, "boot")

    def _xml(self, disks: str, logs: Path, word: str) -> str:
        boot, console, log = images(), logs / self.console.name, logs / self.log.name
        scsi = any(disk.bus is Bus.SCSI for disk in self.disks)
        iothreads = int(any(disk.iothread for disk in self.disks))
        runs_in = "<driver iothread='1'/>" if iothreads else ""
        host = f"<controller type='scsi' model='virtio-scsi'>{runs_in}</controller>" * scsi
        line = f"{KERNEL} root={ROOTS[self.disks[0].bus]}"
        channel = f"<channel type='unix'><target type='virtio' name='{AGENT}'/></channel>"
        if self._agent is None:
            channel = ""
        else:
            line += f" writer.agent={self._agent}"
        kind = "qemu" if accelerator() == "tcg" else "kvm"
        return f"""
<domain type="{kind}">
  <name>{self.name}</name><uuid>{self.uuid}</uuid>
  <memory unit="MiB">256</memory><iothreads>{iothreads}</iothreads>
  <os>
    <type arch="x86_64">hvm</type>
    <kernel>{boot}/vmlinux</kernel><initrd>{boot}/initrd</initrd>
    <cmdline>{line} writer.rate=0</cmdline>
  </os>
  <sysinfo type="fwcfg"><entry name="opt/promoter">{word}</entry></sysinfo>
  <features><acpi/></features>
  <devices>
    {self._emulator}
    {host}{disks}
    <serial type="file"><source path="{console}" append="on"/><target port="0"/></serial>
    <serial type="file"><source path="{log}" append="on"/><target port="1"/></serial>
    {channel}
    <memballoon model="none"/>
  </devices>
</domain>"""


def _uuid(name: str) -> uuid.UUID:
    """Of a domain whose state is saved: nobody else's who runs tests here at the same time."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{ROOT} {worker} {name}")


def _disk(disk: Disk, index: int, pool: str = "", *, spelled_out: bool = False) -> str:
    bus, prefix = BUSES[disk.bus]
    kind, source = "file", f"<source file='{disk.path}'/>"
    if pool:
        kind, source = "volume", f"<source pool='{pool}' volume='{disk.path.name}'/>"
    elif disk.path.is_block_device():
        kind, source = "block", f"<source dev='{disk.path}'/>"
    runs_in = "iothread='1'" if disk.iothread and disk.bus is Bus.VIRTIO else ""
    return f"""
    <disk type="{kind}" device="disk">
      <driver name="qemu" type="{disk.fmt}" {runs_in}/>
      {source}{_below(disk.path) if spelled_out else ""}
      <target dev="{prefix}{chr(ord("a") + index)}" bus="{bus}"/>
    </disk>"""


def _below(path: Path) -> str:
    """The chain under an image, spelled out."""
    found = json.loads(qemu_img("info", "-U", "--output=json", path))
    if not (name := found.get("full-backing-filename")):
        return "<backingStore/>"
    kind = f"<format type='{found['backing-filename-format']}'/><source file='{name}'/>"
    return f"<backingStore type='file'>{kind}{_below(Path(name))}</backingStore>"
