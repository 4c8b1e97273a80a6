"""``distserve cert create DIR``: a CA for a cluster and a certificate for its parts, for whoever has no PKI.

A directory that has a CA already (ca.pem with ca-key.pem) keeps it and gets a new certificate: that is a renewal, and
running processes take it up by themselves.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import ipaddress
import os
import tempfile
from pathlib import Path
from typing import Any

from distserve.cli.failure import CommandFailed

CLUSTER_NAME = "distserve"
"""In every certificate, for ``--tls-name``: parts that are dialled by addresses nobody knows beforehand."""

_ALWAYS = ("localhost", "127.0.0.1", "::1", CLUSTER_NAME)
_CA_DAYS = 3650
_SLACK = datetime.timedelta(minutes=5)


def cert(parsed: argparse.Namespace) -> int:
    try:
        x509 = importlib.import_module("cryptography.x509")
    except ImportError:
        raise CommandFailed("certificates are made with the package cryptography: pip install distserve[tls]") from None
    directory: Path = parsed.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        issuer = parsed.ca_dir or directory
        if not (issuer / "ca-key.pem").exists():
            if parsed.ca_dir is not None:
                raise CommandFailed(f"{issuer} has no ca-key.pem to sign with")
            _make_ca(x509, directory)
        _make_certificate(x509, directory, issuer, [*_ALWAYS, *filter(None, parsed.hosts.split(","))], parsed.days)
    except OSError as error:
        raise CommandFailed(f"cannot write {error.filename}: {error.strerror}") from error
    print(f"{directory} is ready for --tls-dir; keep {issuer / 'ca-key.pem'} to yourself")
    return 0


def _make_ca(x509: Any, directory: Path) -> None:
    key, name = _fresh_key(), _named(x509, "distserve cluster CA")
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    builder = (
        _dated(x509, name, name, key, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    replace_file(directory / "ca-key.pem", _private_pem(key))
    replace_file(directory / "ca.pem", builder.sign(key, _sha256()).public_bytes(_pem()), 0o644)


def _make_certificate(x509: Any, directory: Path, issuer: Path, hosts: list[str], days: int) -> None:
    ca = x509.load_pem_x509_certificate((issuer / "ca.pem").read_bytes())
    serialization = importlib.import_module("cryptography.hazmat.primitives.serialization")
    ca_key = serialization.load_pem_private_key((issuer / "ca-key.pem").read_bytes(), None)
    key = _fresh_key()
    oid, names = x509.ExtendedKeyUsageOID, [_general(x509, host) for host in dict.fromkeys(hosts)]
    builder = (
        _dated(x509, _named(x509, CLUSTER_NAME), ca.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([oid.SERVER_AUTH, oid.CLIENT_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    replace_file(directory / "key.pem", _private_pem(key))
    replace_file(directory / "cert.pem", builder.sign(ca_key, _sha256()).public_bytes(_pem()), 0o644)
    if issuer != directory:
        replace_file(directory / "ca.pem", (issuer / "ca.pem").read_bytes(), 0o644)


def _dated(x509: Any, subject: Any, issuer: Any, key: Any, days: int) -> Any:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SLACK)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _named(x509: Any, name: str) -> Any:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _general(x509: Any, host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _fresh_key() -> Any:
    ec = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ec")
    return ec.generate_private_key(ec.SECP256R1())


def _sha256() -> Any:
    return importlib.import_module("cryptography.hazmat.primitives.hashes").SHA256()


def _pem() -> Any:
    return importlib.import_module("cryptography.hazmat.primitives.serialization").Encoding.PEM


def _private_pem(key: Any) -> bytes:
    serialization = importlib.import_module("cryptography.hazmat.primitives.serialization")
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return bytes(key.private_bytes(_pem(), form, plain))


def replace_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace a file at one stroke: nobody reads half a certificate."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)  # it may be a private key
        raise
