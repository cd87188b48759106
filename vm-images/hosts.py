"""Builds the machines of tests/hosts.py: a Debian with QEMU, Python and NFS, for root.

Its kernel and how that boots are those of build.py's small guest, and its process 1 is host-init.
The last line printed is the directory with `root.img`, `vmlinux` and `initrd`. As in build.py a
build is repeated only when one of its sources changed.
"""

import re
import shutil
import sys
from pathlib import Path

import build

PACKAGES = [
    *("iproute2", "kmod", "netbase", "nfs-common", "nfs-kernel-server"),
    "qemu-guest-agent",  # how tests/hosts.py gets in
    *("qemu-system-x86", "qemu-utils"),
    *("python3", "libvirt0"),  # for this repository's .venv
]
SIZE = "3G"
UNUSED = ("var/lib/apt/lists", "var/cache/apt/archives", "usr/share/doc", "usr/share/locale")


def release() -> tuple[str, str]:
    """This Debian's name, and where apt has it from."""
    name = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.M)
    if name is None:
        raise build.BuildError("this is no Debian")
    where = ["Created-By: Packages", f"Codename: {name[1]}"]
    sites = build.run("apt-get", "indextargets", "--format", "$(SITE)", *where).split()
    if not sites:
        raise build.BuildError(f"apt has no source of {name[1]}")
    return name[1], sites[0]


def build_hosts(work: Path, out: Path) -> None:
    root = work / "root"
    include = f"--include={','.join(PACKAGES)}"
    name, site = release()
    build.run("debootstrap", "--variant=minbase", include, name, root, site)
    for unused in UNUSED:
        shutil.rmtree(root / unused)
    kernel = build.unpack_kernel(work)
    (vmlinuz,) = kernel.glob("boot/vmlinuz-*")
    (out / "vmlinux").write_bytes(build.without_compression(vmlinuz))
    build.make_initrd(kernel, work / "initramfs", out / "initrd")
    (modules,) = kernel.glob("lib/modules/*")
    shutil.copytree(modules, root / "usr/lib/modules" / modules.name)
    build.run("chroot", root, "depmod", modules.name)
    build.install(root / "init", build.HERE / "host-init")
    build.compile_writer(root / "usr/sbin/writer")
    build.run("mke2fs", "-q", "-t", "ext4", "-d", root, out / "root.img", SIZE)


if __name__ == "__main__":
    build.PACKAGES["debootstrap"] = "debootstrap"
    build.SOURCES += ("hosts.py", "host-init")
    try:
        sys.stdout.write(f"{build.build('hosts', build_hosts)}\n")
    except build.BuildError as error:
        sys.exit(f"hosts.py: {error}")
