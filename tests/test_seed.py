"""What making a seed does to the host beside it."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from promoter.chain import Image
from promoter.storage.pace import Pace
from promoter.storage.seed import Geometry, SeedMethod, SeedSpec, make_seed
from tests.vm import MIB, blank

SIZE = 128 * MIB


def resident(file: Path) -> int:
    """Bytes of a file that are in the page cache."""
    if not file.exists():
        return 0
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(file)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("rate", [64 * MIB, 0])
@pytest.mark.parametrize("method", [SeedMethod.CONVERT, SeedMethod.COPY])
def test_a_seed_is_not_kept_in_the_page_cache(
    tmp_path: Path, method: SeedMethod, rate: int
) -> None:
    base, part = blank(tmp_path / "base.qcow2", SIZE), tmp_path / "part"
    subprocess.run(["qemu-io", "-c", f"write -q -P 7 0 {SIZE}", str(base)], check=True)
    image = Image("base", "qcow2", base, "file", "file", SIZE, SIZE)
    spec = SeedSpec((image,), part, method, Geometry("qcow2"), SIZE, like=base)
    seen: list[int] = []
    asyncio.run(make_seed(spec, Pace(rate), lambda *_: seen.append(resident(part))))
    assert part.stat().st_size >= SIZE
    assert not rate or max(seen) < SIZE * 3 / 4
    assert resident(part) < MIB
