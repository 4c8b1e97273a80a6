"""``distserve demo`` (``make demo``): one prefill, one decode instance, a question through gRPC, an account."""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

from distserve.cli.commands import build_parser
from distserve.cli.failure import CommandFailed
from distserve.cli.generate import account, follow, request_of, write_now
from distserve.cli.paint import Paint
from distserve.cli.remote import remote
from distserve.launch.cluster import Cluster, ClusterFailed
from distserve.models.catalog import resolve_model
from distserve.models.errors import ModelError

_LAST_LINES = 20


def demo(parsed: argparse.Namespace) -> int:
    paint = Paint(plain=parsed.plain)
    try:
        resolve_model(parsed.model, say=lambda words: print(paint(words, "dim"), flush=True))
    except ModelError as error:
        raise CommandFailed(str(error)) from error
    print(paint(f"starting {parsed.model}: 1 prefill + 1 decode instance on this machine …", "dim"), flush=True)
    arguments = ["--model", parsed.model, "--prefill", "1", "--decode", "1", "--kv-tokens", "8192"]
    with tempfile.TemporaryFile("w+") as log:
        try:
            with Cluster(arguments, log=log) as cluster:
                instances = ", ".join(f"{i['id']} (pid {i['pid']})" for i in cluster.ready["instances"])
                print(paint(f"ready in {cluster.ready['start_s']:.1f} s: {instances}\n", "dim"), flush=True)
                summary = _ask(parsed, cluster.grpc_address, paint)
        except ClusterFailed as error:
            log.seek(0)
            print(*log.readlines()[-_LAST_LINES:], sep="", file=sys.stderr)
            raise CommandFailed(str(error)) from error
    print(account(summary, paint))
    served = summary.served
    if not served.kv_bytes_moved or served.prefill_instance == served.decode_instance:
        raise CommandFailed("the answer came without a hand-off, which is not what this demo shows")
    print(paint("\neverything is stopped. Now try: make serve", "dim"))
    return 0


def _ask(parsed: argparse.Namespace, address: str, paint: Paint) -> Any:
    print(paint("you>   ", "bold", "cyan") + parsed.prompt)
    write_now(paint("model> ", "bold", "green"))
    flags = ["--server", address, "--temperature", "0", "--max-tokens", str(parsed.max_tokens), "--timeout", "120"]
    asking = build_parser().parse_args(["generate", parsed.prompt, *flags])
    with remote(asking) as gateway:
        responses = gateway.inference.Generate(request_of(asking, [("user", parsed.prompt)]), **gateway.call)
        _, _, summary = follow(responses, write_now)
    print("\n")
    return summary
