"""``promoter hook``: libvirt asks for a domain's disks before it starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from promoter.cli import run as running
from promoter.cli.lease import Json, State, Timeout, Voice
from promoter.cli.output import choose
from promoter.lease.credentials import Credentials
from promoter.lease.host import this_host
from promoter.lease.ledger import Ledger

hook_app = typer.Typer(help="Leases for the disks of libvirt's domains.", no_args_is_help=True)
HOOKS = Path("/etc/libvirt/hooks")


@hook_app.command()
def install(
    state: State,
    directory: Annotated[
        Path, typer.Option("--hooks", metavar="DIR", help="libvirt's directory of hooks.")
    ] = HOOKS,
    timeout: Timeout = 30,
    as_json: Json = False,
) -> None:
    """Have libvirt hold a domain's disks under leases while it runs.

    A domain whose disk another host holds and keeps does not start. Restart libvirtd once
    after this: it looks for hooks when it starts.
    """
    from promoter.lease import hook

    voice = Voice(as_json=as_json)

    async def work() -> None:
        made = hook.install(directory, Path(sys.executable), state, timeout)
        voice.event(
            "result",
            f"{made}: restart libvirtd, that it is found",
            operation="hook install",
            hook=made,
            exit_code=0,
        )

    running.finish(work(), choose(as_json=as_json, quiet=False, verbose=False))


@hook_app.command(hidden=True)
def run(
    state: State,
    name: str,
    operation: str,
    step: str,
    more: str,
    timeout: Timeout = 30,
) -> None:
    """What libvirt calls. It says what it has to say on standard error, which libvirt shows."""
    from promoter.lease import hook

    async def work() -> None:
        domain, host = hook.parse(sys.stdin.read()), this_host(state)
        holder = hook.Holder(domain, host, Ledger(state, host.name), Credentials.of(state))
        if operation == "prepare":
            holder.claim(timeout)
        elif operation == "release":
            for error in holder.free():
                sys.stderr.write(f"promoter: {error.message}\n")

    running.finish(work(), choose(as_json=False, quiet=False, verbose=False))
