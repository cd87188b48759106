"""``promoter agent init``: a small private certificate authority, and the certificates of hosts.

    DIRECTORY/ca.key, ca.pem   the authority; its key belongs on no host that runs guests
    DIRECTORY/HOST/            what goes to that host as STATE/agent
    DIRECTORY/issued           every certificate it made: serial number, host, last day
    DIRECTORY/revoked          those of them that are believed no more; goes to every host

Keys are of P-256, readable by their owner alone.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from promoter.errors import Refused
from promoter.lease.credentials import HOST_URI, ROLE_URI, Untrusted, parse_endpoint
from promoter.lease.host import NAME
from promoter.lease.rules import Role
from promoter.storage.files import write_whole

CA_DAYS = 3650
SECRET = 0o600
EARLIER = timedelta(hours=1)
"""A certificate is valid on a host whose clock is a little behind."""


def authority(directory: Path) -> None:
    """Make the authority unless it is there."""
    key_file, certificate_file = directory / "ca.key", directory / "ca.pem"
    if key_file.exists() and certificate_file.exists():
        return
    if key_file.exists() or certificate_file.exists():
        raise Refused(
            f"of the authority in {directory} one file is missing",
            "Put ca.key and ca.pem there, both, or begin in another directory.",
        )
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "promoter's private CA")])
    certificate = (
        _certificate(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, SHA256())
    )
    write_whole(key_file, _private(key), SECRET)
    write_whole(certificate_file, certificate.public_bytes(Encoding.PEM))


def issue(directory: Path, host: str, endpoint: str, roles: list[Role], days: int) -> Path:
    """A key and a certificate for a host, in a directory that is returned; old ones there go."""
    if not NAME.fullmatch(host):
        raise Refused(f"{host!r} is no host's name", "Up to 64 letters, digits and dashes.")
    try:
        address, _ = parse_endpoint(endpoint)
    except Untrusted as error:
        raise Refused(error.message, "Give its address or name, and a port.") from error
    loaded = load_pem_private_key((directory / "ca.key").read_bytes(), None)
    ca = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise Refused(f"{directory / 'ca.key'} is not one of promoter's", "Use another directory.")
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = _leaf(ca, key.public_key(), host, days)
    leaf = leaf.add_extension(_names(host, address, roles), critical=False)
    certificate = leaf.sign(loaded, SHA256())
    last = certificate.not_valid_after_utc.date()
    _add(directory / "issued", [f"{certificate.serial_number:x} {host} {last}"])
    made = directory / host
    made.mkdir(exist_ok=True, mode=0o700)
    write_whole(made / "host.key", _private(key), SECRET)
    write_whole(made / "host.pem", certificate.public_bytes(Encoding.PEM))
    write_whole(made / "ca.pem", ca.public_bytes(Encoding.PEM))
    write_whole(made / "endpoint", f"{endpoint}\n".encode())
    if (list_ := directory / "revoked").exists():
        write_whole(made / "revoked", list_.read_bytes())
    return made


def revoke(directory: Path, host: str) -> Path:
    """Put every certificate that ``host`` was given so far on the list, which is returned."""
    issued, known = _lines(directory / "issued"), _lines(directory / "revoked")
    of_host = [line for line in issued if line.split()[1:2] == [host]]
    if not of_host:
        raise Refused(
            f"no certificate of host {host} was made in {directory}",
            "Its name is that in leases. Of those made by promoter before it kept a list, write"
            f" the serial number (openssl x509 -serial) into {directory / 'revoked'}.",
        )
    _add(directory / "revoked", [line for line in of_host if line not in known])
    return directory / "revoked"


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _add(file: Path, lines: list[str]) -> None:
    write_whole(file, "".join(f"{line}\n" for line in (*_lines(file), *lines)).encode())


def _leaf(
    ca: x509.Certificate, key: ec.EllipticCurvePublicKey, host: str, days: int
) -> x509.CertificateBuilder:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    signer = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        _certificate(name, ca.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer),
            critical=False,
        )
    )


def _names(host: str, address: str, roles: list[Role]) -> x509.SubjectAlternativeName:
    """Hosts go by the URIs; the address is for other clients, which check that."""
    uris = [f"{HOST_URI}{host}", *(f"{ROLE_URI}{role}" for role in roles)]
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    try:
        names.append(x509.IPAddress(ip_address(address)))
    except ValueError:
        names.append(x509.DNSName(address))
    return x509.SubjectAlternativeName(names)


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
