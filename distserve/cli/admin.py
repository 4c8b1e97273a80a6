"""``distserve ps | where | cancel | kvcheck``: what an operator asks of a running cluster."""

from __future__ import annotations

import argparse
import json
from typing import Any

from google.protobuf.json_format import MessageToDict

from distserve.cli.failure import CommandFailed
from distserve.cli.paint import Paint, span, table
from distserve.cli.remote import remote
from distserve.v1 import admin_pb2 as pb
from distserve.v1 import core_pb2

_PS_HEADS = ("instance", "role", "state", "pid", "waiting", "running", "out", "in", "KV used", "steps", "address")


def ps(parsed: argparse.Namespace) -> int:
    with remote(parsed) as gateway:
        answer = gateway.admin.ListInstances(pb.ListInstancesRequest(), **gateway.call)
    if parsed.json:
        return _print_json(answer)
    paint = Paint(plain=parsed.plain)
    print(table(_PS_HEADS, [_ps_row(i) for i in answer.instances], paint))
    ready = paint("ready", "green") if answer.ready else paint("not ready", "yellow")
    print(f"\n{len(answer.instances)} instances; the cluster is {ready}")
    return 0


def _ps_row(instance: Any) -> list[str]:
    load = instance.load
    used = 1 - (load.kv_free + load.kv_cached) / load.kv_total if load.kv_total else 0.0
    counts = (load.waiting, load.running, load.handing_off, load.incoming)
    return [
        instance.id,
        core_pb2.Role.Name(instance.role).removeprefix("ROLE_").lower(),
        instance.state,
        str(instance.pid or "–"),
        *(map(str, counts) if instance.HasField("load") else "––––"),
        f"{used:.0%}",
        str(load.steps),
        instance.address,
    ]


def where(parsed: argparse.Namespace) -> int:
    with remote(parsed) as gateway:
        answer = gateway.admin.GetRequest(pb.GetRequestRequest(request_id=parsed.request_id), **gateway.call)
    if parsed.json:
        return _print_json(answer)
    waits = f", waits for {answer.waits_for}" if answer.waits_for else ""
    owner = f" at {answer.owner}" if answer.owner else ""
    print(
        f"{answer.request_id}: {answer.phase}{owner}{waits}; {answer.output_tokens} tokens so far, "
        f"age {span(answer.age_s)}, deadline in {span(max(0.0, answer.deadline_in_s))}, epoch {answer.epoch}"
    )
    return 0


def cancel(parsed: argparse.Namespace) -> int:
    with remote(parsed) as gateway:
        answer = gateway.admin.Cancel(pb.CancelRequest(request_id=parsed.request_id), **gateway.call)
    if not answer.cancelled:
        raise CommandFailed(f"no request {parsed.request_id!r} is running at this gateway")
    print(f"{parsed.request_id} is cancelled")
    return 0


def kvcheck(parsed: argparse.Namespace) -> int:
    """Exit code 1 when a block is unaccounted for, or with ``--idle`` when one is held at all."""
    with remote(parsed) as gateway:
        answer = gateway.admin.KvCheck(pb.ClusterKvCheckRequest(), **gateway.call)
    bad = [i for i in answer.instances if i.problem or (parsed.idle and not i.idle_and_clean)]
    if parsed.json:
        _print_json(answer)
        return 1 if bad else 0
    paint = Paint(plain=parsed.plain)
    states = sorted({state for i in answer.instances for state in i.by_state})
    rows = [
        [i.instance, str(i.total), *(str(i.by_state.get(s, 0)) for s in states), str(i.holders), _verdict(i)]
        for i in answer.instances
    ]
    print(table(("instance", "blocks", *states, "holders", "verdict"), rows, paint))
    if bad:
        raise CommandFailed(f"{len(bad)} of {len(answer.instances)} ledgers do not pass")
    return 0


def _verdict(instance: Any) -> str:
    return instance.problem or ("idle and clean" if instance.idle_and_clean else "in use, accounted for")


def _print_json(message: Any) -> int:
    fields = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    print(json.dumps(fields, indent=2))
    return 0
