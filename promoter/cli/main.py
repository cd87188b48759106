"""``promoter``: the commands."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.models import CommandInfo

from promoter.cli import agent, hook, lease, run
from promoter.cli.config import configure
from promoter.cli.output import choose
from promoter.cli.units import parse_cluster_size, parse_duration, parse_speed
from promoter.guests.base import DEFAULT_URI
from promoter.operations import consolidate as consolidation
from promoter.operations import promote as promotion
from promoter.operations import snapshot as snapshots
from promoter.operations.journal import Journal, state_directory
from promoter.operations.move import Choices, CopyMode, Loss, Old, OnFull
from promoter.storage.seed import LEAST_EXTENDED, Preallocation, SeedMethod

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes leave 80 columns no room for what options do
    context_settings={"help_option_names": ["-h", "--help"]},
)
job_app = typer.Typer(help="Operations, running and past.", no_args_is_help=True)
app.add_typer(job_app, name="job")
app.add_typer(lease.lease_app, name="lease")
app.add_typer(agent.agent_app, name="agent")
app.add_typer(hook.hook_app, name="hook")


class Seed(StrEnum):
    """What ``--seed`` takes."""

    AUTO = "auto"
    REFLINK = "reflink"
    COPY = "copy"
    CONVERT = "convert"
    NONE = "none"


class Format(StrEnum):
    """What ``--format`` takes."""

    QCOW2 = "qcow2"
    RAW = "raw"


def _check_layout(
    image_format: Format,
    cluster_size: str | None,
    extended_l2: bool | None,
    preallocation: Preallocation,
) -> None:
    if image_format is Format.RAW:
        if cluster_size or extended_l2 or preallocation is Preallocation.METADATA:
            raise typer.BadParameter("a raw image has no clusters and no metadata")
    elif extended_l2 and cluster_size and parse_cluster_size(cluster_size) < LEAST_EXTENDED:
        raise typer.BadParameter("--extended-l2 needs a --cluster-size of 16k or more")


Guest = Annotated[
    str, typer.Argument(metavar="GUEST", help="A libvirt domain, or the path of a QMP socket.")
]
Connect = Annotated[
    str,
    typer.Option(
        "--connect", "-c", metavar="URI", envvar="LIBVIRT_DEFAULT_URI", help="libvirt, for domains."
    ),
]
Scan = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="DIR",
        exists=True,
        file_okay=False,
        readable=False,
        help="Look for overlays there too, and in all directories below; repeatable.",
    ),
]
Disks = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[DISK]...", help="Target (vda), device id or node-name; default: every disk."
    ),
]
Speed = Annotated[
    str, typer.Option(metavar="RATE", help="Limit in bytes a second: 50M, 1GiB/s; 0: none.")
]
OldFiles = Annotated[
    Old, typer.Option("--old", help="What becomes of the files that are not needed any more.")
]
MaxPause = Annotated[
    str, typer.Option(metavar="DURATION", help="The guest stands still this long at most.")
]
Quiesce = Annotated[
    bool,
    typer.Option("--quiesce", help="Have the guest agent freeze the file systems for it."),
]
Verify = Annotated[
    bool,
    typer.Option("--verify", help="Prove that old and new disk are the same, as of the switch."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan only.")]
Identity = Annotated[str, typer.Argument(metavar="ID", help="An operation's id.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say each step.")]
State = Annotated[
    Path,
    typer.Option(
        "--state-dir",
        metavar="DIR",
        envvar="PROMOTER_STATE_DIR",
        default_factory=state_directory,
        help="Where the journal is kept.",
        show_default="/var/lib/promoter, or ~/.local/state/promoter",
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from promoter.guests.versions import versions

        typer.echo(versions(), nl=False)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Show promoter's version, and QEMU's and libvirt's on this host.",
        ),
    ] = False,
) -> None:
    """Change the disks of virtual machines while they run."""
    configure(context)


@app.command()
def chain(
    guest: Guest, connect: Connect = DEFAULT_URI, scan: Scan = None, as_json: Json = False
) -> None:
    """Show the chain of images of each disk, and who reads them.

    As the running QEMU has them; of a libvirt domain also what libvirt believes, where that
    differs. Readers are processes of this host, and qcow2 overlays, running or not, in the
    directories of the images.
    """
    output = choose(as_json=as_json, quiet=False, verbose=False)

    async def work() -> None:
        output.chains(guest, *await run.look(guest, connect, scan or ()))

    run.finish(work(), output)


@app.command()
def promote(
    guest: Guest,
    state: State,
    disks: Disks = None,
    connect: Connect = DEFAULT_URI,
    target: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The new disk's file; default: see above.")
    ] = None,
    target_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory for the new disks, under their own names."),
    ] = None,
    image_format: Annotated[
        Format, typer.Option("--format", help="The new disk's format.")
    ] = Format.QCOW2,
    cluster_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of the new qcow2: 512 to 2M; default: as it is."),
    ] = None,
    extended_l2: Annotated[
        bool | None,
        typer.Option(
            "--extended-l2/--no-extended-l2",
            help="Subclusters in the new qcow2; default: as it is.",
            show_default=False,
        ),
    ] = None,
    preallocation: Annotated[
        Preallocation, typer.Option(help="What of the new disk to allocate at once.")
    ] = Preallocation.OFF,
    seed: Annotated[
        Seed, typer.Option(help="How the base is copied; none: all by the mirror.")
    ] = Seed.AUTO,
    copy_mode: Annotated[
        CopyMode, typer.Option(help="When a guest's write reaches the new disk.")
    ] = CopyMode.WRITE_BLOCKING,
    speed: Speed = "0",
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Disks to seed at once; default: one on each file system."
        ),
    ] = None,
    lose: Annotated[
        list[Loss] | None, typer.Option(help="What the new disk may be without; repeatable.")
    ] = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Finish a copy of a domain's disk that runs already.")
    ] = False,
    verify: Verify = False,
    old: OldFiles = Old.ASIDE,
    on_full: Annotated[
        OnFull,
        typer.Option(help="When there is no room: wait for some, or put all back, with code 5."),
    ] = OnFull.WAIT,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Turn running linked clones into full clones.

    A plain guest's by default in place: the path that its command line names becomes the full
    clone. A domain's beside its old disk: libvirt's definition gets the new name. The old overlay
    is kept.
    """
    if target and target_dir:
        raise typer.BadParameter("--target and --target-dir exclude each other")
    if adopt and (target or target_dir or seed is not Seed.AUTO):
        raise typer.BadParameter("--adopt takes the copy as it is: no --target, no --seed")
    _check_layout(image_format, cluster_size, extended_l2, preallocation)
    choices = Choices(
        disks=tuple(disks or ()),
        target=target,
        target_dir=target_dir,
        format=image_format.value,
        cluster_size=parse_cluster_size(cluster_size) if cluster_size else None,
        extended_l2=extended_l2,
        preallocation=preallocation,
        seed=None if seed is Seed.AUTO else SeedMethod(seed.value),
        speed=parse_speed(speed),
        copy_mode=copy_mode,
        parallel=parallel,
        lose=tuple(lose or ()),
        old=old,
        adopt=adopt,
        on_full=on_full,
        verify=verify,
    )
    output = choose(as_json=as_json, quiet=quiet, verbose=verbose)
    work = run.perform(promotion.plan, guest, connect, choices, state, output, dry_run=dry_run)
    run.finish(work, output)


@app.command()
def consolidate(
    guest: Guest,
    state: State,
    disks: Disks = None,
    connect: Connect = DEFAULT_URI,
    base: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER", help="Merge into this layer; default: the lowest own one."),
    ] = None,
    top: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER", help="Merge from this layer down; default: the active one."),
    ] = None,
    beside: Annotated[
        bool,
        typer.Option(
            "--beside", help="Onto a new disk above what is shared; no layer is written to."
        ),
    ] = False,
    target: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --beside: the new disk's file.")
    ] = None,
    target_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --beside: directory for the new disks.")
    ] = None,
    scan: Scan = None,
    speed: Speed = "0",
    max_pause: MaxPause = "500ms",
    verify: Verify = False,
    old: OldFiles = Old.ASIDE,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Merge the deltas that snapshots left, while the guest writes.

    By default everything above the lowest layer that only this guest reads goes into that one.
    A layer that others read is never written to. LAYER is a file, a file's name or a node-name;
    name one for each disk.
    """
    if beside and top:
        raise typer.BadParameter("--beside merges from the active layer: leave out --top")
    if (target or target_dir) and not beside:
        raise typer.BadParameter("--target and --target-dir need --beside")
    if verify and not beside:
        raise typer.BadParameter("--verify needs --beside: a merge in place leaves no old chain")
    choices = Choices(
        disks=tuple(disks or ()),
        target=target,
        target_dir=target_dir,
        beside=beside,
        base=tuple(base or ()),
        top=tuple(top or ()),
        scan=tuple(scan or ()),
        speed=parse_speed(speed),
        max_pause=parse_duration(max_pause),
        verify=verify,
        old=old,
    )
    output = choose(as_json=as_json, quiet=quiet, verbose=verbose)
    work = run.perform(consolidation.plan, guest, connect, choices, state, output, dry_run=dry_run)
    run.finish(work, output)


@app.command()
def snapshot(
    guest: Guest,
    state: State,
    disks: Disks = None,
    connect: Connect = DEFAULT_URI,
    quiesce: Quiesce = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Freeze the disks at one instant; go on in overlays."""
    choices = Choices(disks=tuple(disks or ()), quiesce=quiesce)
    output = choose(as_json=as_json, quiet=quiet, verbose=verbose)
    work = run.perform(snapshots.plan, guest, connect, choices, state, output, dry_run=dry_run)
    run.finish(work, output)


@app.command()
def backup(
    guest: Guest,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the copies go.")],
    state: State,
    disks: Disks = None,
    connect: Connect = DEFAULT_URI,
    since: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Only what differs from this backup, or the 'last' one."),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Remove all but the newest N of each disk."),
    ] = None,
    quiesce: Quiesce = False,
    scan: Scan = None,
    speed: Speed = "0",
    max_pause: MaxPause = "500ms",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Snapshot, copy what it froze, compare, merge the delta again.

    The copies are whole images; with --since each is an overlay on an earlier one.
    """
    choices = Choices(
        disks=tuple(disks or ()),
        speed=parse_speed(speed),
        scan=tuple(scan or ()),
        max_pause=parse_duration(max_pause),
        quiesce=quiesce,
    )
    output = choose(as_json=as_json, quiet=quiet, verbose=verbose)
    work = run.back_up(guest, connect, choices, directory, since, keep, state, output)
    run.finish(work, output)


@app.command()
def doctor(
    state: State,
    guest: Annotated[
        str | None,
        typer.Argument(
            metavar="[GUEST]",
            help="A libvirt domain, or the path of a QMP socket; default: this host.",
        ),
    ] = None,
    connect: Connect = DEFAULT_URI,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what is certainly promoter's own.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what is wrong with a guest's disks, or on this host.

    And what would mend it. The exit code is that of the gravest: 8 images, or pictures of them,
    that do not agree; 9 half done; 3 not reachable; 10 a lease; 5 no space; 4 promoter would
    refuse.
    """
    from promoter.cli.doctor import Doctor

    output = choose(as_json=as_json, quiet=False, verbose=False)
    visit = Doctor(guest, connect, state, output, as_json=as_json).visit(repair=repair)
    run.finish(visit, output)


@app.command("report")
def show_report(
    identity: Identity,
    state: State,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it as a page of HTML instead.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what happened in an operation.

    Its chains before and after, times, rates, faults, what was done about them, and the proof.
    """
    output = choose(as_json=as_json, quiet=False, verbose=False)
    run.finish(run.report(identity, state, output, html), output)


@job_app.command("list")
def list_jobs(
    state: State,
    prometheus: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write metrics there, for a textfile collector."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the operations of this host, the newest last."""
    output = choose(as_json=as_json, quiet=False, verbose=False)
    run.finish(run.list_operations(state, output, prometheus), output)


@job_app.command("show")
def show_job(identity: Identity, state: State, as_json: Json = False) -> None:
    """Show what an operation intended and did."""
    output = choose(as_json=as_json, quiet=False, verbose=False)

    async def work() -> None:
        journal = Journal(state)
        entry = journal.entry(identity)
        output.operation_steps(entry, journal.steps(entry.id))

    run.finish(work(), output)


@job_app.command("speed")
def change_speed(
    identity: Identity,
    rate: Annotated[str, typer.Argument(metavar="RATE", help="50M, 1GiB/s; 0: no limit.")],
    state: State,
    as_json: Json = False,
) -> None:
    """Limit a running operation to another speed."""
    output = choose(as_json=as_json, quiet=False, verbose=False)
    run.finish(run.change_speed(identity, parse_speed(rate, "RATE"), state, output), output)


@job_app.command("watch")
def watch_job(
    identity: Identity,
    state: State,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show a running operation until it ends.

    The exit code is the operation's. Ctrl-C ends only the watching.
    """
    output = choose(as_json=as_json, quiet=quiet, verbose=verbose)
    run.finish(run.watch(identity, state, output), output)


@job_app.command("pause")
def pause_job(identity: Identity, state: State, as_json: Json = False) -> None:
    """Have a running operation copy nothing; the guest runs on.

    `promoter job resume ID` has it go on.
    """
    output = choose(as_json=as_json, quiet=False, verbose=False)
    run.finish(run.ask(identity, "pause", state, output), output)


@job_app.command("cancel")
def cancel_job(identity: Identity, state: State, as_json: Json = False) -> None:
    """Have a running operation go back, unless its switchover has begun."""
    output = choose(as_json=as_json, quiet=False, verbose=False)
    run.finish(run.ask(identity, "cancel", state, output), output)


@job_app.command("undo")
def undo_job(
    identity: Identity,
    state: State,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Go back to the old chain, with what was written since.

    What has not switched is called off. After the switchover the guest must be shut down, and the
    new disk is kept.
    """
    output = choose(as_json=as_json, quiet=quiet, verbose=verbose)
    run.finish(run.undo(identity, state, output, dry_run=dry_run), output)


@job_app.command("resume")
def resume_job(
    state: State,
    identity: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Default: all that were interrupted.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Finish what was interrupted, or put it back.

    By what the guest and the files show. An operation that is paused goes on.
    """
    output = choose(as_json=as_json, quiet=quiet, verbose=verbose)
    run.finish(run.resume(identity, state, output), output)


app.command("run")(lease.run)


def main(words: Sequence[str]) -> None:
    """The command line. Where a command is named first, no other is made: that takes typer time,
    for each of their parameters.
    """
    commands = [known for known in app.registered_commands if _name(known) in words[:1]]
    groups = [known for known in app.registered_groups if known.name in words[:1]]
    if commands or groups:
        app.registered_commands, app.registered_groups = commands, groups
    app(words)


def _name(command: CommandInfo) -> str | None:
    return command.name or (command.callback and command.callback.__name__)
