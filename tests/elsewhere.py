"""A host that is not this one: its libvirtd sees other files than are seen here.

The ways to it are those of libvirt's remote transports, on loopback: an ssh server and TLS, with
keys and certificates of their own.
"""

import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
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
from cryptography.x509.oid import NameOID

from promoter.lease.certificates import authority
from tests import records
from tests.cli import Ran, promoter, start
from tests.domains import Domain, Libvirtd
from tests.vm import Disk, base, qemu_img, wait_for

DECOY = "not that host's"
HOST = "127.0.0.1"
SSHD = """
ListenAddress {host}:{port}
HostKey {directory}/host
AuthorizedKeysFile {directory}/user.pub {directory}/locked.pub
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
"""
SSH = """#!/bin/sh
exec ssh -F none -o UserKnownHostsFile={known} -o IdentitiesOnly=yes "$@"
"""


class Sshd:
    """An ssh server of libvirtd's host, from `start` on."""

    def __init__(self, libvirtd: Libvirtd, directory: Path) -> None:
        self.libvirtd, self.directory, self.port = libvirtd, directory, free_port()
        for name, word in {"host": "", "user": "", "stranger": "", "locked": "secret"}.items():
            key = ("ssh-keygen", "-q", "-t", "ed25519", "-N", word, "-f", directory / name)
            subprocess.run(key, check=True)
        public = (directory / "host.pub").read_text()
        (directory / "known").write_text(f"[{HOST}]:{self.port} {public}")
        for known in ("known", "unknown"):
            command = directory / f"ssh-{known}"
            command.write_text(SSH.format(known=directory / known))
            command.chmod(0o755)
        config = SSHD.format(host=HOST, port=self.port, directory=directory)
        (directory / "sshd_config").write_text(config)
        socket = "ln -sf {} /run/libvirt/libvirt-sock; mkdir -pm 755 /run/sshd"
        shell = ("bash", "-c", socket.format(libvirtd.socket))
        subprocess.run([*libvirtd.enter, *shell], check=True)

    def start(self) -> None:
        """Listens when this returns."""
        config = self.directory / "sshd_config"
        self._listener = self.libvirtd.run(
            *self.libvirtd.enter, "/usr/sbin/sshd", "-D", "-e", "-f", str(config)
        )
        wait_for(lambda: listens(self.port), "sshd", 30)

    @property
    def pid(self) -> int:
        """Of who takes new connections; those that are there live on without it."""
        return self._listener.pid

    def uri(self, key: str = "user", known: str = "known", port: int | None = None) -> str:
        options = f"keyfile={self.directory / key}&command={self.directory / f'ssh-{known}'}"
        return f"qemu+ssh://root@{HOST}:{port or self.port}/system?{options}"


def free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def listens(port: int) -> bool:
    with suppress(ConnectionRefusedError), closing(socket.create_connection((HOST, port))):
        return True
    return False


def ssh_of(pid: int) -> list[int]:
    """The ssh processes that a process has started."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for file in children for child in file.read_text().split()]
    return [child for child in found if Path(f"/proc/{child}/comm").read_text() == "ssh\n"]


class Pki:
    """An authority's directory with the certificates of a host and of its clients, by the names
    that libvirt's ``pkipath`` wants.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        authority(directory)
        (directory / "ca.pem").rename(directory / "cacert.pem")
        for whose in ("server", "client"):
            self._issue(whose)

    def _issue(self, whose: str) -> None:
        signer = load_pem_private_key((self.directory / "ca.key").read_bytes(), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        ca = x509.load_pem_x509_certificate((self.directory / "cacert.pem").read_bytes())
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, whose)])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(ca.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(ca.not_valid_before_utc)
            .not_valid_after(ca.not_valid_after_utc)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(signer, SHA256())
        )
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (self.directory / f"{whose}key.pem").write_bytes(private)
        (self.directory / f"{whose}cert.pem").write_bytes(certificate.public_bytes(Encoding.PEM))

    def options(self, port: int) -> str:
        """How libvirtd listens with the host's certificate."""
        return f"""
listen_tls = 1
tls_port = "{port}"
listen_addr = "{HOST}"
key_file = "{self.directory}/serverkey.pem"
cert_file = "{self.directory}/servercert.pem"
ca_file = "{self.directory}/cacert.pem"
"""

    def uri(self, port: int, host: str = "localhost") -> str:
        return f"qemu+tls://{host}:{port}/system?pkipath={self.directory}"


class Elsewhere:
    """A domain on a host whose ``there`` is ``here`` to it, with one linked clone or several."""

    def __init__(self, libvirtd: Libvirtd, directory: Path, uri: str, clones: int = 1) -> None:
        self.libvirtd, self.uri, self.state = libvirtd, uri, directory / "state"
        self.here, self.there = directory / "images", directory / "there"
        self.here.mkdir()
        self.there.mkdir()
        names = ("clone.qcow2", *(f"clone{number}.qcow2" for number in range(1, clones)))
        self.clones = [self.here / name for name in names]
        self.clone = self.clones[0]
        qemu_img("convert", "-O", "qcow2", base(), self.there / "base.qcow2")
        for name in names:
            layers = ("-b", "base.qcow2", "-F", "qcow2", self.there / name)
            qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", *layers)
        self.images = self.files()
        for name in self.images:
            (self.here / name).write_text(DECOY)
        self.domain = Domain(libvirtd, directory, [Disk(clone) for clone in self.clones])

    @contextmanager
    def running(self) -> Iterator[Domain]:
        with self.libvirtd.seeing(self.there, self.here), self.domain as domain:
            domain.wait_for_acks(40)
            yield domain

    @contextmanager
    def pool(self, directory: Path | None = None) -> Iterator[None]:
        place = f"<target><path>{directory or self.here}</path></target>"
        xml = f"<pool type='dir'><name>elsewhere</name>{place}</pool>"
        with self.libvirtd.connect() as connection:
            made = connection.storagePoolCreateXML(xml)
            yield
            made.destroy()

    def run(self, command: object, *words: object) -> Ran:
        return promoter(self.state, command, "web01", *words, "-c", self.uri, "--json")

    def promoting(self, *words: object, enter: Sequence[str] = ()) -> subprocess.Popen[str]:
        promote = ("promote", "web01", *words, "-c", self.uri, "--json")
        return start(self.state, *promote, enter=enter)

    def strike(
        self, point: str, whom: str, *words: str, pid: int | None = None
    ) -> subprocess.Popen[str]:
        promote = ("promote", "web01", *words, "-c", self.uri, "--json")
        hit = (point, whom, pid or self.libvirtd.pid)
        return start(self.state, *hit, *promote, module="tests.struck")

    def files(self) -> set[str]:
        return {file.name for file in self.there.iterdir()}

    def prove(self, *, promoted: bool, left: int = 0) -> None:
        """The next boot is that of the true disks, nothing was lost, no file here was touched."""
        self.domain.wait_for_acks(40)
        assert self.domain.next_boot() == self.domain.files()
        self.domain.kill()
        self.domain.start()
        self.domain.wait_for_acks(40)
        self.domain.kill()
        files = [Path(name) for name in self.domain.next_boot()]
        for file, clone in zip(files, self.clones, strict=True):
            assert (file == clone) is not promoted
            assert ("backing file" in qemu_img("info", self.there / file.name)) is not promoted
        disk = self.there / files[0].name
        records.check(disk, disk.suffix[1:], self.domain.log).raise_if_bad()
        assert len(self.files()) == len(self.images) + promoted * len(self.clones) + left
        assert {file.name for file in self.here.iterdir()} == self.images
        assert all(file.read_text() == DECOY for file in self.here.iterdir())
