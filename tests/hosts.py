"""Hosts in a box: machines of Debian 12 (ci/hosts makes their image) with a network of their own.

One is the NFS server, the others mount its pool at `POOL`. Their network is a hub in the server's
QEMU and nobody else's; commands go in by QEMU's guest agent. This repository and its .venv are
in each at the path that they have here, read-only.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.agent import answers, ask
from tests.cli import Ran
from tests.vm import AGENT, ROOT, Monitor, accelerator, qemu_img, wait_for

IMAGE = ROOT / "vm-images" / "out" / "hosts"
POOL = Path("/pool")
BOOT_TIMEOUT = 600.0
OPTIONS = "vers=4.2,hard,lookupcache=none"
KERNEL = (
    "root=/dev/vda console=ttyS0 quiet panic=-1 no_timer_check cryptomgr.notests mitigations=off"
    " net.ifnames=0"
)
PROMOTER = f"{ROOT}/.venv/bin/promoter"


@functools.cache
def repository() -> Path:
    """A file system with what the hosts need of this repository."""
    made = Path(tempfile.mkdtemp(prefix="hosts-", dir="/tmp"))
    image, tree = made / "repository.img", made / "tree"
    for name in ("promoter", "tests", ".venv", "vm-images/out/small"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", "--reflink=auto", ROOT / name, tree / name], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-d", tree, image, "1G"], check=True)
    shutil.rmtree(tree)
    return image


@dataclass(frozen=True)
class Begun:
    """A command that runs in a host."""

    host: Host
    pid: int

    def ended(self) -> Ran | None:
        """How it ended, told once."""
        status = ask(self.host, "guest-exec-status", 60, pid=self.pid)
        if not status["exited"]:
            return None
        out, err = (
            base64.b64decode(status.get(f"{name}-data", "")).decode() for name in ("out", "err")
        )
        code = status["exitcode"] if "exitcode" in status else 128 + status["signal"]
        return Ran(code, out, err)

    def end(self, timeout: float = 120) -> Ran:
        deadline = time.monotonic() + timeout
        while (ran := self.ended()) is None:
            assert time.monotonic() < deadline, f"{timeout:g} s were not enough"
            time.sleep(0.1)
        return ran


class Host:
    """A machine. In a `with` block it runs; leaving the block pulls its plug."""

    def __init__(self, directory: Path, name: str, number: int, *, memory: int = 512) -> None:
        self.name, self.number = name, number
        self.directory = directory / name
        self.directory.mkdir()
        self.console = self.directory / "console.log"
        self.sockets = Path(tempfile.mkdtemp(prefix="host-", dir="/tmp"))
        self.agent = self.sockets / "agent"
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._monitor: Monitor | None = None

    @property
    def address(self) -> str:
        return f"10.99.0.{self.number}"

    def start(self, network: list[str]) -> None:
        disk = self.directory / "root.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-b", IMAGE / "root.img", "-F", "raw", disk)
        words = {
            "name": self.name, "machine": f"{self.number:032x}",
            "address": f"{self.address}/24", "repository": ROOT,
        }  # fmt: skip
        line = " ".join([KERNEL, *(f"host.{name}={value}" for name, value in words.items())])
        command = [
            "setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-nodefaults",
            "-display", "none", "-no-reboot", "-m", str(self._memory), "-accel", accelerator(),
            "-kernel", str(IMAGE / "vmlinux"), "-initrd", str(IMAGE / "initrd"), "-append", line,
            "-drive", f"if=virtio,format=qcow2,cache=unsafe,file={disk}",
            "-drive", f"if=virtio,format=raw,readonly=on,file={repository()}",
            "-device", "virtio-rng-pci",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,path={self.agent},server=on,wait=off",
            "-device", f"virtserialport,chardev=agent,name={AGENT}",
            "-serial", f"file:{self.console}",
            "-qmp", f"unix:{self.sockets}/qmp,server=on,wait=off",
            *network,
            "-device", f"virtio-net-pci,netdev=net,mac=52:54:00:99:00:{self.number:02x},romfile=",
        ]  # fmt: skip
        with (self.directory / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_for((self.sockets / "qmp").exists, f"{self.name}'s monitor", 30)
        self._monitor = Monitor(self.sockets / "qmp")

    def wait_until_up(self) -> None:
        wait_for(lambda: answers(self), f"{self.name} to boot", BOOT_TIMEOUT)  # type: ignore[arg-type]

    def qmp(self, command: str, **arguments: Any) -> Any:
        assert self._monitor
        return self._monitor.execute(command, arguments)

    def kill(self) -> None:
        """Pulls its plug."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.sockets)

    def begin(self, script: str, *, capture: bool = True) -> Begun:
        words = {"path": "/bin/sh", "arg": ["-c", script], "capture-output": capture}
        return Begun(self, ask(self, "guest-exec", 60, **words)["pid"])

    def sh(self, script: str, timeout: float = 120) -> str:
        """What a shell script printed, which must succeed."""
        ran = self.begin(script).end(timeout)
        assert ran.code == 0, (script, ran)
        return ran.out


class Box:
    """An NFS server and two hosts, up, with the pool mounted."""

    def __init__(self, directory: Path) -> None:
        self.server = Host(directory, "server", 1, memory=384)
        self.a = Host(directory, "host-a", 2)
        self.b = Host(directory, "host-b", 3)

    def __enter__(self) -> Box:
        self.server.start(self._hub())
        for host in (self.a, self.b):
            self.plug_in(host)
        self.server.wait_until_up()
        self.server.sh(SERVE)
        for host in (self.a, self.b):
            self.come_up(host)
        return self

    def __exit__(self, *_: object) -> None:
        for host in (self.a, self.b, self.server):
            host.close()

    def _cable(self, host: Host) -> str:
        return f"addr.type=unix,addr.path={self.server.sockets}/{host.name}"

    def _hub(self) -> list[str]:
        words = ["-netdev", "hubport,id=net,hubid=0"]
        for host in (self.a, self.b):
            words += ["-netdev", f"stream,id={host.name},server=on,{self._cable(host)}"]
            words += ["-netdev", f"hubport,id=to-{host.name},hubid=0,netdev={host.name}"]
        return words

    def plug_in(self, host: Host) -> None:
        host.start(["-netdev", f"stream,id=net,server=off,{self._cable(host)}"])

    def come_up(self, host: Host) -> None:
        host.wait_until_up()
        host.sh(MOUNT)

    @contextlib.contextmanager
    def cut(self, host: Host) -> Iterator[None]:
        """Nothing comes from that host any more, and nothing gets there; it is not told."""
        self.server.qmp("set_link", name=host.name, up=False)
        yield
        self.server.qmp("set_link", name=host.name, up=True)


MOUNT = f"mkdir -p {POOL} && mount -t nfs4 -o {OPTIONS} 10.99.0.1:/ {POOL}"
SERVE = f"""set -e
mkdir -p {POOL} /var/lib/nfs/v4recovery
mount -t nfsd nfsd /proc/fs/nfsd
echo 10 > /proc/fs/nfsd/nfsv4gracetime
echo '{POOL} *(rw,fsid=0,no_root_squash,no_subtree_check,sync)' > /etc/exports
exportfs -ra
rpc.nfsd --no-nfs-version 3 4
rpc.mountd --no-nfs-version 3
"""
