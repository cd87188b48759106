"""Builds the guests of the tests, without root's mounts and without installing a kernel.

    build.py small                  a guest of Debian's kernel and busybox
    build.py cirros [--image FILE]  CirrOS, downloaded or FILE, with our writer put in
    build.py auto                   cirros if PROMOTER_TEST_GUEST=cirros, else small

The last line printed is the directory with the result, below out/ beside this file:
`base.qcow2`, whose partition 2 is the writer's region, and for `small` also `vmlinux` and
`initrd` to boot it with.  A build is repeated only when one of its sources here changed,
and a directory appears only when it is whole.  An error is one line, and exit code 1.
"""

import argparse
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

PACKAGES = {  # a program that is needed: the Debian package that has it
    "apt-get": "apt",
    "busybox": "busybox-static",
    "debugfs": "e2fsprogs",
    "dpkg-deb": "dpkg",
    "gcc": "gcc",
    "mke2fs": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "sfdisk": "fdisk",
}
FILES = {"/usr/include/stdlib.h": "libc6-dev"}
# Not the cloud kernel: it has no AHCI.
KERNEL_PACKAGE = "linux-image-amd64"
MODULES = [
    *("virtio_pci", "virtio_blk", "virtio_scsi", "ahci", "nvme", "sd_mod"),
    *("crc32c_generic", "ext4", "button", "evdev", "qemu_fw_cfg"),
]
FILLER = "kernel/fs"  # modules that nobody loads: data for a base to have
AGENT_PACKAGE = "qemu-guest-agent"
AGENT, AGENT_MODULE = "usr/sbin/qemu-ga", "virtio_console.ko"

CIRROS = "https://download.cirros-cloud.net/0.6.3/cirros-0.6.3-x86_64-disk.img"
CIRROS_SHA256 = "7d6355852aeb6dbcd191bcda7cd74f1536cfe5cbf8a10495a7283a8396e4b75b"
CIRROS_START = """#!/bin/sh
# Started at boot, before anything waits for a network; /dev/vda2 is the region that build.py added.
[ "$1" = start ] && exec /usr/sbin/writer /dev/vda2 1 3 40 /dev/ttyS1 >/dev/null 2>&1 &
exit 0
"""

MIB = 1 << 20
CLUSTER, GROUND = 1 << 16, b"promoter"
ROOT_START, ROOT_SIZE, REGION_SIZE, SPARE = 1 * MIB, 111 * MIB, 64 * MIB, 16 * MIB
HERE = Path(__file__).resolve().parent
SOURCES = ("build.py", "writer.c", "init", "initramfs", "power-off")


class BuildError(Exception):
    """Why there is no guest."""


def run(*command: object, stdin: str = "", cwd: Path | None = None) -> str:
    """Runs a program to its end and returns what it printed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, input=stdin, cwd=cwd, text=True, capture_output=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def check_packages() -> None:
    missing = {package for program, package in PACKAGES.items() if not shutil.which(program)}
    missing |= {package for file, package in FILES.items() if not Path(file).exists()}
    if missing:
        raise BuildError(f"needed: apt-get install {' '.join(sorted(missing))}")


def compile_writer(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    warnings = ("-Wall", "-Wextra", "-Werror")
    run("gcc", "-static", "-O2", "-s", *warnings, HERE / "writer.c", "-o", target)


def install(target: Path, source: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755)


def install_busybox(directory: Path) -> None:
    install(directory / "busybox", Path(shutil.which("busybox") or "busybox"))
    for applet in set(run("busybox", "--list").split()) - {"busybox"}:
        (directory / applet).symlink_to("busybox")


# --- small ---------------------------------------------------------------------------------


def unpack_kernel(work: Path) -> Path:
    """Unpacks the newest kernel that apt knows; returns the directory."""
    found = re.findall(r"Depends: (linux-image-\S+)", run("apt-cache", "depends", KERNEL_PACKAGE))
    if not found:
        raise BuildError(f"apt knows no {KERNEL_PACKAGE}: run apt-get update")
    return unpack(found[0], work, work / "kernel")


def unpack(package: str, work: Path, target: Path) -> Path:
    run("apt-get", "download", "-o", "APT::Sandbox::User=root", package, cwd=work)
    (file,) = work.glob(f"{package}_*.deb")
    run("dpkg-deb", "-x", file, target)
    return target


def without_compression(vmlinuz: Path) -> bytes:
    """The ELF kernel inside, which QEMU enters directly: unpacking it in TCG costs seconds."""
    packed = vmlinuz.read_bytes()
    return lzma.LZMADecompressor().decompress(packed[packed.index(b"\xfd7zXZ\0") :])


def in_loading_order(modules: dict[str, Path], wanted: list[str]) -> dict[str, Path]:
    """The wanted modules, each after those it depends on."""
    order: dict[str, Path] = {}
    for name in wanted:
        depends = re.search(rb"\0depends=([^\0]*)\0", modules[name].read_bytes())
        below = depends[1].decode().replace("-", "_") if depends else ""
        order |= in_loading_order(modules, below.split(",") if below else [])
        order[name] = modules[name]
    return order


def make_initrd(kernel: Path, tree: Path, target: Path) -> None:
    for name in ("dev", "proc", "sys", "root", "modules"):
        (tree / name).mkdir(parents=True)
    install_busybox(tree / "bin")
    install(tree / "init", HERE / "initramfs")
    modules = {path.stem.replace("-", "_"): path for path in kernel.rglob("*.ko")}
    order = in_loading_order(modules, MODULES)
    for path in order.values():
        shutil.copy(path, tree / "modules")
    (tree / "modules/order").write_text("".join(f"{path.name}\n" for path in order.values()))
    names = "\n".join(sorted(str(path.relative_to(tree)) for path in tree.rglob("*")))
    run("busybox", "cpio", "-o", "-H", "newc", "-F", target, cwd=tree, stdin=names)


def install_agent(kernel: Path, work: Path, tree: Path) -> None:
    """The guest agent, with its channel's module and this machine's libraries."""
    install(tree / AGENT, unpack(AGENT_PACKAGE, work, work / "agent") / AGENT)
    needs = run("ldd", tree / AGENT)
    if missing := re.findall(r"(\S+) => not found", needs):
        raise BuildError(f"{AGENT_PACKAGE} needs {', '.join(missing)}, which is not here")
    for library in re.findall(r"(/\S+) \(0x", needs):
        install(tree / library[1:], Path(library))
    (module,) = kernel.rglob(AGENT_MODULE)
    install(tree / "lib/modules" / AGENT_MODULE, module)


def make_root(kernel: Path, work: Path, tree: Path) -> None:
    for name in ("dev", "proc", "sys", "run", "bin", "sbin", "var/log", "var/run"):
        (tree / name).mkdir(parents=True)
    install_busybox(tree / "bin")
    install(tree / "init", HERE / "init")
    install(tree / "etc/acpi/PWRF/00000080", HERE / "power-off")
    compile_writer(tree / "sbin/writer")
    (modules,) = kernel.glob("lib/modules/*")
    shutil.copytree(modules / FILLER, tree / "lib/modules" / modules.name / FILLER)
    install_agent(kernel, work, tree)


def make_disk(root: Path, work: Path, target: Path) -> None:
    raw = work / "disk.raw"
    with raw.open("wb") as disk:
        disk.truncate(ROOT_START + ROOT_SIZE + REGION_SIZE + SPARE)
    sectors = [ROOT_START // 512, ROOT_SIZE // 512, REGION_SIZE // 512]
    table = "start={0}, size={1}, type=83\nstart={3}, size={2}, type=da\n"
    run("sfdisk", raw, stdin="label: dos\n" + table.format(*sectors, sectors[0] + sectors[1]))
    offset = f"offset={ROOT_START}"
    run("mke2fs", "-q", "-t", "ext4", "-E", offset, "-d", root, raw, f"{ROOT_SIZE // 1024}k")
    lay_ground(raw, ROOT_START + ROOT_SIZE)
    to_qcow2(raw, target)


def lay_ground(raw: Path, start: int) -> None:
    """What a base has under a guest's writes, and must keep: see tests/records.py."""
    with raw.open("r+b") as disk:
        for at in range(start, start + REGION_SIZE, 4 * CLUSTER):
            disk.seek(at)
            disk.write(GROUND * (CLUSTER // len(GROUND)))


def to_qcow2(raw: Path, target: Path) -> None:
    options = "compat=1.1,cluster_size=64k"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", options, raw, target)


def build_small(work: Path, out: Path) -> None:
    kernel = unpack_kernel(work)
    (vmlinuz,) = kernel.glob("boot/vmlinuz-*")
    (out / "vmlinux").write_bytes(without_compression(vmlinuz))
    make_initrd(kernel, work / "initramfs", out / "initrd")
    make_root(kernel, work, work / "root")
    make_disk(work / "root", work, out / "base.qcow2")


# --- cirros --------------------------------------------------------------------------------


def download(url: str, target: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    except (urllib.error.URLError, OSError) as error:
        target.unlink(missing_ok=True)
        raise BuildError(f"cannot download {url} ({error}); give it with --image") from error


def check_sha256(image: Path, expected: str) -> None:
    """Removes an image that is not the one that was pinned."""
    found = hashlib.sha256(image.read_bytes()).hexdigest()
    if found != expected:
        image.unlink()
        raise BuildError(f"{image.name}: sha256 is {found}, not {expected}; removed")


def partitions(raw: Path) -> list[dict[str, int]]:
    found: list[dict[str, int]] = json.loads(run("sfdisk", "--json", raw))["partitiontable"][
        "partitions"
    ]
    return found


def add_region(raw: Path) -> None:
    """Adds partition 2, the writer's, behind everything that is there."""
    size = raw.stat().st_size
    with raw.open("r+b") as disk:
        disk.truncate(size + REGION_SIZE + SPARE)
    start = -(-size // MIB) * MIB
    line = f"start={start // 512}, size={REGION_SIZE // 512}\n"
    run("sfdisk", "--append", "-N", "2", raw, stdin=line)
    lay_ground(raw, start)


def put_writer(raw: Path, work: Path) -> None:
    """Writes the writer and its start script into the root file system, partition 1."""
    compile_writer(work / "writer")
    (work / "start").write_text(CIRROS_START)
    script = work / "commands"
    script.write_text(
        f"write {work}/writer /usr/sbin/writer\nset_inode_field /usr/sbin/writer mode 0100755\n"
        f"write {work}/start /etc/init.d/promoter-writer\n"
        "set_inode_field /etc/init.d/promoter-writer mode 0100755\n"
        "symlink /etc/rc3.d/S22-promoter-writer ../init.d/promoter-writer\n"
    )
    first = min(partitions(raw), key=lambda partition: str(partition["node"]))
    said = run("debugfs", "-w", "-f", script, f"{raw}?offset={first['start'] * 512}")
    if failed := [line for line in said.splitlines() if not line.startswith(("debugfs:", "Alloc"))]:
        raise BuildError(f"debugfs: {failed[0]}")


def build_cirros(image: Path | None, work: Path, out: Path) -> None:
    copy = work / "cirros.img"
    if image is None:
        download(CIRROS, copy)
    else:
        shutil.copyfile(image, copy)
    check_sha256(copy, CIRROS_SHA256)
    raw = work / "disk.raw"
    run("qemu-img", "convert", "-O", "raw", copy, raw)
    add_region(raw)
    put_writer(raw, work)
    to_qcow2(raw, out / "base.qcow2")


# --- both ----------------------------------------------------------------------------------


def stamp_of_sources() -> str:
    return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in SOURCES)).hexdigest()


def build(name: str, make: Callable[[Path, Path], None]) -> Path:
    """Makes out/<name> with `make(work, new)` unless it is there and of these sources."""
    out, stamp = HERE / "out" / name, stamp_of_sources()
    stamp_file = out / "stamp"
    if stamp_file.exists() and stamp_file.read_text() == stamp:
        return out
    check_packages()
    out.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=out.parent) as work:
        new = Path(work) / "new"
        new.mkdir()
        make(Path(work), new)
        (new / "stamp").write_text(stamp)
        shutil.rmtree(out, ignore_errors=True)
        new.rename(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the guests of the tests.")
    parser.add_argument("guest", choices=("small", "cirros", "auto"))
    parser.add_argument("--image", type=Path, help="a CirrOS image to use for a download")
    asked = parser.parse_args()
    name = asked.guest
    if name == "auto":
        name = "cirros" if os.environ.get("PROMOTER_TEST_GUEST") == "cirros" else "small"
    makers = {
        "small": build_small,
        "cirros": lambda work, out: build_cirros(asked.image, work, out),
    }
    try:
        sys.stdout.write(f"{build(name, makers[name])}\n")
    except BuildError as error:
        sys.exit(f"build.py: {error}")


if __name__ == "__main__":
    main()
