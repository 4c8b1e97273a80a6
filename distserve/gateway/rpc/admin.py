"""``distserve.v1.AdminService``: what operators ask, answered from the backend."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

from distserve.core.types import Code, Role
from distserve.gateway.backend import InstanceView, KvReport, RequestFailed
from distserve.gateway.frontend import FrontEnd
from distserve.gateway.plan import invalid
from distserve.gateway.rpc.calls import Call, Context
from distserve.v1 import admin_pb2 as pb
from distserve.v1 import admin_pb2_grpc, core_pb2

_ROLES = {
    Role.PREFILL: core_pb2.ROLE_PREFILL,
    Role.DECODE: core_pb2.ROLE_DECODE,
    Role.MIXED: core_pb2.ROLE_MIXED,
}

WATCH_LIMIT_S = 7 * 86400.0


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Serves one gateway's backend to operators."""

    def __init__(self, front_end: FrontEnd) -> None:
        self._front_end = front_end
        self._backend = front_end.backend

    async def ListInstances(self, request: pb.ListInstancesRequest, context: Context) -> pb.ListInstancesResponse:
        async with Call(context, self._front_end, admin=True):
            instances = [_instance(view) for view in await self._backend.instances()]
            return pb.ListInstancesResponse(instances=instances, ready=self._backend.ready())

    async def GetRequest(self, request: pb.GetRequestRequest, context: Context) -> pb.GetRequestResponse:
        async with Call(context, self._front_end, admin=True):
            view = await self._backend.where(_named(request.request_id))
            if view is None:
                raise RequestFailed(
                    Code.NOT_FOUND,
                    f"No request '{request.request_id}' is running here; it has ended, or another gateway holds it.",
                    param="request_id",
                )
            return pb.GetRequestResponse(
                request_id=view.request_id,
                phase=view.phase,
                owner=view.owner,
                epoch=view.epoch,
                age_s=view.age_s,
                waits_for=view.waits_for,
                deadline_in_s=view.deadline_in_s,
                output_tokens=view.output_tokens,
            )

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        async with Call(context, self._front_end, admin=True):
            return pb.CancelResponse(cancelled=await self._backend.cancel(_named(request.request_id)))

    async def KvCheck(self, request: pb.ClusterKvCheckRequest, context: Context) -> pb.ClusterKvCheckResponse:
        async with Call(context, self._front_end, admin=True):
            return pb.ClusterKvCheckResponse(instances=[_kv(report) for report in await self._backend.kv_check()])

    async def WatchTraffic(
        self, request: pb.WatchTrafficRequest, context: Context
    ) -> AsyncIterator[pb.WatchTrafficResponse]:
        async with Call(context, self._front_end, admin=True):
            if not 0 < request.duration_s <= WATCH_LIMIT_S:
                raise invalid("duration_s", f"A watch lasts more than 0 and at most {WATCH_LIMIT_S:.0f} seconds.")
            with self._front_end.traffic.watch(request.duration_s) as watch:
                async for record in watch:
                    yield pb.WatchTrafficResponse(**dataclasses.asdict(record))


def _named(request_id: str) -> str:
    if not request_id:
        raise invalid("request_id", "The request id is missing.")
    return request_id


def _instance(view: InstanceView) -> pb.InstanceStatus:
    member = view.member
    return pb.InstanceStatus(
        id=member.ref.id,
        incarnation=member.ref.incarnation,
        role=_ROLES[member.role],
        address=member.endpoint.address,
        model=member.spec.name,
        state=view.state,
        connected=view.connected,
        pid=view.pid,
        version=member.version,
        load=core_pb2.Load(**dataclasses.asdict(view.load)) if view.load is not None else None,
        pool_tokens=member.spec.pool_tokens,
    )


def _kv(report: KvReport) -> pb.InstanceKvStatus:
    return pb.InstanceKvStatus(
        instance=report.instance,
        total=report.total,
        by_state=report.by_state,
        holders=report.holders,
        problem=report.problem,
        idle_and_clean=report.idle_and_clean,
    )
