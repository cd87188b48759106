"""A linked clone becomes a full clone while its guest writes; all that is shown is proven.

Two guests, web and mail, run on linked clones of one base. Both write numbered records with
checksums, and say over their serial ports which are durable. web is promoted. Then its base
is taken away, its plug is pulled, and it boots again by the command line it always had. At
the end every record that either guest was told is durable must be on its disk.

`ci/demo` runs this. The exit code is 0 only when every claim held. `ci/demo --picture FILE` draws
what the terminal shows as an SVG, too: docs/demo.svg.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tests import records, vm
from tests.runbooks import without_other_peoples_processes
from tests.vm import VM, Disk

WIDTH = 104
# rich's own, without a font that a reader would have to fetch.
PICTURE = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px; }}
.{unique_id}-title {{ font-family: sans-serif; font-size: 18px; }}
{styles}
</style>
<defs>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">
{backgrounds}
<g class="{unique_id}-matrix" xml:space="preserve">
{matrix}
</g>
</g>
</svg>
"""


class Screen:
    """The terminal. What is to be a picture has names that are not others at each time."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.names: dict[str, str] = {}

    def record(self) -> None:
        self.console = Console(highlight=False, record=True, width=WIDTH)

    def draw(self, picture: Path) -> None:
        svg = self.console.export_svg(title="ci/demo", code_format=PICTURE, unique_id="demo")
        picture.write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE))

    def say(self, text: str) -> None:
        if self.console.record:
            for real, shown in self.names.items():
                text = text.replace(real, shown)
            text = without_other_peoples_processes(text + "\n").rstrip("\n")
            text = re.sub(r" +$", "", text, flags=re.MULTILINE)
            text = re.sub(r"\b[0-9a-f]{8}\b", "6b417bf7", text)
            text = re.sub(r"\bpid \d+", "pid 4242", text)
        self.console.print(text)


screen = Screen()
say = screen.say


class Unproven(Exception):
    """A claim of the demonstration does not hold."""


@dataclass(frozen=True)
class Promoted:
    """How the promotion was for the guest: records it wrote meanwhile, times in seconds."""

    duration_s: float
    records: int
    longest_write_s: float


def step(text: str) -> None:
    say(f"\n[bold]{escape(text)}[/]")


def prove(claim: bool, text: str) -> None:
    if not claim:
        raise Unproven(text)
    say(f"[green]proven:[/] {escape(text)}")


def promoter(*words: object) -> None:
    """Runs promoter on this terminal, as an operator does; for a picture without its bars."""
    command = ["promoter", *map(str, words)]
    say(f"$ {escape(' '.join(command))}")
    out = subprocess.PIPE if screen.console.record else None
    done = subprocess.run(command, check=False, stdout=out, text=True)
    if done.stdout:
        say(escape(done.stdout.rstrip()))
    if done.returncode:
        raise Unproven(f"{' '.join(command)} ends with 0, not with {done.returncode}")


def guest_on_a_clone(base: Path, name: str, seed: int) -> VM:
    directory = base.parent / name
    directory.mkdir()
    disk = vm.linked_clone(base, directory / f"{name}.qcow2")
    guest = VM(directory, [Disk(disk)], writer={"seed": seed})
    screen.names |= {str(guest.monitor): f"/run/vm/{name}.qmp", str(base.parent): "/vm"}
    return guest


def disk_of(guest: VM) -> Path:
    return guest.disks[0].path


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def has_open(guest: VM, file: Path) -> bool:
    """Has the guest's QEMU this file open, under whatever name?"""
    opened = Path(f"/proc/{guest.pid}/fd").iterdir()
    return any(fd.exists() and fd.samefile(file) for fd in opened)


def backing_file(disk: Path) -> str | None:
    found: dict[str, str] = json.loads(vm.qemu_img("info", "-U", "--output=json", disk))
    return found.get("backing-filename")


def promote(web: VM) -> Promoted:
    before, began = len(web.acks()), time.monotonic()
    promoter("promote", web.monitor)
    duration, written = time.monotonic() - began, len(web.acks()) - before
    web.wait_for_acks(10)  # one may have begun before the end and be acknowledged after it
    longest = max(ack.latency_s for ack in web.acks()[before:])
    return Promoted(duration, written, longest)


def go_on_without_the_base(web: VM, mail: VM, base: Path) -> None:
    prove(not has_open(web, base), "web's QEMU does not have the base open any more")
    prove(has_open(mail, base), "mail's QEMU has it open")
    away = base.rename(base.with_name("taken-away"))
    web.wait_for_acks(100)
    prove(not base.exists(), "the base is gone, and web goes on writing")
    step("Pull web's plug (SIGKILL), boot it by its old command line, still without the base.")
    web.kill()
    web.start()
    web.wait_for_acks(100)
    promoter("chain", web.monitor)
    alone = has_open(web, disk_of(web)) and backing_file(disk_of(web)) is None
    prove(alone and not base.exists(), "web runs from a full clone, under the old path")
    away.rename(base)


def reboot(mail: VM) -> None:
    mail.kill()
    mail.start()
    mail.wait_for_acks(100)
    prove(mail.running, "mail goes on writing")


def check_image(disk: Path) -> None:
    """Leaked clusters, exit code 3, are what a pulled plug leaves; nothing else is let pass."""
    command = ["qemu-img", "check", "-f", "qcow2", str(disk)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    prove(done.returncode in (0, 3), f"{disk.name} is consistent (qemu-img check)")


def check_records(guest: VM) -> int:
    """How many records were acknowledged, if every one is on the disk."""
    report = records.check(disk_of(guest), "qcow2", guest.log)
    prove(not report.findings, f"{disk_of(guest).name}: {report}")
    return report.records


def demonstrate(directory: Path) -> list[str]:
    """The whole demonstration; what it has shown, in sentences."""
    base = Path(shutil.copyfile(vm.base(), directory / "base.qcow2"))
    original = sha256(base)

    step("Boot two guests, web and mail, on linked clones of one base. Both write.")
    with guest_on_a_clone(base, "web", 1) as web, guest_on_a_clone(base, "mail", 2) as mail:
        for guest in (web, mail):
            guest.wait_for_acks(200)
        promoter("chain", web.monitor)
        step("Promote web while it writes.")
        promoted = promote(web)
        say(
            f"web wrote {promoted.records} records meanwhile,"
            f" the longest write took {promoted.longest_write_s * 1000:.0f} ms"
        )
        promoter("chain", web.monitor)
        step("Take the base away: only what mail's QEMU has open leads to it now.")
        go_on_without_the_base(web, mail, base)
        step("Put the base back; pull mail's plug and boot it, too.")
        reboot(mail)
        step("Shut both down and look at what is on the disks.")
        for guest in (web, mail):
            guest.shutdown()

    kept = {name: check_records(guest) for name, guest in (("web", web), ("mail", mail))}
    for guest in (web, mail):
        check_image(disk_of(guest))
    prove(backing_file(disk_of(web)) is None, "web.qcow2 has no backing file")
    prove(backing_file(disk_of(mail)) == str(base), "mail.qcow2 is still a clone of the base")
    prove(sha256(base) == original, "the base is byte for byte what it was")
    return [
        "web and mail were linked clones of one base. web was made a full clone while it ran:",
        f"it took {promoted.duration_s:.1f} s, web wrote {promoted.records} records meanwhile,"
        f" and none of its writes took longer than {promoted.longest_write_s * 1000:.0f} ms.",
        "Then the base was taken away: web went on, lost its power, and booted its new disk.",
        f"All {kept['web']} records that web was told are durable are on its disk,",
        f"and all {kept['mail']} of mail's, which still is a clone of the base.",
        "The base is unchanged, and both disks are consistent.",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="ci/demo")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the terminal as an SVG")
    picture: Path | None = parser.parse_args().picture
    if picture:
        screen.record()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="promoter-demo-") as name:
        os.environ["PROMOTER_STATE_DIR"] = f"{name}/state"
        try:
            shown = demonstrate(Path(name))
        except Unproven as error:
            say(f"\n[bold red]The demonstration failed.[/] Not so: {escape(str(error))}")
            return 1
    step("What this showed")
    say("\n".join(shown))
    say(f"Everything was proven, in {time.monotonic() - began:.0f} s.")
    if picture:
        screen.draw(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
