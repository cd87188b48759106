"""The build of CirrOS, which cannot be had everywhere, on a disk laid out like it."""

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests import records
from tests.vm import BUILD, VM, Disk

INIT = """#!/bin/busybox sh
mount -t proc proc /proc
for script in /etc/rc3.d/S*; do [ -x "$script" ] && "$script" start; done
while sleep 1; do :; done
"""


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", BUILD)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def like_cirros(build: ModuleType, directory: Path) -> Path:
    """A GPT disk with the root file system on partition 1, behind partition 15."""
    tree, raw = directory / "tree", directory / "like-cirros.raw"
    for name in ("dev", "proc", "bin", "usr/sbin", "etc/init.d", "etc/rc3.d"):
        (tree / name).mkdir(parents=True)
    build.install_busybox(tree / "bin")
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    with raw.open("wb") as disk:
        disk.truncate(44 << 20)
    table = "label: gpt\n15 : start=2048, size=8M, type=U\n1 : start=24576, type=L\n"
    build.run("sfdisk", raw, stdin=table)
    build.run("mke2fs", "-q", "-t", "ext3", "-E", "offset=12582912", "-d", tree, raw, "31m")
    image = directory / "like-cirros.img"
    build.to_qcow2(raw, image)
    return image


def test_cirros_gets_a_writer_and_its_region_and_runs_it(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = like_cirros(build, tmp_path)
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    monkeypatch.setattr(build, "CIRROS_SHA256", digest)
    work = tmp_path / "work"
    work.mkdir()
    build.build_cirros(image, work, tmp_path)
    disk = Disk(tmp_path / "base.qcow2")
    with VM(tmp_path, [disk]) as vm:
        vm.wait_for_acks(10)
    records.check(disk.path, None, vm.log).raise_if_bad()


def test_an_image_that_is_not_the_pinned_one_is_refused_and_kept(
    build: ModuleType, tmp_path: Path
) -> None:
    image, work = tmp_path / "other.img", tmp_path / "work"
    image.write_bytes(b"not CirrOS")
    work.mkdir()
    with pytest.raises(build.BuildError, match="sha256"):
        build.build_cirros(image, work, tmp_path)
    assert image.exists()
    assert list(work.iterdir()) == []


def test_a_download_that_cannot_be_had_is_one_line_and_leaves_nothing(
    build: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(build.BuildError, match="give it with --image"):
        build.download((tmp_path / "nowhere").as_uri(), tmp_path / "image")
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named_by_its_package(tmp_path: Path) -> None:
    alone = tmp_path / "vm-images"
    alone.mkdir()
    for source in BUILD.parent.iterdir():
        if source.is_file():
            (alone / source.name).write_bytes(source.read_bytes())
    command = [sys.executable, str(alone / "build.py"), "small"]
    done = subprocess.run(
        command,
        env=os.environ | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "apt-get install" in done.stderr
    assert "busybox-static" in done.stderr
    assert not (alone / "out" / "small").exists()
