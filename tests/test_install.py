"""promoter installed as README.md says, and from its wheel alone, where nothing else is.

There is a root file system of Debian 12 or 13 that debootstrap makes, of apt's own source on this
machine. In it run this machine's processes, and with a guest's own directories it has its socket
and its disks.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli import Ran
from tests.domains import Domain, Libvirtd
from tests.vm import ROOT, VM, Disk, base, linked_clone

pytestmark = pytest.mark.nightly

ENTER = """
root=$1; shift
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
while [ "$1" != -- ]; do
    mkdir -p "$root$1"
    mount --bind "$1" "$root$1"
    shift
done
shift
exec chroot "$root" "$@"
"""
BLOCK = re.compile(r"^## Install$.*?\n\n((?:    [^\n]*\n)+)", re.MULTILINE | re.DOTALL)


def install_section() -> tuple[list[str], str]:
    """The packages and the commands of README.md's."""
    found = BLOCK.search((ROOT / "README.md").read_text())
    assert found
    apt, *commands = (line.strip() for line in found[1].splitlines())
    assert apt.startswith("apt install ")
    return apt.split()[2:], "\n".join(commands)


@dataclass(frozen=True)
class Host:
    """A root file system."""

    root: Path

    def run(self, *command: object, places: Sequence[Path] = ()) -> Ran:
        """Run a command there; ``places`` of this machine are there too, under their names."""
        entered = ["unshare", "--mount", "sh", "-ec", ENTER, "sh", self.root, *places, "--"]
        done = subprocess.run(
            [str(word) for word in (*entered, *command)],
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "HOME": "/root",
                "LC_ALL": "C.UTF-8",
                "PIP_NO_INDEX": "1",
                "PIP_FIND_LINKS": "/wheels",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    def does(self, *command: object, places: Sequence[Path] = ()) -> str:
        ran = self.run(*command, places=places)
        assert ran.code == 0, ran
        return ran.out


def quietly(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the sdist and of the wheel that is built from it."""
    directory = tmp_path_factory.mktemp("dist")
    quietly(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, ROOT)
    return directory


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def host(
    request: pytest.FixtureRequest, built: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    """A Debian 12 or 13 with README.md's packages; /src and /wheels are what pip takes."""
    here = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    of_here = ("Created-By: Packages", f"Codename: {here}", "Component: main")
    sources = quietly("apt-get", "indextargets", "--format", "$(SITE)", *of_here).split()
    if not sources:
        pytest.skip("apt has no source of Debian")
    root = tmp_path_factory.mktemp(request.param) / "root"
    packages, _ = install_section()
    quietly(
        *("unshare", "--mount", "debootstrap", "--variant=minbase"),
        *(f"--include={','.join(packages)}", request.param, root, sources[0]),
    )
    host = Host(root)
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    version = host.does("python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:")
    to = (f"--python-version={version.strip()}", f"--dest={root / 'wheels'}")
    quietly(*pip, *to, wheel, "setuptools")
    (root / "src").mkdir()
    quietly("tar", "-xf", sdist, "-C", root / "src", "--strip-components=1")
    yield host
    shutil.rmtree(root)


def read(chain: str) -> list[str]:
    """The images that `promoter chain` names, from the top down."""
    return re.findall(r"(\S+): qcow2", chain)


def test_as_readme_says_it_works_with_plain_guests_and_domains(
    host: Host, libvirtd: Libvirtd, tmp_path: Path
) -> None:
    _, commands = install_section()
    said = host.does("bash", "-ec", f"cd /src\n{commands}")
    assert re.search(r"^qemu-img \d.*\nlibvirt \d", said, re.MULTILINE), said
    assert "bash completion installed" in said, said

    lowest = Path(shutil.copy(base(), tmp_path / "base.qcow2"))
    clone, other = (linked_clone(lowest, tmp_path / f"{name}.qcow2") for name in ("web", "mail"))
    (tmp_path / "mail").mkdir()
    promoter = "/opt/promoter/bin/promoter"
    with VM(tmp_path, [Disk(clone)]) as guest:
        places = [tmp_path, guest.monitor.parent]
        shown = host.does(promoter, "chain", guest.monitor, places=places)
        assert read(shown) == [str(clone), str(lowest)]
        host.does(promoter, "promote", guest.monitor, places=places)
        guest.wait_for_acks(10)
    with Domain(libvirtd, tmp_path / "mail", [Disk(other)]) as domain:
        places = [tmp_path, libvirtd.socket.parent]
        shown = host.does(promoter, "chain", *domain.address, places=places)
        assert read(shown) == [str(other), str(lowest)]


def test_the_wheel_alone_has_pages_for_man_and_serves_plain_guests(
    host: Host, tmp_path: Path
) -> None:
    host.does("python3", "-m", "venv", "/venv")
    host.does("sh", "-ec", "/venv/bin/pip install --no-cache-dir /wheels/promoter-*.whl")
    promoter = "/venv/bin/promoter"
    assert "libvirt not found" in host.does(promoter, "--version")
    assert "Commands:" in host.does(promoter, "--help")
    bin_first = os.environ | {"PATH": f"{host.root}/venv/bin:{os.environ['PATH']}"}
    where = subprocess.run(["man", "-w", "promoter-job-list"], env=bin_first, capture_output=True)
    assert where.stdout.decode().startswith(str(host.root)), where

    lowest = Path(shutil.copy(base(), tmp_path / "base.qcow2"))
    clone = linked_clone(lowest, tmp_path / "web.qcow2")
    with VM(tmp_path, [Disk(clone)]) as guest:
        places = [tmp_path, guest.monitor.parent]
        shown = host.does(promoter, "chain", guest.monitor, places=places)
        assert read(shown) == [str(clone), str(lowest)]
    ran = host.run(promoter, "chain", "web01")
    assert ran.code == 3
    assert "No module named 'libvirt'" in ran.err
    assert "README" in ran.err
