"""Real guests: QEMU with the disks of vm-images/build.py, whose writer keeps `records.py` fed.

A `VM` has one command line for its life.  `kill` pulls its plug, `start` boots it again by
the same command line, as an operator's supervisor does, and the logs go on where they were.
No QEMU outlives the process (thread, to be exact) that started it, nor the `with` block.

    PROMOTER_TEST_QEMU   the QEMU to run, default qemu-system-x86_64 of PATH
    PROMOTER_TEST_ACCEL  tcg or kvm, default: kvm if a guest boots with it, else tcg
    PROMOTER_TEST_GUEST  cirros for the guest made of CirrOS, which boots by itself
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.records import Ack, read_acks

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "vm-images" / "build.py"
QEMUS = ROOT / ".qemu"  # of ci/qemu
KERNEL = "console=ttyS0 quiet panic=-1 no_timer_check cryptomgr.notests mitigations=off"
NICE = ("nice", "-n", "10")  # a busy guest leaves the processor to what is tested
MIB = 1 << 20
SPARE_OFFSET = 176 * MIB  # of `base`: behind the partitions, 16 MiB that the guest never touches
AGENT = "org.qemu.guest_agent.0"  # the name of its channel
KEY = "secret,id=key,data=open-sesame"
BOOT_TIMEOUT_S = 60.0
TRIAL_TIMEOUT_S = 20.0


class QMPError(Exception):
    """QEMU refused a command.  `kind` is QMP's error class, `desc` its sentence."""

    def __init__(self, kind: str, desc: str) -> None:
        super().__init__(f"{kind}: {desc}")
        self.kind, self.desc = kind, desc


class GuestDied(Exception):
    """QEMU ended by itself; the message has what it said and the end of the console."""


class Style(Enum):
    """How a disk is given to QEMU."""

    NODES = "nodes"  # -blockdev for the file and one for the format, which names it
    INLINE = "inline"  # one -blockdev, the file inside it, without a name
    DRIVE = "drive"  # -drive if=none


class Bus(Enum):
    """What a disk hangs on."""

    VIRTIO = "virtio-blk"
    SCSI = "virtio-scsi"
    SATA = "ahci"
    NVME = "nvme"


ROOTS = {  # where the guest finds the root file system, if the first disk hangs there
    Bus.VIRTIO: "/dev/vda1",
    Bus.SCSI: "/dev/sda1",
    Bus.SATA: "/dev/sda1",
    Bus.NVME: "/dev/nvme0n1p1",
}


@dataclass(frozen=True)
class Disk:
    """An image that a guest has; `options` are the format node's, `device` the device's.

    With `iops` the disk is throttled: in Style.DRIVE by -drive, else by a filter node above
    the image.  With `iothread` the disk (Bus.SCSI: its host) has one of its own.
    """

    path: Path
    fmt: str = "qcow2"
    style: Style = Style.NODES
    bus: Bus = Bus.VIRTIO
    options: str = ""
    device: str = ""
    iops: int = 0
    iothread: bool = False


def wait_for(condition: Callable[[], bool], what: str, timeout: float) -> None:
    """Returns when `condition()` is true; TimeoutError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(0.01)


def ack_count(log: Path) -> int:
    """How many records the writer of this log has acknowledged."""
    return log.read_bytes().count(b"\nA ") if log.exists() else 0


# --- images --------------------------------------------------------------------------------


@functools.cache
def images() -> Path:
    """The directory of the guest's images, built if they are not there."""
    command = [sys.executable, str(BUILD), "auto"]
    return Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout[:-1])


def base() -> Path:
    """The base image of the guest: read-only, shared by all tests."""
    return images() / "base.qcow2"


def qemu_img(*words: object) -> str:
    command = ["qemu-img", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def blank(path: Path, size: int, fmt: str = "qcow2") -> Path:
    """An empty image of `size` bytes, for another disk."""
    qemu_img("create", "-q", "-f", fmt, path, size)
    return path


def linked_clone(
    backing: Path | str, path: Path, *, backing_fmt: str = "qcow2", **options: str
) -> Path:
    """An overlay on `backing`; `options` are qcow2's, e.g. cluster_size="4k"."""
    create = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    qemu_img("create", "-q", "-f", "qcow2", "-b", backing, "-F", backing_fmt, *create, path)
    return path


def encrypted_clone(backing: Path, path: Path) -> Path:
    """An overlay whose own clusters are encrypted by LUKS; QEMU needs `-object` KEY."""
    luks = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "--object", KEY, "-o", luks]
    command += ["-b", str(backing), "-F", "qcow2", str(path)]
    # On a busy machine it says "Unable to get accurate CPU usage" now and then.
    wait_for(lambda: subprocess.run(command).returncode == 0, "qemu-img to measure the CPU", 60)
    return path


def chain(directory: Path, depth: int, root: Path | None = None) -> list[Path]:
    """An overlay over `depth` layers: `root` (default `base`) and depth - 1 deltas.

    From the lowest to the active one.  Layer n, the active one too, holds 1 MiB of the byte
    n at MiB n of the spare area of `base`, so each has data that no other has.
    """
    layers = [root or base()]
    for number in range(1, depth + 1):
        layers.append(linked_clone(layers[-1], directory / f"layer{number}.qcow2"))
        pattern = f"write -q -P {number} {SPARE_OFFSET + number % 16 * MIB} 1M"
        subprocess.run(["qemu-io", "-c", pattern, str(layers[-1])], check=True)
    return layers


@contextlib.contextmanager
def file_system(kind: str, directory: Path, size: int) -> Iterator[Path]:
    """A new file system, mounted, in a sparse file of `directory`; for root."""
    image, mounted = directory / f"{kind}.img", directory / kind
    with image.open("wb") as file:
        file.truncate(size)
    mounted.mkdir()
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mounted], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True)
        image.unlink()


# --- which QEMU -----------------------------------------------------------------------------


def other_qemu(name: str) -> Path:
    """The directory of a QEMU of ci/qemu and its tools, to be first in PATH.

    Skips the test where it could not be had.
    """
    if not (found := QEMUS / name / "bin").is_dir():
        said = QEMUS / f"why-no-{name}"
        why = said.read_text().strip() if said.exists() else "ci/setup was not run"
        pytest.skip(f"no {name} QEMU: {why}")
    return found


# --- the accelerator -----------------------------------------------------------------------


@functools.cache
def accelerator() -> str:
    """tcg or kvm, see above; the trial is made once per boot of this machine."""
    if chosen := os.environ.get("PROMOTER_TEST_ACCEL"):
        return chosen
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    known = Path(tempfile.gettempdir()) / f"promoter-test-accelerator-{boot}"
    if not known.exists():
        with tempfile.NamedTemporaryFile("w", dir=known.parent, delete=False) as found:
            found.write("kvm" if kvm_works() else "tcg")
        Path(found.name).rename(known)
    return known.read_text()


def kvm_works() -> bool:
    """Whether a guest really writes under KVM; /dev/kvm alone promises nothing."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    with tempfile.TemporaryDirectory() as name:
        disk = Disk(linked_clone(base(), Path(name) / "disk.qcow2"))
        try:
            with VM(Path(name), [disk], accel="kvm") as vm:
                vm.wait_for_acks(1, TRIAL_TIMEOUT_S)
        except (GuestDied, TimeoutError):
            return False
    return True


# --- the command line ----------------------------------------------------------------------


def blockdev_arguments(disk: Disk, index: int) -> list[str]:
    options = f",{disk.options}" if disk.options else ""
    if disk.style is Style.DRIVE:
        options += f",throttling.iops-total={disk.iops}" if disk.iops else ""
        return ["-drive", f"if=none,id=disk{index},format={disk.fmt},file={disk.path}{options}"]
    node = f"driver={disk.fmt},node-name=disk{index}{options}"
    file = f"driver=file,filename={disk.path},auto-read-only=on"
    if disk.style is Style.NODES:
        below = f"file{index}"
        words = ["-blockdev", f"{file},node-name={below}", "-blockdev", f"{node},file={below}"]
    else:
        inline = ",".join(f"file.{option}" for option in file.split(","))
        words = ["-blockdev", f"{node},{inline}"]
    return words + (throttle_arguments(disk.iops, index) if disk.iops else [])


def throttle_arguments(iops: int, index: int) -> list[str]:
    group = f"throttle-group,id=limit{index},x-iops-total={iops}"
    node = f"driver=throttle,node-name=throttle{index},throttle-group=limit{index}"
    return ["-object", group, "-blockdev", f"{node},file=disk{index}"]


def drive(disk: Disk, index: int) -> str:
    """What the disk's device is plugged into."""
    throttled = disk.iops and disk.style is not Style.DRIVE
    return f"throttle{index}" if throttled else f"disk{index}"


def device_arguments(disk: Disk, index: int) -> list[str]:
    more = f",{disk.device}" if disk.device else ""
    tail = f"drive={drive(disk, index)},id=vd{index}{more}"
    own = ["-object", f"iothread,id=io{index}"] if disk.iothread else []
    runs_in = f",iothread=io{index}" if disk.iothread else ""
    match disk.bus:
        case Bus.VIRTIO:
            return [*own, "-device", f"virtio-blk-pci,{tail}{runs_in}"]
        case Bus.SCSI:
            host = f"virtio-scsi-pci,id=host{index}{runs_in}"
            return [*own, "-device", host, "-device", f"scsi-hd,bus=host{index}.0,{tail}"]
        case Bus.SATA:
            host = f"ahci,id=host{index}"
            return ["-device", host, "-device", f"ide-hd,bus=host{index}.0,{tail}"]
        case Bus.NVME:
            return ["-device", f"nvme,serial=disk{index},{tail}"]


def boot_arguments(bus: Bus) -> list[str]:
    """Boots the kernel and its command line; a guest without a kernel of its own boots alone."""
    kernel = images() / "vmlinux"
    if not kernel.exists():
        return []
    line = f"{KERNEL} root={ROOTS[bus]}"
    return ["-kernel", str(kernel), "-initrd", str(images() / "initrd"), "-append", line]


def words_arguments(words: str) -> list[str]:
    """What the guest reads beside its kernel's command line; always of one length."""
    return ["-fw_cfg", f"name=opt/promoter,string={words:<128}"]


def channel_arguments(path: Path) -> list[str]:
    chardev = f"socket,id=agent,path={path},server=on,wait=off"
    port = f"virtserialport,chardev=agent,name={AGENT}"
    return ["-device", "virtio-serial-pci", "-chardev", chardev, "-device", port]


def serial(name: str, path: Path) -> list[str]:
    return ["-chardev", f"file,id={name},path={path},append=on", "-serial", f"chardev:{name}"]


# --- the machine ---------------------------------------------------------------------------


class Monitor:
    """A synchronous QMP client.  `events` are those that came before the last reply."""

    def __init__(self, path: Path) -> None:
        self.events: list[dict[str, Any]] = []
        with contextlib.ExitStack() as opened:
            self._socket = opened.enter_context(socket.socket(socket.AF_UNIX))
            self._socket.settimeout(60)
            self._socket.connect(str(path))
            self._replies = opened.enter_context(self._socket.makefile())
            self._replies.readline()
            self.execute("qmp_capabilities", {})
            self.close = opened.pop_all().close

    def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        words = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(words).encode())
        while line := self._replies.readline():
            reply = json.loads(line)
            if "error" in reply:
                raise QMPError(reply["error"]["class"], reply["error"]["desc"])
            if "return" in reply:
                return reply["return"]
            self.events.append(reply)
        raise ConnectionResetError(f"QEMU closed its monitor during {command}")


def can_be_saved(accel: str, disks: Sequence[Disk]) -> bool:
    """NVMe cannot be migrated, and with SATA goes what the firmware has seen of the disk."""
    here = (images() / "vmlinux").exists() and accel == "tcg"
    return here and all(disk.bus in (Bus.VIRTIO, Bus.SCSI) for disk in disks)


def saved_state(machine: str, save: Callable[[Path, Path], None]) -> Path:
    """The file with the state of a machine; `save(directory, file)` makes it, for the first
    who asks."""
    saved = images() / "states" / hashlib.sha256(machine.encode()).hexdigest()[:16]
    saved.parent.mkdir(exist_ok=True)
    with saved.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not saved.exists():
            with tempfile.TemporaryDirectory(prefix="saved-", dir="/tmp") as directory:
                save(Path(directory), part := saved.with_suffix(".part"))
            part.rename(saved)
    return saved


def wait_until_saveable(console: Path) -> None:
    """Waits for the word of vm-images/initramfs."""
    ready = b"ready to be saved"
    wait_for(lambda: console.exists() and ready in console.read_bytes(), "it", BOOT_TIMEOUT_S)


@dataclass(frozen=True)
class Machine:
    """A guest but for its images, and its state before it has looked at a disk.

    To boot that far is most of a guest's time under TCG, and all guests of one machine do the
    same until then.
    """

    qemu: str
    accel: str
    disks: tuple[Disk, ...]
    channel: bool

    def arguments(self, console: Path, agent: Path) -> list[str]:
        """All that comes before the disks, but the second serial port."""
        return [
            self.qemu, "-nodefaults", "-display", "none", "-no-reboot", "-m", "256",
            "-accel", self.accel, *boot_arguments(self.disks[0].bus),
            *(channel_arguments(agent) if self.channel else []), *serial("console", console),
        ]  # fmt: skip

    def state(self) -> Path:
        """The file that has it; made by the first who asks."""
        program = Path(shutil.which(self.qemu) or self.qemu).resolve()
        words = [program, program.stat().st_mtime_ns, *self._stand_in(Path())]
        return saved_state(repr(words), self._save)

    def _stand_in(self, directory: Path) -> list[str]:
        """The command line of one whose disks are empty, and which waits."""
        words = self.arguments(directory / "console", directory / "agent")
        words += ["-qmp", f"unix:{directory}/qmp,server=on,wait=off", "-serial", "null"]
        words += words_arguments("hold")
        for index, disk in enumerate(self.disks):
            node = f"driver=null-co,size={256 * MIB},node-name={drive(disk, index)}"
            words += ["-blockdev", node, *device_arguments(disk, index)]
        return words

    def _save(self, directory: Path, target: Path) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", *self._stand_in(directory)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
            try:
                wait_for((directory / "qmp").exists, "QEMU's monitor", 30)
                wait_until_saveable(directory / "console")
                with contextlib.closing(Monitor(directory / "qmp")) as monitor:
                    monitor.execute("migrate", {"uri": f"exec:cat > {target}"})
                    ask = functools.partial(monitor.execute, "query-migrate", {})
                    wait_for(lambda: ask()["status"] == "completed", "the saved state", 60)
            finally:
                process.kill()


class VM:
    """A guest with its disks, `disk0` on device `vd0` and so on; boots from the first.

    In a `with` block it runs from the beginning; leaving the block kills it.  `writer` are
    the writer's parameters: seed, lanes, rate (records per second and lane, 0 without
    limit), dev (in the guest, default the second partition of the first disk), trim (discard
    what the root file system does not use, every second), agent (start the guest agent, whose
    freeze takes so many seconds longer).  With `channel` it has one for that.
    `monitor` is the socket that is promoter's, `agent` the channel's; `qmp` uses another one.
    """

    def __init__(
        self,
        directory: Path,
        disks: Sequence[Disk],
        *,
        writer: dict[str, object] | None = None,
        extra: Sequence[str] = (),
        accel: str | None = None,
        channel: bool = False,
    ) -> None:
        self.directory, self.disks = directory, tuple(disks)
        self.console, self.log = directory / "console.log", directory / "acks.log"
        self.stderr = directory / "qemu.log"
        # Not in the directory: a socket's path has at most 107 bytes.
        self._sockets = Path(tempfile.mkdtemp(prefix="vm-", dir="/tmp"))
        self.monitor, self.agent = self._sockets / "monitor.sock", self._sockets / "agent.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self._other: Monitor | None = None
        words = " ".join(f"writer.{name}={value}" for name, value in (writer or {}).items())
        machine = Machine(
            os.environ.get("PROMOTER_TEST_QEMU", "qemu-system-x86_64"),
            accel or accelerator(),
            self.disks,
            channel,
        )
        saved = can_be_saved(machine.accel, self.disks) and not extra
        self._saved = machine if saved else None
        self.argv: tuple[str, ...] = (
            *machine.arguments(self.console, self.agent),
            "-qmp", f"unix:{self.monitor},server=on,wait=off",
            "-qmp", f"unix:{self._sockets}/other.sock,server=on,wait=off",
            *serial("acks", self.log), *words_arguments(words), *extra,
        )  # fmt: skip
        for index, disk in enumerate(disks):
            self.argv += (*blockdev_arguments(disk, index), *device_arguments(disk, index))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
        shutil.rmtree(self._sockets)

    @property
    def command(self) -> tuple[str, ...]:
        """What runs QEMU: from a saved state where there can be one, else `argv`."""
        saved = ("-incoming", f"exec:cat {self._saved.state()}") if self._saved else ()
        return *self.argv, *saved

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Runs QEMU; its monitors answer when this returns.  Raises GuestDied."""
        assert not self.running
        for stale in self._sockets.iterdir():
            stale.unlink()
        with self.stderr.open("ab") as stderr:
            command = (*NICE, "setpriv", "--pdeathsig", "KILL", *self.command)
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr
            )
        try:
            self._wait_for(self._connected, "QEMU's monitor", 30)
            self._wait_for(self._goes_on, "the saved state", 30)
        except BaseException:
            self.kill()
            raise

    def _connected(self) -> bool:
        try:
            self._other = Monitor(self._sockets / "other.sock")
        except (FileNotFoundError, ConnectionError):
            return False
        return True

    def _goes_on(self) -> bool:
        return bool(self.qmp("query-status")["status"] != "inmigrate")

    def kill(self) -> None:
        """Pulls the plug: SIGKILL, and waits until the process is gone."""
        if self._process is not None:
            self._process.kill()
        self.wait()

    def wait(self, timeout: float | None = 60) -> None:
        """Waits until QEMU has ended."""
        if self._process is not None:
            self._process.wait(timeout)
        if self._other is not None:
            self._other.close()
            self._other = None

    def shutdown(self, timeout: float = 60) -> None:
        """Presses the power button and waits; the guest syncs and powers itself off."""
        self.qmp("system_powerdown")
        self.wait(timeout)

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Executes a command as somebody else than promoter; `_` in names becomes `-`.

        Raises QMPError, or ConnectionResetError when QEMU is gone.
        """
        assert self._other is not None
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._other.execute(command, named)

    def events(self, name: str) -> list[dict[str, Any]]:
        """QEMU's events of one name, until the last command's reply."""
        assert self._other is not None
        return [event for event in self._other.events if event["event"] == name]

    @property
    def address(self) -> list[object]:
        """How promoter is told of this guest."""
        return [self.monitor]

    def pause(self) -> None:
        self.qmp("stop")

    def cont(self) -> None:
        self.qmp("cont")

    @property
    def paused(self) -> bool:
        return bool(self.qmp("query-status")["status"] == "paused")

    def files(self) -> list[str]:
        """The file of each disk, as QEMU has it."""
        return [entry["inserted"]["file"] for entry in self.qmp("query-block")]

    def acks(self) -> list[Ack]:
        """What the writer said so far, over all runs."""
        return read_acks(self.log) if self.log.exists() else []

    def wait_for_acks(self, count: int = 1, timeout: float = BOOT_TIMEOUT_S) -> None:
        """Waits for `count` records more.  Raises GuestDied, or TimeoutError."""
        wanted = ack_count(self.log) + count
        self._wait_for(lambda: ack_count(self.log) >= wanted, f"{count} more records", timeout)

    def _wait_for(self, condition: Callable[[], bool], what: str, timeout: float) -> None:
        try:
            wait_for(lambda: condition() or not self.running, what, timeout)
        except TimeoutError as error:
            error.add_note(self._last_words())
            raise
        if not self.running:
            raise GuestDied(f"no {what}: QEMU ended\n{self._last_words()}")

    def _last_words(self) -> str:
        logs = [log for log in (self.stderr, self.console) if log.exists()]
        return "\n".join(log.read_text(errors="replace")[-2000:] for log in logs)
