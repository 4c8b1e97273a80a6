"""What a process is told of security: certificates, the cluster's secret, and whether it may be open to a network.

Plain values and their refusals; the command line and ``serve`` build one of these. Knows no gRPC and opens no
connection; ``distserve.wire.trust`` makes something of it.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, replace
from pathlib import Path

LAYOUTS = (("cert.pem", "key.pem", "ca.pem"), ("tls.crt", "tls.key", "ca.crt"))
"""Names of certificate, key and CA in a directory: ours, and those of a Kubernetes TLS secret."""


class Unsafe(ValueError):
    """Options that would leave a port open, or that cannot protect it; the text is for the user."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where a process's certificate is, PEM. ``ca``: who signed those of the other side; None: nobody is asked."""

    cert: Path
    key: Path
    ca: Path | None = None

    @classmethod
    def of(cls, directory: Path) -> TlsFiles:
        """The files of a directory in either layout. Raises ``Unsafe`` when it has neither."""
        for cert, key, ca in LAYOUTS:
            if (directory / cert).exists():
                return cls(directory / cert, directory / key, directory / ca if (directory / ca).exists() else None)
        names = " or ".join(cert for cert, _, _ in LAYOUTS)
        raise Unsafe(f"the directory {directory} has no {names}; make one with `distserve cert create {directory}`")


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityOptions:
    """The same for every kind of process."""

    tls_dir: Path | None = None  # instead of the three below
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    tls_name: str = ""  # that certificates of the other parts are made out to; empty: the address dialled
    cluster_secret_file: Path | None = None
    insecure_public: bool = False
    cluster_secret: str = field(default="", repr=False)  # from the environment only
    control_tls: bool = True  # False: certificates are for clients alone (``serve``, on loopback)

    @property
    def tls(self) -> TlsFiles | None:
        """This process's certificate. Raises ``Unsafe`` for a selection of options that makes no sense."""
        if self.tls_dir is not None:
            if self.tls_cert or self.tls_key or self.tls_ca:
                raise Unsafe("--tls-dir names all three files: leave --tls-cert, --tls-key and --tls-ca out")
            return TlsFiles.of(self.tls_dir)
        if self.tls_cert is None and self.tls_key is None and self.tls_ca is None:
            return None
        if self.tls_cert is None or self.tls_key is None:
            raise Unsafe("TLS needs a certificate and its key: give both --tls-cert and --tls-key, or --tls-dir")
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_ca)

    @property
    def mutual_tls(self) -> bool:
        """Whether the parts know each other by certificates: only where a CA says which."""
        return self.control_tls and (tls := self.tls) is not None and tls.ca is not None

    def without_tls(self) -> SecurityOptions:
        """The same, without certificates."""
        return replace(self, tls_dir=None, tls_cert=None, tls_key=None, tls_ca=None)

    @property
    def has_secret(self) -> bool:
        return bool(self.cluster_secret) or self.cluster_secret_file is not None

    def check_control(self, host: str) -> None:
        """Raise ``Unsafe`` if a control port on ``host`` would take in anybody who reaches it."""
        if self.control_tls and self.tls is not None and not self.mutual_tls:
            raise Unsafe("the parts of a cluster know each other by certificates of one CA: add --tls-ca (or ca.pem)")
        if is_loopback(host) or self.mutual_tls or self.has_secret or self.insecure_public:
            return
        raise Unsafe(
            f"--host {host} would let anybody who reaches this machine join the cluster: give every part --tls-dir "
            "(mutual TLS) or --cluster-secret-file, or say --insecure-public if the network is closed by other means"
        )

    def check_clients(self, host: str, *, has_keys: bool) -> None:
        """Raise ``Unsafe`` if a client port on ``host`` would serve anybody who reaches it."""
        if is_loopback(host) or has_keys or self.insecure_public:
            return
        raise Unsafe(
            f"--host {host} would serve anybody who reaches this machine: make a key with "
            "`distserve key create NAME --api-keys FILE` and add --api-keys FILE, or say --insecure-public if that is "
            "what you want"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on ``host``. A name other than localhost counts as public."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
