"""The lease record: what is written down about a disk, and how it is read back. Pure.

A disk's lease is a line of records, numbered by epoch; the highest is the truth. `rules` has who
may write which one next. What is not exactly a record is refused, never guessed at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
from msgspec import Meta

from promoter.errors import Refused

VERSION = 1
LARGEST = 64 * 1024
LAST_EPOCH = 99_999_999

Identity = Annotated[str, Meta(pattern=r"^[0-9A-Za-z-]{1,64}\Z")]
Text = Annotated[str, Meta(max_length=1024)]
Pem = Annotated[str, Meta(max_length=8192)]
Number = Annotated[int, Meta(ge=0)]
Epoch = Annotated[int, Meta(ge=1, le=LAST_EPOCH)]
Seconds = Annotated[float, Meta(ge=0, le=86400)]


class BadRecord(Refused):
    """A record that is torn, unknown or does not add up: refused, never guessed at."""


class State(StrEnum):
    """What a disk's lease says of it."""

    HELD = "held"
    RELEASING = "releasing"
    FREE = "free"
    LOANED = "loaned"


@dataclass(frozen=True)
class DiskIdentity:
    """The file a lease is about. ``inode`` is pinned: a copy renamed over a live disk has
    none of its locks. ``device`` is only that of the host that wrote the record: device
    numbers of network storage differ from host to host.
    """

    uuid: Identity
    device: Number
    inode: Number


@dataclass(frozen=True)
class Owner:
    """Who holds a disk: a host in one of its boots, and there a process, which ``pid`` and
    ``started`` (of /proc/PID/stat, in clock ticks) tell from any other; without a process the
    host holds it until it says otherwise.
    """

    host: Identity
    boot: Identity
    pid: Number | None = None
    started: Number | None = None
    guest: Text | None = None
    endpoint: Text | None = None
    fingerprint: Text | None = None


@dataclass(frozen=True)
class Grant:
    """To whom a free disk was promised. It lapses when the record has stood unchanged for
    ``seconds``, as each observer times it on its own clock; None: never.
    """

    host: Identity
    request: Identity
    seconds: Seconds | None


@dataclass(frozen=True)
class Operation:
    """What changes the disk while its guest runs: an operation of its owner's host, at work as
    long as somebody there holds the lock on the file ``lock``.
    """

    id: Identity
    kind: Text
    lock: Text


@dataclass(frozen=True)
class Stamp:
    """What tells one writing of a record from another: ``nonce`` is unique, ``wall`` is the
    wall time for people only.
    """

    nonce: str
    wall: str


@dataclass(frozen=True)
class LeaseRecord:
    """One epoch of a disk's lease.

    ``readers`` are the overlays that read through this disk, as absolute paths. ``lender`` is
    who wants a loaned disk back, with the same bytes. ``request`` is the release request that
    is being served. ``note`` says why an operator broke a lease. ``alternate`` is the file that
    ``operation`` puts, or has put, in the place of ``disk``, by one rename: either may be found
    until the operation is over. Whatever ends the owner's holding settles it: then the disk is
    the one that was found. ``elsewhere`` is the path to which ``operation`` moves the disk, or from
    which it brings it here: each of the two files has a lease, which is the owner's, and names the
    other. When it is settled, the lease of the one that is not the disk is free and says where the
    disk is.
    """

    disk: DiskIdentity
    epoch: Epoch
    state: State
    owner: Owner | None
    nonce: Identity
    wall: Text
    lender: Owner | None = None
    grant: Grant | None = None
    request: Identity | None = None
    readers: Annotated[tuple[Text, ...], Meta(max_length=4096)] = ()
    note: Text = ""
    operation: Operation | None = None
    alternate: DiskIdentity | None = None
    elsewhere: Text | None = None

    def __post_init__(self) -> None:
        if fault := _fault(self):
            raise BadRecord(f"epoch {self.epoch} does not add up: {fault}")

    @property
    def responsible(self) -> Owner | None:
        """Who has the disk, or, when it is not with a borrower, wants it back."""
        return self.owner or self.lender


def _fault(record: LeaseRecord) -> str:
    owned = record.state in (State.HELD, State.RELEASING)
    if owned != (record.owner is not None):
        return f"{record.state} {'without' if owned else 'with'} an owner"
    if owned and record.grant:
        return f"{record.state} and granted"
    if record.state is State.RELEASING and not record.request:
        return "releasing without a request"
    if record.state is State.LOANED and not (record.lender and record.grant):
        return "loaned without lender and borrower"
    if record.operation and not owned:
        return f"{record.state} and worked on"
    if record.alternate and not record.operation:
        return "an alternate without an operation"
    if record.elsewhere and not (record.operation or record.state is State.FREE):
        return f"{record.state}, and elsewhere without an operation"
    return ""


# --- as bytes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proof:
    """That a request is of the host it names: its certificate, and its signature of `to_sign`
    in hexadecimal digits.
    """

    certificate: Pem
    signature: Text


@dataclass(frozen=True)
class Request:
    """Somebody asks for a disk. It is good for the epoch it names and no other."""

    id: Identity
    epoch: Epoch
    requester: Owner
    wall: Text
    proof: Proof | None = None


class Said(StrEnum):
    """What an owner answers."""

    RELEASED = "released"
    ACCEPTED = "accepted"
    BUSY = "busy"
    REFUSED = "refused"
    NOT_OWNER = "not_owner"


@dataclass(frozen=True)
class Answer:
    """An owner's answer to a request. ``epoch`` is the current one; ``retry_after`` is in
    seconds, ``done`` and ``total`` tell how far the work is that keeps the disk busy.
    """

    request: Identity
    said: Said
    epoch: Number
    why: Text = ""
    retry_after: Seconds | None = None
    done: Number | None = None
    total: Number | None = None


@dataclass(frozen=True)
class Work:
    """What keeps a disk busy, and how far it is, in bytes."""

    operation: Identity
    name: Text
    done: Number = 0
    total: Number = 0


Sealed = TypeVar("Sealed", LeaseRecord, Request, Answer, Work)
KINDS: Mapping[type, str] = {
    LeaseRecord: "lease",
    Request: "request",
    Answer: "answer",
    Work: "work",
}


def encode(value: LeaseRecord | Request | Answer | Work) -> bytes:
    """The value as JSON, with format, version and checksum."""
    kind = type(value)
    fields = msgspec.to_builtins(value)
    body = {"format": f"promoter-{KINDS[kind]}", "version": VERSION, **fields}
    data = _canonical({**body, "sha256": _checksum(body)}, indent=1) + b"\n"
    if len(data) > LARGEST:
        raise BadRecord(f"a {KINDS[kind]} record of {len(data)} bytes is too large to be written")
    return data


def parse(kind: type[Sealed], data: bytes, where: str) -> Sealed:
    """The value that `encode` made ``data`` of. Raises `BadRecord`; ``where`` names the file."""
    body = _object(data, where)
    wanted = f"promoter-{KINDS[kind]}"
    if body.get("format") != wanted:
        _bad(where, f"its format is not {wanted}")
    if body.get("version") != VERSION or isinstance(body["version"], bool):
        _bad(where, f"its version is not {VERSION}, which this promoter knows")
    checksum = body.pop("sha256", None)
    if checksum != _checksum(body):
        _bad(where, "its checksum is wrong: torn or changed")
    del body["format"], body["version"]
    try:
        value = msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        _bad(where, str(error))
    except BadRecord as error:
        _bad(where, error.message)
    if surplus := _surplus(body, msgspec.to_builtins(value)):
        _bad(where, f"it has a {surplus}, which this promoter does not know")
    return value


def _surplus(found: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """The first field, also of what is inside, that no record has; "" if there is none."""
    for name, value in found.items():
        if name not in known:
            return name
        if isinstance(value, dict) and (inside := _surplus(value, known[name])):
            return inside
    return ""


def _object(data: bytes, where: str) -> dict[str, Any]:
    if len(data) > LARGEST:
        _bad(where, f"it is larger than {LARGEST} bytes")
    try:
        body = json.loads(
            data.decode(),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_of_64_bits,
        )
    except (ValueError, RecursionError) as error:
        _bad(where, f"it is not whole JSON: {error}")
    if not isinstance(body, dict):
        _bad(where, "it is no JSON object")
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _of_64_bits(text: str) -> int:
    if (number := int(text)) >= 2**64:
        raise ValueError(f"{number} is too large")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _canonical(body: Mapping[str, Any], indent: int | None = None) -> bytes:
    return json.dumps(body, sort_keys=True, indent=indent).encode()


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()


def _bad(where: str, why: str) -> NoReturn:
    raise BadRecord(
        f"{where} is refused: {why}",
        "Nobody can tell from it who may open the disk. Look at the other epochs beside it, make"
        " sure that no guest has the disk open, and put the newest whole one in its place.",
    )


def to_sign(request: Request, disk: str) -> bytes:
    """What a requester signs: all it asks, of the disk that the lease calls ``disk``."""
    return encode(replace(request, proof=None)) + disk.encode()
