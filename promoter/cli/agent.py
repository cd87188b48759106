"""``promoter agent``: the network's door to the disks that this host holds.

aiohttp and cryptography are loaded by the commands that need them alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from promoter.cli import run as running
from promoter.cli.lease import Json, State, Voice
from promoter.cli.output import choose
from promoter.errors import Refused
from promoter.lease.credentials import Credentials
from promoter.lease.host import agent_directory, this_host
from promoter.lease.ledger import Ledger
from promoter.lease.rules import Role
from promoter.lease.unit import unit

agent_app = typer.Typer(help="Answer other hosts' requests over the network.", no_args_is_help=True)


@agent_app.command()
def init(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where the certificate authority is, or will be.")
    ],
    host: Annotated[str, typer.Option(metavar="HOST", help="The host's name in leases.")],
    endpoint: Annotated[
        str, typer.Option(metavar="ADDRESS:PORT", help="Where its agent will listen.")
    ],
    roles: Annotated[
        list[Role] | None,
        typer.Option("--role", help="For what it may ask; repeatable. Default: request."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, metavar="N", help="For how long.")] = 365,
    as_json: Json = False,
) -> None:
    """Make a host's key and certificate.

    And the private authority, if it is not there. What is in DIR/HOST then goes to that host, into
    STATE-DIR/agent. Keep DIR/ca.key elsewhere.
    """
    voice = Voice(as_json=as_json)

    async def work() -> None:
        from promoter.lease import certificates

        certificates.authority(directory)
        made = certificates.issue(directory, host, endpoint, roles or [Role.REQUEST], days)
        voice.event(
            "result",
            f"{made}: copy it to host {host} as STATE-DIR/agent",
            operation="agent init",
            directory=made,
            exit_code=0,
        )

    running.finish(work(), choose(as_json=as_json, quiet=False, verbose=False))


@agent_app.command()
def revoke(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where the certificate authority is.")
    ],
    host: Annotated[str, typer.Option(metavar="HOST", help="The host's name in leases.")],
    as_json: Json = False,
) -> None:
    """Believe a host's certificates no more.

    DIR/revoked then goes to every other host. It is STATE-DIR/agent/revoked there, and takes effect
    at once. A later init gives the host another certificate, which is not on the list.
    """
    voice = Voice(as_json=as_json)

    async def work() -> None:
        from promoter.lease import certificates

        made = certificates.revoke(directory, host)
        voice.event(
            "result",
            f"{made}: copy it to every host as STATE-DIR/agent/revoked",
            operation="agent revoke",
            list=made,
            exit_code=0,
        )

    running.finish(work(), choose(as_json=as_json, quiet=False, verbose=False))


@agent_app.command("run")
def run_agent(state: State, as_json: Json = False) -> None:
    """Answer requests, and beat for what this host holds, until SIGTERM."""
    voice = Voice(as_json=as_json)

    async def work() -> None:
        from promoter.lease.agent import Agent

        host, credentials = this_host(state), Credentials.of(state)
        if credentials is None:
            raise Refused(
                f"there is no certificate in {agent_directory(state)}",
                "Make one: promoter agent init --help",
            )
        credentials.check(host.name)

        def say(event: str, text: str) -> None:
            voice.event(event, f"promoter: {event}: {text}", text=text)

        await Agent(host, credentials, Ledger(state, host.name), say).run()

    running.finish(work(), choose(as_json=as_json, quiet=False, verbose=False))


@agent_app.command("unit")
def show_unit(
    state: State,
    pools: Annotated[
        list[Path], typer.Option("--pool", metavar="DIR", help="Where disks are; repeatable.")
    ],
) -> None:
    """Print a systemd unit for the agent.

    It may write in the pools and the state, no more.
    """

    async def work() -> None:
        sys.stdout.write(unit(Path(sys.executable), state, pools))

    running.finish(work(), choose(as_json=False, quiet=False, verbose=False))
