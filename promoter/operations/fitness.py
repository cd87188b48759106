"""Is this host fit: its tools, libvirt, and the file systems that disks lie on?"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from promoter.guests.connect import knock
from promoter.operations.findings import Finding, Wrong, refusals
from promoter.operations.remains import Known
from promoter.storage.abilities import Abilities, abilities

TOOLS = ("qemu-img", "setpriv")
LEAST_FREE = 64 << 20


def tools() -> Iterator[Finding]:
    for tool in TOOLS:
        if shutil.which(tool) is None:
            yield Finding("this host", f"there is no {tool}", "Install it.", Wrong.UNFIT)


async def libvirt(uri: str, operations: Iterable[Known]) -> list[Finding]:
    """That libvirt does not answer is wrong where an operation needs it."""
    waiting = {each.intent.domain.uri for each in operations if each.is_open and each.intent.domain}
    found = []
    for each in sorted({uri, *waiting}):
        for finding in await refusals("libvirt", [partial(knock, each)]):
            wrong = finding.wrong if each in waiting else Wrong.NOTHING
            found.append(replace(finding, wrong=wrong))
    return found


def _unfit(found: Abilities, *, is_state: bool) -> Iterator[Finding]:
    about = str(found.directory)
    if found.free < LEAST_FREE:
        yield Finding(about, f"only {found.free:,} bytes are free", "Make room.", Wrong.FULL)
    if is_state and not found.flock:
        text = "flock(2) does not work: two promoters could take up one operation"
        yield Finding(about, text, "Give another --state-dir.", Wrong.UNFIT)
    if is_state:
        return
    if not found.hard_links:
        text = f"{found.file_system} has no hard links: no disk can be switched in place there"
        yield Finding(about, text, "promote --target, on another file system.", Wrong.UNFIT)
    if not found.ofd_locks:
        text = "OFD locks do not work: QEMU cannot keep two guests from one disk"
        yield Finding(about, text, "Look at how it is mounted.", Wrong.UNFIT)
    leased = any(found.directory.glob("*.lease.d"))
    for fault in found.faults:
        hint = "See mount and nfs(5)." if leased else "No lease is there yet; leases need it."
        yield Finding(about, fault, hint, Wrong.UNFIT if leased else Wrong.NOTHING)


def directory(place: Path, *, is_state: bool) -> tuple[Abilities | None, list[Finding]]:
    """What a directory's file system can do, if anything can be made there; and what it lacks."""
    try:
        found = abilities(place)
    except OSError as error:
        text = f"nothing can be made there: {error.strerror or error}"
        hint = "Run promoter as its owner, or as root."
        return None, [Finding(str(place), text, hint, Wrong.UNFIT)]
    return found, list(_unfit(found, is_state=is_state))
