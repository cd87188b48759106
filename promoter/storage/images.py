"""qemu-img, and the few bytes of a qcow2 header that need no process.

Every call is given the image's format or a whole chain (`promoter.chain.image_spec`):
nothing is ever probed. A helper process dies with promoter, so that no orphan
goes on writing. Failures are `NoSpace` or `ImageError`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promoter.chain import Image, image_spec
from promoter.errors import JobFailed, NoSpace
from promoter.storage.files import write_behind
from promoter.storage.pace import Pace

Report = Callable[[int, int], None]
SHORT_NAP, LONGEST_NAP = 0.01, 0.2
CACHE = "writeback"
"""How qemu-img writes: where files grow, the kernel allocates better than O_DIRECT does, and
`write_behind` keeps the page cache as clean."""
MOST_LAYERS = 200
DIFFERENT = 1
"""The exit code of ``qemu-img compare`` for images that are not the same."""
QCOW2_MAGIC = b"QFI\xfb"
CORRUPT, LEAKING, NO_CHECK = 2, 3, 63
"""The exit codes of ``qemu-img check`` for what it found, and for formats it cannot check."""
PERCENT = re.compile(r"\(([0-9.]+)/100%\)")


class ImageError(JobFailed):
    """qemu-img failed; its own words are in the message."""


class Exited(ImageError):
    """It ended with an exit ``code`` that is not 0; ``output`` is what it had said until then."""

    def __init__(self, message: str, code: int, output: str) -> None:
        super().__init__(message)
        self.code = code
        self.output = output


async def info(image: Image) -> dict[str, Any]:
    """``qemu-img info`` of one image, opened beside whoever has it open."""
    answer = await _qemu_img("info", "-U", "--output=json", image_spec((image,)))
    found: dict[str, Any] = json.loads(answer)
    return found


async def chain_of(file: Path, image_format: str) -> tuple[Image, ...]:
    """The chain below a file that no guest has open, going by the headers and never by a guess.

    Raises `ImageError` for a layer that cannot be opened, or whose format is nowhere told.
    """
    chain: list[Image] = []
    for _ in range(MOST_LAYERS):
        image = Image("", image_format, file, _protocol(file), None, 0, 0)
        chain.append(image)
        found = await info(image)
        named = backing_name(file) if image_format == "qcow2" else None
        if named is None or named.startswith("json:"):
            break
        if (below := found.get("backing-filename-format")) is None:
            raise ImageError(f"{file}: its header does not tell the format of {named}")
        file, image_format = file.parent / named.removeprefix("file:"), str(below)
    return tuple(chain)


def _protocol(file: Path) -> str:
    return "host_device" if file.is_block_device() else "file"


async def measure(images: tuple[Image, ...], image_format: str, options: str) -> int:
    """Bytes a full copy of the chain would allocate (``qemu-img measure``)."""
    arguments = ["-U", "--output=json", "-O", image_format, "-o", options]
    required: int = json.loads(await _qemu_img("measure", *arguments, image_spec(images)))[
        "required"
    ]
    return required


@dataclass(frozen=True)
class Backing:
    """What an image's header says of the one below it."""

    name: Path
    format: str

    @property
    def arguments(self) -> tuple[str, ...]:
        return ("-b", str(self.name), "-F", self.format)


async def create(
    path: Path,
    image_format: str,
    options: str,
    virtual_size: int,
    backing: Backing | None = None,
) -> None:
    """Make an empty image of ``virtual_size`` bytes; what lies below need not be there yet."""
    below = ("-u", *backing.arguments) if backing else ()
    await _qemu_img(
        *("create", "-f", image_format, "-o", options, *below, str(path), str(virtual_size))
    )


async def rebase(path: Path, onto: Backing, *, pace: Pace, report: Callable[[float], None]) -> None:
    """Write into a qcow2 image what its chain has above ``onto``, then have it lie on that.

    ``report`` gets percents. Nobody else may have the image open.
    """
    arguments = ("rebase", "-p", "-f", "qcow2", "-t", CACHE, *onto.arguments, str(path))
    await _qemu_img(*arguments, report=report, pace=pace, written=path)


async def resize(path: Path, image_format: str, virtual_size: int, preallocation: str) -> None:
    """Grow or shrink an image nobody has open to ``virtual_size`` bytes.

    qemu-img takes a preallocation other than "off" only for an image that grows.
    """
    await _qemu_img(
        *("resize", "-f", image_format, "--shrink", "--preallocation", preallocation),
        *(str(path), str(virtual_size)),
    )


async def convert(
    images: tuple[Image, ...],
    path: Path,
    image_format: str,
    options: str,
    *,
    pace: Pace,
    report: Report,
) -> None:
    """Copy what a chain shows into a new image at ``path`` (``qemu-img convert``).

    It is read through the page cache: a base that many guests read is often in it.
    """
    total = images[0].virtual_size
    await _qemu_img(
        *("convert", "-p", "-W", "-m", "16", "-t", CACHE, "-T", "writeback"),
        *("-O", image_format, "-o", options, image_spec(images), str(path)),
        report=lambda percent: report(int(total * percent / 100), total),
        pace=pace,
        written=path,
    )


async def commit(
    overlay: Path,
    into: Path,
    image_format: str,
    *,
    pace: Pace,
    report: Callable[[float], None],
) -> None:
    """Write what ``overlay``, a qcow2 image, itself holds into ``into`` (``qemu-img commit``).

    ``report`` gets percents. Nobody else may have either open.
    """
    backing = Backing(into, image_format)
    await _qemu_img("rebase", "-u", "-f", "qcow2", *backing.arguments, str(overlay))
    options = ("-p", "-d", "-f", "qcow2", "-t", CACHE)
    await _qemu_img("commit", *options, str(overlay), report=report, pace=pace, written=into)


async def differ(images: tuple[Image, ...], path: Path, image_format: str) -> str:
    """Where a chain and an image show different contents, "" if nowhere (``qemu-img compare``).

    Nobody may write to them meanwhile.
    """
    return await _compare("-F", image_format, image_spec(images), str(path))


def nbd(socket: Path, export: str) -> str:
    """An NBD export on a unix socket, as qemu-img is told of it."""
    server = {"type": "unix", "path": str(socket)}
    file = {"driver": "nbd", "server": server, "export": export}
    return "json:" + json.dumps({"driver": "raw", "file": file})


async def compare(
    images: tuple[Image, ...], other: str, pace: Pace, report: Callable[[float], None]
) -> str:
    """As `differ`, of a chain and what ``other`` describes, reading the chain at ``pace``.

    ``report`` gets percents.
    """
    pace.delay(0)  # it counts from here
    return await _compare(
        "-p", image_spec(images), other, pace=pace, report=report, counted=_read_so_far
    )


async def where_they_differ(
    image: Backing, other: str, virtual_size: int, scratch: Path, pace: Pace
) -> list[range]:
    """Where a chain, by its headers, and what ``other`` describes show different contents: bytes,
    by whole clusters of 64 KiB. ``scratch`` takes what differs, and is removed.

    Source: ``qemu-img rebase`` writes it into an overlay, of which ``qemu-img map`` tells.
    """
    scratch.unlink(missing_ok=True)
    try:
        over = ("-u", "-b", other, "-F", "raw", str(scratch), str(virtual_size))
        await _qemu_img("create", "-f", "qcow2", *over)
        onto = ("-U", "-f", "qcow2", *image.arguments, str(scratch))
        await _qemu_img("rebase", *onto, pace=pace, counted=_read_so_far)
        mapped = await _qemu_img("map", "-U", "--output=json", "-f", "qcow2", str(scratch))
    finally:
        scratch.unlink(missing_ok=True)
    own = [extent for extent in json.loads(mapped) if extent["depth"] == 0]
    found: list[range] = []
    for extent in own:
        start, end = extent["start"], extent["start"] + extent["length"]
        if found and found[-1].stop == start:
            start = found.pop().start
        found.append(range(start, end))
    return found


async def read_a_little(image: str) -> None:
    """Can an image be read, one that qemu-img is told of? Raises `ImageError`."""
    await _qemu_img("bench", "-c", "1", "-d", "1", "-s", "512", image)


async def _compare(*arguments: str, **how: Any) -> str:
    try:
        await _qemu_img("compare", "-U", *arguments, **how)
    except Exited as error:
        if error.code != DIFFERENT:
            raise
        return error.output[error.output.rfind("\r") + 1 :].removeprefix("%)").strip()
    return ""


async def reads_as_zeros(path: Path, image_format: str) -> bool:
    """Does an image without a backing file show nothing but zeros, as far as its metadata tells
    (``qemu-img map``)? Nobody may have it open to write.
    """
    extents = json.loads(await _qemu_img("map", "--output=json", "-f", image_format, str(path)))
    return all(extent["zero"] for extent in extents)


@dataclass(frozen=True)
class Checked:
    """What ``qemu-img check`` found: ``leaks`` are clusters that nothing uses, they cost space
    only; ``corruptions`` are worse.
    """

    corruptions: int
    leaks: int


async def check(image: Image) -> Checked | None:
    """Does an image's metadata add up (``qemu-img check``)? None: the format has no check.

    Nobody may write to it meanwhile. Nothing is repaired. Raises `ImageError`.
    """
    try:
        answer = await _qemu_img("check", "-U", "--output=json", image_spec((image,)))
    except Exited as error:
        if error.code == NO_CHECK:
            return None
        if error.code not in (CORRUPT, LEAKING):
            raise
        answer = error.output
    found: dict[str, int] = json.loads(answer)
    return Checked(found.get("corruptions", 0), found.get("leaks", 0))


def backing_name(path: Path) -> str | None:
    """The backing file that a qcow2 header names; None for another format or without one.

    Source: QEMU's docs/interop/qcow2.txt, bytes 8 to 19 of the header.
    """
    with path.open("rb") as file:
        header = file.read(20)
        if len(header) < 20 or header[:4] != QCOW2_MAGIC:
            return None
        offset, size = struct.unpack(">QI", header[8:20])
        if not offset or size > 1023:
            return None
        file.seek(offset)
        name = file.read(size).partition(b"\0")[0]  # QEMU takes it for a C string
        return name.decode(errors="surrogateescape")


def header_fault(path: Path) -> str | None:
    """What is wrong with a qcow2 image by its header; None if nothing is.

    Source: QEMU's docs/interop/qcow2.txt, incompatible features, bit 1.
    """
    with path.open("rb") as file:
        header = file.read(80)
    if len(header) < 72 or header[:4] != QCOW2_MAGIC:
        return "has no qcow2 header"
    (version,) = struct.unpack_from(">I", header, 4)
    corrupt = version > 2 and struct.unpack_from(">Q", header, 72)[0] & 1 << 1
    return "is marked corrupt" if corrupt else None


async def _qemu_img(
    *arguments: str,
    report: Callable[[float], None] | None = None,
    pace: Pace | None = None,
    written: Path | None = None,
    counted: Callable[[int], int] | None = None,
) -> str:
    process = await asyncio.create_subprocess_exec(
        *("setpriv", "--pdeathsig", "KILL", "qemu-img", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout and process.stderr
    try:
        async with asyncio.TaskGroup() as group:
            errors = group.create_task(process.stderr.read(), name="qemu-img errors")
            output = group.create_task(_read(process.stdout, report), name="qemu-img output")
            pacing = group.create_task(
                _keep_pace(process.pid, pace or Pace(), counted or _written), name="qemu-img pace"
            )
            clean = group.create_task(_keep_cache_clean(written), name="qemu-img page cache")
            await process.wait()
            pacing.cancel()
            clean.cancel()
    except BaseException:  # a cancellation too: what it writes is about to be removed
        if process.returncode is None:
            _kill(process.pid)
            await asyncio.shield(process.wait())
        raise
    if process.returncode:
        text = errors.result().decode(errors="replace").strip()
        message = f"qemu-img {arguments[0]}: {text or f'exit {process.returncode}'}"
        if "No space left on device" in text:
            raise NoSpace(message)
        raise Exited(message, process.returncode, output.result())
    return output.result()


async def _keep_pace(pid: int, pace: Pace, counted: Callable[[int], int]) -> None:
    """Stop and continue a process so that it writes or reads no faster: its own limit is for life.

    Signals go by a pidfd: asyncio's own ``send_signal`` may reap the process that asyncio
    waits for, and its exit code is lost.
    """
    with suppress(ProcessLookupError), _pidfd(pid) as fd:
        stopped = False
        while True:
            left = pace.delay(counted(pid))
            if stopped is not (left > 0):
                stopped = not stopped
                signal.pidfd_send_signal(fd, signal.SIGSTOP if stopped else signal.SIGCONT)
            nap = left if stopped else SHORT_NAP if pace.rate else LONGEST_NAP
            await asyncio.sleep(min(nap, LONGEST_NAP))


async def _keep_cache_clean(written: Path | None) -> None:
    while written:
        await asyncio.sleep(LONGEST_NAP)
        await asyncio.to_thread(write_behind, written)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError), _pidfd(pid) as fd:
        signal.pidfd_send_signal(fd, signal.SIGKILL)


@contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def _written(pid: int) -> int:
    """Bytes a process has written so far, whatever became of them."""
    return _io(pid, "wchar")


def _read_so_far(pid: int) -> int:
    """Bytes a process has read from files so far, be they of a disk or of the page cache."""
    return _io(pid, "rchar")


def _io(pid: int, count: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return int(dict(line.split(": ") for line in lines)[count])


async def _read(stream: asyncio.StreamReader, report: Callable[[float], None] | None) -> str:
    text = ""
    while chunk := await stream.read(4096):
        text += chunk.decode(errors="replace")
        if report and (percent := PERCENT.findall(text)):
            report(float(percent[-1]))
            text = text[text.rindex("%)") :]
    return text
