"""Signatures of release requests, checked by the pool's certificate authority.

Imported only where there are certificates: it is slow to load.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey as PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

NOT_PROVED = (ValueError, VerificationError, InvalidSignature, UnsupportedAlgorithm)


def sign(key: bytes, data: bytes) -> str:
    """The signature of ``data`` with the private key in PEM."""
    private = load_pem_private_key(key, None)
    if not isinstance(private, EllipticCurvePrivateKey):
        raise TypeError("promoter agent init makes keys of elliptic curves")
    return private.sign(data, ECDSA(SHA256())).hex()


def names_of(ca: bytes, certificate: bytes, signature: str, data: bytes) -> list[str]:
    """The URIs that the certificate of the signer of ``data`` is for.

    Raises one of `NOT_PROVED` when the signature is not that of a certificate that is valid
    now, by the authority ``ca``.
    """
    leaf = x509.load_pem_x509_certificate(certificate)
    authorities = Store(x509.load_pem_x509_certificates(ca))
    PolicyBuilder().store(authorities).build_client_verifier().verify(leaf, [])
    public = leaf.public_key()
    if not isinstance(public, PublicKey):
        raise ValueError("not a key of an elliptic curve")  # noqa: TRY004
    public.verify(bytes.fromhex(signature), data, ECDSA(SHA256()))
    return names_in(certificate)


def names_in(certificate: bytes) -> list[str]:
    """The URIs that a certificate in PEM is for."""
    leaf = x509.load_pem_x509_certificate(certificate)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return list(names.get_values_for_type(x509.UniformResourceIdentifier))
