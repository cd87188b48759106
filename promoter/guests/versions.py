"""What this promoter works with. Source: ``qemu-img --version``, ``virGetVersion``."""

from __future__ import annotations

import subprocess

from promoter import __version__


def _libvirt() -> str:
    try:
        import libvirt
    except ImportError:
        return "not found"
    number = libvirt.getVersion()
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def versions() -> str:
    """promoter's version and those of this host's QEMU tools and libvirt, a line each."""
    try:
        said = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True)
        qemu = said.stdout.splitlines()[0].removeprefix("qemu-img version ")
    except (OSError, subprocess.CalledProcessError, IndexError):
        qemu = "not found"
    return f"promoter {__version__}\nqemu-img {qemu}\nlibvirt {_libvirt()}\n"
