"""This host's certificate, and whom it trusts.

    STATE/agent/ca.pem     whose certificates are believed
    STATE/agent/host.pem   this host's certificate: its name, and for what it may ask
    STATE/agent/host.key   its private key
    STATE/agent/endpoint   where its agent listens, ADDRESS:PORT
    STATE/agent/revoked    certificates that are believed no more, by serial number, one a line

A certificate names a host and its roles as URIs. Where a host has certificates, a request
without a valid signature is refused, whichever way it came. The list of the revoked is read
whenever somebody shows a certificate; one that cannot be read believes nobody.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from promoter.errors import Refused
from promoter.lease.host import agent_directory
from promoter.lease.record import Proof, Request, to_sign
from promoter.lease.rules import Role

HOST_URI, ROLE_URI = "urn:promoter:host:", "urn:promoter:role:"
ENDPOINT = re.compile(
    r"(?P<host>[0-9A-Za-z.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):(?P<port>[0-9]{1,5})"
)


class Untrusted(Refused):
    """Somebody is not, or may not, what it says."""


@dataclass(frozen=True)
class Peer:
    """Whom a certificate is of."""

    host: str
    roles: frozenset[Role]
    serial: int


@dataclass(frozen=True)
class Credentials:
    """The certificates in ``directory``."""

    directory: Path

    @classmethod
    def of(cls, state: Path) -> Credentials | None:
        """Those of this host, if it has any."""
        directory = agent_directory(state)
        return cls(directory) if (directory / "host.pem").exists() else None

    def context(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        """TLS 1.3 with whoever has a certificate of our authority, to talk to or to serve."""
        server = purpose is ssl.Purpose.CLIENT_AUTH
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        made.check_hostname = False  # a certificate is of a host by its lease's name: see `peer`
        made.verify_mode = ssl.CERT_REQUIRED
        try:
            made.load_verify_locations(self.directory / "ca.pem")
            made.load_cert_chain(self.directory / "host.pem", self.directory / "host.key")
        except OSError as error:
            raise _unusable(self.directory, error) from error
        if server:
            made.num_tickets = 0  # whoever comes again shows a certificate that is valid then
        return made

    def peer(self, certificate: Mapping[str, Any] | None) -> Peer:
        """Who is at the other end of a connection. Raises `Untrusted` when it was revoked."""
        return self._believed(peer_in(certificate))

    def _believed(self, peer: Peer) -> Peer:
        if peer.serial in revoked(self.directory / "revoked"):
            raise Untrusted(f"the certificate of host {peer.host} was revoked")
        return peer

    def check(self, host: str) -> None:
        """Raises `Refused` unless the certificate is of ``host``."""
        from promoter.lease import signing

        try:
            peer = peer_of(*signing.read((self.directory / "host.pem").read_bytes()))
        except (OSError, ValueError) as error:
            raise _unusable(self.directory, error) from error
        if peer.host != host:
            raise Refused(
                f"the certificate in {self.directory} is of host {peer.host}, and this is {host}",
                f"Make another: promoter agent init --host {host} …",
            )

    def load(self) -> None:
        """Load now what checks signatures: it takes longer than to let go of a disk."""
        import_module("promoter.lease.signing")

    def sign(self, request: Request, disk: str) -> Request:
        """The request with the proof that it is this host's."""
        from promoter.lease import signing

        try:
            certificate = (self.directory / "host.pem").read_text()
            key = (self.directory / "host.key").read_bytes()
            signature = signing.sign(key, to_sign(request, disk))
        except (OSError, ValueError, TypeError) as error:
            raise _unusable(self.directory, error) from error
        return replace(request, proof=Proof(certificate, signature))

    def roles_of(self, request: Request, disk: str) -> frozenset[Role]:
        """What the requester may ask for. Raises `Untrusted` when that is not proved."""
        from promoter.lease import signing

        if request.proof is None:
            raise Untrusted("the request is not signed", "Give that host a certificate.")
        try:
            proved = signing.proved(
                (self.directory / "ca.pem").read_bytes(),
                request.proof.certificate.encode(),
                request.proof.signature,
                to_sign(request, disk),
            )
        except (signing.NotProved, OSError, ValueError) as error:  # or ours cannot be used
            raise Untrusted(f"the request's signature does not prove who asks: {error}") from error
        peer = self._believed(peer_of(*proved))
        if peer.host != request.requester.host:
            raise Untrusted(f"host {peer.host} asks in the name of another")
        return peer.roles


def _unusable(directory: Path, error: Exception) -> Refused:
    return Refused(
        f"the certificates in {directory} cannot be used: {error}",
        "Make them anew: promoter agent init --help",
    )


def revoked(file: Path) -> frozenset[int]:
    """The serial numbers in the list ``file``; what follows one is for people. Raises
    `Untrusted`.
    """
    try:
        lines = file.read_text().splitlines()
        return frozenset(int(line.split()[0], 16) for line in lines if line.strip())
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError) as error:
        raise Untrusted(f"nobody is believed: {file} cannot be read: {error}") from error


def peer_of(uris: Iterable[str], serial: int) -> Peer:
    """Whom a certificate with these URIs is of. Raises `Untrusted` unless it is one host."""
    names = list(uris)
    hosts = [name.removeprefix(HOST_URI) for name in names if name.startswith(HOST_URI)]
    if len(hosts) != 1:
        raise Untrusted("the certificate does not name one host")
    return Peer(hosts[0], frozenset(role for role in Role if f"{ROLE_URI}{role}" in names), serial)


def peer_in(certificate: Mapping[str, Any] | None) -> Peer:
    """Whom a certificate is of, as `ssl.SSLSocket.getpeercert` gives it."""
    shown = certificate or {}
    names = shown.get("subjectAltName", ())
    serial = int(shown.get("serialNumber", "0"), 16)
    return peer_of((value for kind, value in names if kind == "URI"), serial)


def parse_endpoint(text: str) -> tuple[str, int]:
    """Address and port. Raises `Untrusted` when it is something else."""
    found = ENDPOINT.fullmatch(text)
    if not found or not 0 < int(found["port"]) < 2**16:
        raise Untrusted(f"{text[:300]!r} is not where an agent could listen: ADDRESS:PORT")
    return found["host"].strip("[]"), int(found["port"])
