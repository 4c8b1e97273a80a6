"""What listens beyond this machine needs authentication, or a word that it is meant; secrets are not shown."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from distserve.cli.commands import build_parser
from distserve.cli.main import main
from distserve.cli.servers import options_of
from distserve.launch.options import ServeOptions
from distserve.launch.serve import internal_security
from distserve.wire.secret import ClusterSecret
from distserve.wire.security import SecurityOptions, TlsFiles, Unsafe, is_loopback
from distserve.wire.tls import Certificates

NEEDED = {
    "serve": ["--model", "m"],
    "gateway": ["--model", "m", "--model-name", "m", "--controller", "c:1"],
    "controller": [],
    "instance": ["--id", "i", "--model", "m", "--model-name", "m", "--controller", "c:1"],
}


def checked(command: str, *arguments: str) -> int:
    return main([command, *NEEDED[command], *arguments, "--check-config"])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.org", "localhost.example.org"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("command", list(NEEDED))
@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "::"])
def test_a_public_port_without_authentication_is_refused(
    command: str, host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(command) == 0
    assert checked(command, "--host", host) == 2
    said = capsys.readouterr().err
    assert f"--host {host} would" in said and "--insecure-public" in said
    assert ("--api-keys FILE" if command in ("serve", "gateway") else "--cluster-secret-file") in said
    assert checked(command, "--host", host, "--insecure-public") == 0


@pytest.mark.parametrize("command", ["serve", "gateway"])
def test_keys_allow_public_client_ports(command: str) -> None:
    assert checked(command, "--host", "0.0.0.0", "--api-keys", "keys") == 0


@pytest.mark.parametrize("command", ["controller", "instance"])
def test_certificates_or_a_secret_allow_public_control_ports(command: str, ours: Path) -> None:
    assert checked(command, "--host", "0.0.0.0", "--tls-dir", str(ours)) == 0
    assert checked(command, "--host", "0.0.0.0", "--cluster-secret-file", "secret") == 0


def test_serve_with_a_public_controller_needs_both(ours: Path) -> None:
    public = ("--host", "0.0.0.0", "--controller-port", "5000")
    assert checked("serve", *public, "--api-keys", "keys") == 2
    assert checked("serve", *public, "--api-keys", "keys", "--tls-dir", str(ours)) == 0


def test_half_a_certificate_is_refused(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cert, key = str(ours / "cert.pem"), str(ours / "key.pem")
    assert checked("controller", "--tls-cert", cert) == 2
    assert "both --tls-cert and --tls-key" in capsys.readouterr().err
    assert checked("controller", "--tls-cert", cert, "--tls-key", key) == 2
    assert "add --tls-ca" in capsys.readouterr().err
    assert checked("serve", "--tls-cert", cert, "--tls-key", key) == 0  # for its clients
    assert checked("controller", "--tls-dir", str(ours), "--tls-cert", cert) == 2
    assert checked("controller", "--tls-dir", str(tmp_path)) == 2
    assert "distserve cert create" in capsys.readouterr().err


def test_files_that_are_no_certificate_are_refused_with_a_sentence(ours: Path, theirs: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    cases = [
        (TlsFiles(wrong, ours / "key.pem"), "no certificate with its key"),
        (TlsFiles(ours / "cert.pem", theirs / "key.pem"), "no certificate with its key"),
        (TlsFiles(ours / "cert.pem", tmp_path / "none.pem"), "cannot read"),
        (TlsFiles(ours / "cert.pem", ours / "key.pem", wrong), "holds no CA"),
    ]
    for files, words in cases:
        with pytest.raises(Unsafe, match=words):
            Certificates(files)


def test_the_layout_of_kubernetes_is_taken(ours: Path, tmp_path: Path) -> None:
    for name, source in (("tls.crt", "cert.pem"), ("tls.key", "key.pem"), ("ca.crt", "ca.pem")):
        (tmp_path / name).write_bytes((ours / source).read_bytes())
    files = SecurityOptions(tls_dir=tmp_path).tls
    assert files == TlsFiles(tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "ca.crt")
    assert Certificates(files).current().ca == (ours / "ca.pem").read_bytes()


def options(command: str, environ: dict[str, str]) -> Any:
    parsed: argparse.Namespace = build_parser().parse_args([command, *NEEDED[command]])
    return options_of(command, parsed, environ)


def test_the_secret_comes_from_the_environment_and_is_shown_nowhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "a-secret-of-the-cluster"
    held = options("instance", {"DISTSERVE_CLUSTER_SECRET": secret})
    assert held.security.cluster_secret == secret and secret not in repr(held)
    monkeypatch.setenv("DISTSERVE_CLUSTER_SECRET", secret)
    assert checked("instance") == 0
    assert secret not in capsys.readouterr().out
    assert main(["instance", "--cluster-secret", secret, *NEEDED["instance"]]) == 2


def test_a_secret_that_could_be_guessed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("sesame\n")
    for held in (
        SecurityOptions(cluster_secret="sesame"),
        SecurityOptions(cluster_secret_file=tmp_path / "short"),
        SecurityOptions(cluster_secret_file=tmp_path / "none"),
    ):
        with pytest.raises(Unsafe, match=r"at least 16 characters|cannot read"):
            ClusterSecret.of(held)


def test_serve_draws_a_secret_unless_others_are_to_join() -> None:
    one, two = (internal_security(ServeOptions(model="m")) for _ in range(2))
    assert len(one.cluster_secret) > 32 and one.cluster_secret != two.cluster_secret
    given = ServeOptions(model="m", security=SecurityOptions(cluster_secret="x" * 20))
    assert internal_security(given).cluster_secret == "x" * 20
    assert not internal_security(ServeOptions(model="m", controller_port=5000)).cluster_secret
