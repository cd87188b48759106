"""What can go wrong while promoter stands still between two steps, each done by the test itself.

`tests.struck` stops promoter at a point; then a fault happens here, for real, and promoter goes on,
if it still can. `Scene` is where: a guest, its files, and the file systems that can fail.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.domains import Domain, Libvirtd
from tests.vm import MIB, VM, wait_for

SHUT_DOWN = 0x8004587D  # FS_IOC_SHUTDOWN: from now on everything fails with EIO
AT_ONCE = struct.pack("I", 2)  # and what was not flushed is lost
PIDFD_OPEN, PIDFD_GETFD = 434, 438
GOES = 20.0  # seconds for a guest to power off; one that stands still does not

Guest = VM | Domain


class FileSystem:
    """An ext4 of its own, seen by libvirtd too, which can be filled, broken or taken away."""

    def __init__(self, directory: Path, libvirtd: Libvirtd | None) -> None:
        self.directory = directory
        self._image = directory.with_suffix(".ext4")
        self._enter = [[], list(libvirtd.enter)] if libvirtd else [[]]
        self._device, self._number = "", 0

    def __enter__(self) -> Self:
        with self._image.open("wb") as file:
            file.truncate(700 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", self._image], check=True)
        command = ["losetup", "--find", "--show", str(self._image)]
        self._device = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        self._device = self._device.strip()
        self.directory.mkdir()
        self.mount()
        return self

    def __exit__(self, *_: object) -> None:
        self.unmount()
        subprocess.run(["losetup", "--detach", self._device], check=True)
        self._image.unlink()

    def mount(self) -> None:
        for enter in self._enter:
            mount = [*enter, "mount", self._device, str(self.directory)]
            subprocess.run(mount, check=True)
        self._number = self.directory.stat().st_dev

    def unmount(self) -> None:
        """Also while somebody has files of it open."""
        for enter in self._enter:
            subprocess.run([*enter, "umount", "--lazy", str(self.directory)], check=False)

    def fill(self) -> None:
        with self._filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(MIB)):
                pass
        with self._filler.open("ab", buffering=0) as file, suppress(OSError):
            while file.write(bytes(512)):
                pass

    def make_room(self) -> None:
        self._filler.unlink(missing_ok=True)

    @property
    def _filler(self) -> Path:
        return self.directory / "filler"

    def break_down(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUT_DOWN, AT_ONCE)
        finally:
            os.close(fd)

    def is_used(self) -> bool:
        """Does somebody have a file of it open, after `unmount`?"""
        for file in Path("/proc").glob("[0-9]*/fd/*"):
            with suppress(OSError):
                if file.stat().st_dev == self._number:
                    return True
        return False


class Scene:
    """A guest and what promoter does to it, as far as faults need it."""

    def __init__(
        self,
        guest: Guest,
        libvirtd: Libvirtd | None,
        lower: Path,
        base: Path,
        target: FileSystem | None,
        source: FileSystem | None,
    ) -> None:
        self.guest, self.libvirtd = guest, libvirtd
        self.lower, self.base = lower, base
        self.target, self.source = target, source
        self.promoter: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """promoter's."""
        assert self.promoter
        return self.promoter.pid

    @property
    def qemu(self) -> int:
        if isinstance(self.guest, VM):
            return self.guest.pid
        wanted = str(self.guest.uuid).encode()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if b"-uuid" in words and wanted in words:
                    return int(process.name)
        raise AssertionError("it runs")

    def is_gone(self) -> bool:
        guest = self.guest
        return not (guest.running if isinstance(guest, VM) else guest.domain.isActive())

    def wait_until_gone(self) -> None:
        with suppress(TimeoutError):  # one that stands still does not power off
            wait_for(self.is_gone, "the guest's end", GOES)
            if isinstance(self.guest, VM):
                self.guest.wait()


# --- the faults ------------------------------------------------------------------------------


def kill_promoter(scene: Scene) -> None:
    os.kill(scene.pid, signal.SIGKILL)


def terminate_promoter(scene: Scene) -> None:
    os.kill(scene.pid, signal.SIGTERM)


def interrupt_promoter(scene: Scene) -> None:
    os.kill(scene.pid, signal.SIGINT)


def kill_qemu(scene: Scene) -> None:
    os.kill(scene.qemu, signal.SIGKILL)
    scene.wait_until_gone()


def kill_both(scene: Scene) -> None:
    kill_promoter(scene)
    kill_qemu(scene)


def quit_qemu(scene: Scene) -> None:
    if isinstance(scene.guest, VM):
        with suppress(ConnectionError):
            scene.guest.qmp("quit")
    else:
        scene.guest.domain.destroy()
    scene.wait_until_gone()


def power_off(scene: Scene) -> None:
    if isinstance(scene.guest, VM):
        scene.guest.qmp("system_powerdown")
    else:
        scene.guest.domain.shutdown()
    scene.wait_until_gone()


def reset(scene: Scene) -> None:
    if isinstance(scene.guest, VM):
        scene.guest.qmp("set-action", reboot="reset")
        scene.guest.qmp("system_reset")
    else:
        scene.guest.domain.reset()


def pause(scene: Scene) -> None:
    scene.guest.pause()


def kill_libvirtd(scene: Scene) -> None:
    assert scene.libvirtd
    os.kill(scene.libvirtd.pid, signal.SIGKILL)


def cut_monitor(scene: Scene) -> None:
    """Shut down each connection of promoter's to the guest's monitor, or to libvirtd."""
    libc = ctypes.CDLL(None, use_errno=True)
    path = scene.libvirtd.socket if scene.libvirtd else None
    if isinstance(scene.guest, VM):
        path = scene.guest.monitor
    process = libc.syscall(PIDFD_OPEN, scene.pid, 0)
    try:
        for opened in Path(f"/proc/{scene.pid}/fd").iterdir():
            if not str(opened.readlink()).startswith("socket:"):
                continue
            taken = libc.syscall(PIDFD_GETFD, process, int(opened.name), 0)
            with socket.socket(fileno=taken) as found, suppress(OSError):
                if found.family == socket.AF_UNIX and found.getpeername() == str(path):
                    found.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(process)


def fill_target(scene: Scene) -> None:
    assert scene.target
    scene.target.fill()


def break_target(scene: Scene) -> None:
    assert scene.target
    scene.target.break_down()


def unmount_target(scene: Scene) -> None:
    assert scene.target
    scene.target.unmount()


def break_source(scene: Scene) -> None:
    assert scene.source
    scene.source.break_down()


def delete_base(scene: Scene) -> None:
    """Somebody has removed it, and has it back from his backup later."""
    shutil.copyfile(scene.base, scene.base.with_suffix(".saved"))
    scene.base.unlink()


FAULTS: dict[str, Callable[[Scene], None]] = {
    "SIGKILL promoter": kill_promoter,
    "SIGTERM promoter": terminate_promoter,
    "SIGINT promoter": interrupt_promoter,
    "SIGKILL QEMU": kill_qemu,
    "SIGKILL both": kill_both,
    "quit": quit_qemu,
    "power off": power_off,
    "reset": reset,
    "pause": pause,
    "SIGKILL libvirtd": kill_libvirtd,
    "monitor cut": cut_monitor,
    "target full": fill_target,
    "target EIO": break_target,
    "target unmounted": unmount_target,
    "source EIO": break_source,
    "base deleted": delete_base,
}
OF_THE_TARGET = frozenset({"target full", "target EIO", "target unmounted"})
OF_THE_SOURCE = frozenset({"source EIO", "base deleted"})
BREAKS = frozenset({"target EIO", "source EIO"})  # the guest's own disk may be among what fails


def heal(scene: Scene, fault: str) -> None:
    """What an operator does about it, before he asks promoter to go on."""
    if fault == "SIGKILL libvirtd":
        assert scene.libvirtd
        scene.libvirtd.restart()
    if fault == "target full":
        assert scene.target
        scene.target.make_room()
    if fault == "base deleted":
        scene.base.with_suffix(".saved").rename(scene.base)
    if fault == "target unmounted":
        assert scene.target
        scene.target.mount()
    if fault in BREAKS:
        broken = scene.target if fault == "target EIO" else scene.source
        assert broken
        if not scene.is_gone():  # it may have files there open, which fail for good
            scene.guest.kill()
        broken.unmount()
        wait_for(lambda: not broken.is_used(), "the broken file system to be let go", 20)
        broken.mount()


def standing_at(process: subprocess.Popen[str], timeout: float) -> None:
    """Wait until promoter has stopped itself at its point. AssertionError when it never does."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if found and found.si_code == os.CLD_STOPPED:
            return
        if found:
            out, err = process.communicate()
            raise AssertionError(f"the point was never reached: {out[-2000:]}{err[-2000:]}")
        time.sleep(0.01)
    raise TimeoutError("promoter did not come to the point")


LEFT = re.compile(r".*\.(part|next|new)-[0-9a-f]{8}(\.delta)?|.*\.back|.*\.scratch")
