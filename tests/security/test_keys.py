"""API keys: how they are kept, who gets in with them, and that a change of the file is taken up."""

from __future__ import annotations

import stat
from pathlib import Path

import grpc
import httpx
import pytest

from distserve.cli.main import main
from distserve.core.types import Code
from distserve.gateway.auth import ApiKeys, Caller, require_admin
from distserve.gateway.backend import RequestFailed
from distserve.gateway.keys import BadKeys, Key, fresh_key, read_keys, write_keys
from distserve.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.security.conftest import MakeGateway


def create(path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["key", "create", *arguments, "--api-keys", str(path)]) == 0
    return capsys.readouterr().out.strip()


def test_a_key_is_shown_once_and_kept_as_a_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    alice = create(path, capsys, "alice")
    root = create(path, capsys, "root", "--admin", "--max-streams", "3")
    text = path.read_text()
    assert alice not in text and root not in text and alice.startswith("dsk-") and len(alice) > 40
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys = ApiKeys(file=path)
    assert keys.check(f"Bearer {alice}") == Caller("alice", admin=False)
    assert keys.check(f"bearer {root} ", "10.0.0.1") == Caller("root", True, 3, "10.0.0.1")
    assert main(["key", "create", "alice", "--api-keys", str(path)]) == 1
    assert main(["key", "remove", "alice", "--api-keys", str(path)]) == 0
    assert [key.name for key in read_keys(path)] == ["root"]
    capsys.readouterr()
    assert main(["key", "list", "--api-keys", str(path)]) == 0
    assert "root" in capsys.readouterr().out


def test_a_cluster_secret_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    assert main(["key", "secret", str(path)]) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(path.read_text().strip()) >= 32
    assert main(["key", "secret", str(path)]) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("alice", "not NAME:sha256"),
        ("alice:sha256$00$11", "not NAME:sha256"),
        ("alice:plain$secret", "not NAME:sha256"),
        (f"al ice:sha256${'0' * 16}${'0' * 64}", "not NAME:sha256"),
        (f"alice:sha256${'0' * 16}${'0' * 64}:root", "'root' is not known"),
        (f"alice:sha256${'0' * 16}${'0' * 64}:streams=-1", "not NAME:sha256"),
    ],
)
def test_a_line_that_is_no_key_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\n" + line + "\n")
    with pytest.raises(BadKeys, match=f"line 3 .*{words}"):
        ApiKeys(file=path)


def test_names_are_unique_and_files_must_exist(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write_keys(path, [Key.of("a", "x" * 20), Key.of("a", "y" * 20)])
    with pytest.raises(BadKeys, match=r"line 2 .*two keys named 'a'"):
        read_keys(path)
    with pytest.raises(BadKeys, match="cannot read the API keys"):
        ApiKeys(file=tmp_path / "none")
    with pytest.raises(BadKeys, match="cannot name a key"):
        Key.of("a:b", "x")


def test_an_empty_file_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("")
    for header in ("", "Bearer x", "Bearer ", "Basic eDp5"):
        with pytest.raises(RequestFailed) as refused:
            ApiKeys(file=path).check(header)
        assert refused.value.code is Code.UNAUTHENTICATED
    assert ApiKeys().check("") == Caller()


def test_a_changed_file_is_read_again_and_a_broken_one_is_not(tmp_path: Path) -> None:
    path, now = tmp_path / "keys", [0.0]
    old, new = fresh_key(), fresh_key()
    write_keys(path, [Key.of("old", old)])
    keys = ApiKeys(file=path, clock=lambda: now[0])

    def known(key: str) -> bool:
        try:
            return bool(keys.check(f"Bearer {key}"))
        except RequestFailed:
            return False

    write_keys(path, [Key.of("new", new)])
    assert known(old) and not known(new)  # looked at once a second, at most
    now[0] = 1.0
    assert known(new) and not known(old)
    path.write_text("garbage\n")
    now[0] = 2.0
    assert known(new) and not known("garbage")
    path.unlink()
    now[0] = 3.0
    assert known(new)


def test_operators_need_an_admin_key() -> None:
    require_admin(Caller("root"))
    with pytest.raises(RequestFailed) as refused:
        require_admin(Caller("alice", admin=False))
    assert refused.value.code is Code.PERMISSION_DENIED and "--admin" in refused.value.message


async def test_what_is_open_and_what_wants_which_key(gateway: MakeGateway, tmp_path: Path) -> None:
    alice, root = fresh_key(), fresh_key()
    write_keys(tmp_path / "keys", [Key.of("alice", alice), Key.of("root", root, admin=True)])
    running = await gateway(keys=ApiKeys(file=tmp_path / "keys"))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.http.port}", trust_env=False) as http:
        for path in ("/health", "/livez", "/readyz", "/version"):
            assert (await http.get(path)).status_code == 200
        for path in ("/v1/models", "/metrics"):
            answer = await http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert (await http.get(path, headers={"Authorization": f"Bearer {alice}"})).status_code == 200
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.grpc.port}") as channel:
        admin, inference = admin_pb2_grpc.AdminServiceStub(channel), inference_pb2_grpc.InferenceServiceStub(channel)
        codes = []
        for call, request in (
            (inference.ListModels, inference_pb2.ListModelsRequest()),
            (admin.ListInstances, admin_pb2.ListInstancesRequest()),
            (admin.KvCheck, admin_pb2.ClusterKvCheckRequest()),
        ):
            for key in ("", alice, root):
                metadata = (("authorization", f"Bearer {key}"),) if key else ()
                try:
                    await call(request, metadata=metadata, timeout=20)
                    codes.append("OK")
                except grpc.aio.AioRpcError as error:
                    codes.append(error.code().name)
        assert codes == ["UNAUTHENTICATED", "OK", "OK", *["UNAUTHENTICATED", "PERMISSION_DENIED", "OK"] * 2]


async def test_metrics_can_be_opened(gateway: MakeGateway) -> None:
    running = await gateway(keys=ApiKeys(["sesame"]), open_metrics=True)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.http.port}", trust_env=False) as http:
        assert (await http.get("/metrics")).status_code == 200
        assert (await http.get("/v1/models")).status_code == 401
