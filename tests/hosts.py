"""Two hosts in a box, and the NFS server that has their pool: machines of vm-images/hosts.py.

Their network is a hub in the server's QEMU, and nobody else's. Commands go in by QEMU's guest
agent.
This repository and its .venv are in each of them at the path that they have here, read-only.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.agent import answers, ask
from tests.cli import Ran
from tests.vm import AGENT, ROOT, Monitor, accelerator, qemu_img, serial, wait_for

BUILD = ROOT / "vm-images" / "hosts.py"
POOL = Path("/pool")
STATE = Path("/var/lib/promoter")
OPTIONS = "vers=4.2,hard,lookupcache=none"
PROMOTER = ROOT / ".venv" / "bin" / "promoter"
NEEDED = ("promoter", ".venv")
KERNEL = (
    "root=/dev/vda console=ttyS0 quiet panic=-1 no_timer_check cryptomgr.notests mitigations=off"
    " net.ifnames=0"
)
SERVER = "10.99.0.1"
SERVE = f"""
set -e
mkdir -p {POOL} /var/lib/nfs/v4recovery
mount -t nfsd nfsd /proc/fs/nfsd
echo 10 > /proc/fs/nfsd/nfsv4gracetime
echo '{POOL} *(rw,fsid=0,no_root_squash,no_subtree_check)' > /etc/exports
exportfs -ra
rpc.nfsd --no-nfs-version 3 4
rpc.mountd --no-nfs-version 3
"""
MOUNT = f"mkdir -p {POOL} && mount -t nfs4 -o {OPTIONS} {SERVER}:/ {POOL} && modprobe nbd"
PATIENCE = 600.0
"""Seconds for anything that a host does: all is emulated, on a machine that does more."""


@functools.cache
def images() -> Path:
    """The directory of the hosts' images, built if they are not there."""
    command = [sys.executable, str(BUILD)]
    return Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout[:-1])


def repository(directory: Path) -> Path:
    """A file system with what the hosts need of this repository."""
    image, tree = directory / "repository.img", directory / "repository"
    tree.mkdir()
    for name in NEEDED:
        subprocess.run(["cp", "-a", "--reflink=auto", ROOT / name, tree], check=True)
    subprocess.run([sys.executable, "-m", "compileall", "-q", tree / "promoter"], check=True)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, image, "600M"], check=True)
    shutil.rmtree(tree)
    return image


@dataclass(frozen=True)
class Begun:
    """A command that runs in a host."""

    host: Host
    pid: int

    def ended(self) -> Ran | None:
        """How it ended, which is told only once."""
        status = ask(self.host, "guest-exec-status", int(PATIENCE), pid=self.pid)
        if not status["exited"]:
            return None
        said = [base64.b64decode(status.get(f"{name}-data", "")) for name in ("out", "err")]
        code = status["exitcode"] if "exitcode" in status else 128 + status["signal"]
        return Ran(code, *(data.decode() for data in said))

    def end(self, timeout: float = PATIENCE) -> Ran:
        found: list[Ran] = []

        def has_ended() -> bool:
            found.extend(filter(None, [self.ended()]))
            return bool(found)

        wait_for(has_ended, "a command's end", timeout)
        return found[0]

    def ask_to_end(self) -> Ran:
        self.host.sh(f"kill {self.pid}")
        return self.end()


class Host:
    """A machine; `acks` is what is said at its second serial port."""

    def __init__(self, directory: Path, name: str, address: str, *, memory: int = 512) -> None:
        self.name, self.address, self._memory = name, address, memory
        self._directory = directory / name
        self._directory.mkdir()
        self.console, self.acks = self._directory / "console.log", self._directory / "acks.log"
        self.sockets = Path(tempfile.mkdtemp(prefix="host-", dir="/tmp"))
        self.agent = self.sockets / "agent"
        self._process: subprocess.Popen[bytes] | None = None
        self._monitor: Monitor | None = None

    def start(self, code: Path, network: list[str]) -> None:
        disk, number = self._directory / "root.qcow2", int(self.address.rpartition(".")[2])
        qemu_img("create", "-q", "-f", "qcow2", "-b", images() / "root.img", "-F", "raw", disk)
        words = {
            "name": self.name, "machine": f"{number:032x}", "address": f"{self.address}/24",
            "repository": ROOT,
        }  # fmt: skip
        line = " ".join([KERNEL, *(f"host.{name}={value}" for name, value in words.items())])
        command = [
            "setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-nodefaults",
            "-display", "none", "-no-reboot", "-m", str(self._memory), "-accel", accelerator(),
            "-kernel", str(images() / "vmlinux"), "-initrd", str(images() / "initrd"),
            "-append", line,
            "-drive", f"if=virtio,format=qcow2,cache=unsafe,file={disk}",
            "-drive", f"if=virtio,format=raw,readonly=on,file={code}",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,path={self.agent},server=on,wait=off",
            "-device", f"virtserialport,chardev=agent,name={AGENT}",
            *serial("console", self.console), *serial("acks", self.acks),
            "-qmp", f"unix:{self.sockets}/qmp,server=on,wait=off", *network,
            "-device", f"virtio-net-pci,netdev=net,mac=52:54:00:99:00:{number:02x},romfile=",
        ]  # fmt: skip
        with (self._directory / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_for((self.sockets / "qmp").exists, f"{self.name}'s monitor", 30)
        self._monitor = Monitor(self.sockets / "qmp")

    def wait_until_up(self) -> None:
        wait_for(lambda: answers(self), f"{self.name} to boot", PATIENCE)

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
        if self._monitor:
            self._monitor.close()
        shutil.rmtree(self.sockets)

    # --- what runs in it ---

    def begin(self, *words: object) -> Begun:
        asked = {"path": str(words[0]), "arg": [str(word) for word in words[1:]]}
        answer = ask(self, "guest-exec", int(PATIENCE), **asked, **{"capture-output": True})
        return Begun(self, int(answer["pid"]))

    def sh(self, script: str) -> str:
        """What a shell script, which must succeed, printed."""
        ran = self.begin("/bin/sh", "-c", script).end()
        assert ran.code == 0, (script, ran)
        return ran.out

    def put(self, source: Path, target: Path) -> None:
        """Copies a small file or directory into it."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            archive.add(source, target)
        self.sh(f"echo {base64.b64encode(packed.getvalue()).decode()} | base64 -d | tar -xzC /")

    def promoter(self, *words: object) -> Ran:
        return self.begin(PROMOTER, *words, "--json").end()

    def audit(self) -> list[dict[str, Any]]:
        """The lines of its audit log."""
        return [json.loads(line) for line in self.sh(f"cat {STATE}/audit.log").splitlines()]


class Box:
    """The server and both hosts, with the pool mounted. In a `with` block they run."""

    def __init__(self, directory: Path) -> None:
        self.server = Host(directory, "server", SERVER, memory=384)
        self.a = Host(directory, "host-a", "10.99.0.2")
        self.b = Host(directory, "host-b", "10.99.0.3")
        self.hosts = self.a, self.b
        self._directory = directory

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        code = repository(self._directory)
        self.server.start(code, self._hub())
        for host in self.hosts:
            host.start(code, ["-netdev", f"stream,id=net,server=off,{self._cable(host)}"])
        self.server.wait_until_up()
        self.server.sh(SERVE)
        for host in self.hosts:
            host.wait_until_up()
            host.sh(MOUNT)

    def __exit__(self, *_: object) -> None:
        for host in (*self.hosts, self.server):
            host.close()

    def _cable(self, host: Host) -> str:
        return f"addr.type=unix,addr.path={self.server.sockets}/{host.name}"

    def _hub(self) -> list[str]:
        words = ["-netdev", "hubport,id=net,hubid=0"]
        for host in self.hosts:
            words += ["-netdev", f"stream,id={host.name},server=on,{self._cable(host)}"]
            words += ["-netdev", f"hubport,id=to-{host.name},hubid=0,netdev={host.name}"]
        return words

    @contextlib.contextmanager
    def cut(self, host: Host) -> Iterator[None]:
        """Nothing goes to that host, and nothing comes from it; its own link stays up."""
        self.server.qmp("set_link", name=host.name, up=False)
        yield
        self.server.qmp("set_link", name=host.name, up=True)
