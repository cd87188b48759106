"""Signatures of release requests, checked by the pool's certificate authority.

Imported only where there are certificates: it is slow to load.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.verification import PolicyBuilder, Store


class NotProved(Exception):
    """A signature proves nothing."""


def sign(key: bytes, data: bytes) -> str:
    """The signature of ``data`` with the private key in PEM."""
    private = load_pem_private_key(key, None)
    if not isinstance(private, EllipticCurvePrivateKey):
        raise TypeError("promoter agent init makes keys of elliptic curves")
    return private.sign(data, ECDSA(SHA256())).hex()


def proved(ca: bytes, certificate: bytes, signature: str, data: bytes) -> tuple[list[str], int]:
    """The certificate of the signer of ``data``, as `read` reads it.

    Raises `NotProved` when the signature is not that of a certificate that is valid now, by the
    authority ``ca``.
    """
    authorities = Store(x509.load_pem_x509_certificates(ca))
    try:
        leaf = x509.load_pem_x509_certificate(certificate)
        PolicyBuilder().store(authorities).build_client_verifier().verify(leaf, [])
        _check(leaf, bytes.fromhex(signature), data)
        return read(certificate)
    except Exception as error:  # the library has many for what is hostile, not all documented
        raise NotProved(str(error) or type(error).__name__) from error


def _check(leaf: x509.Certificate, signature: bytes, data: bytes) -> None:
    public = leaf.public_key()
    if not isinstance(public, EllipticCurvePublicKey):
        raise NotProved("not a key of an elliptic curve")
    public.verify(signature, data, ECDSA(SHA256()))


def read(certificate: bytes) -> tuple[list[str], int]:
    """The URIs that a certificate in PEM is for, and its serial number."""
    leaf = x509.load_pem_x509_certificate(certificate)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return list(names.get_values_for_type(x509.UniformResourceIdentifier)), leaf.serial_number
