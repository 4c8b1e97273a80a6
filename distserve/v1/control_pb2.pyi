from distserve.v1 import core_pb2 as _core_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("protocol", "instance", "gateway", "to", "endpoint")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    instance: _core_pb2.InstanceRef
    gateway: _core_pb2.GatewayRef
    to: _core_pb2.InstanceRef
    endpoint: _core_pb2.Endpoint
    def __init__(self, protocol: _Optional[int] = ..., instance: _Optional[_Union[_core_pb2.InstanceRef, _Mapping]] = ..., gateway: _Optional[_Union[_core_pb2.GatewayRef, _Mapping]] = ..., to: _Optional[_Union[_core_pb2.InstanceRef, _Mapping]] = ..., endpoint: _Optional[_Union[_core_pb2.Endpoint, _Mapping]] = ...) -> None: ...

class InstanceToController(_message.Message):
    __slots__ = ("joined", "reported")
    JOINED_FIELD_NUMBER: _ClassVar[int]
    REPORTED_FIELD_NUMBER: _ClassVar[int]
    joined: Joined
    reported: Reported
    def __init__(self, joined: _Optional[_Union[Joined, _Mapping]] = ..., reported: _Optional[_Union[Reported, _Mapping]] = ...) -> None: ...

class ControllerToInstance(_message.Message):
    __slots__ = ("welcomed", "join_refused", "members_changed", "join_asked")
    WELCOMED_FIELD_NUMBER: _ClassVar[int]
    JOIN_REFUSED_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_CHANGED_FIELD_NUMBER: _ClassVar[int]
    JOIN_ASKED_FIELD_NUMBER: _ClassVar[int]
    welcomed: Welcomed
    join_refused: JoinRefused
    members_changed: MembersChanged
    join_asked: JoinAsked
    def __init__(self, welcomed: _Optional[_Union[Welcomed, _Mapping]] = ..., join_refused: _Optional[_Union[JoinRefused, _Mapping]] = ..., members_changed: _Optional[_Union[MembersChanged, _Mapping]] = ..., join_asked: _Optional[_Union[JoinAsked, _Mapping]] = ...) -> None: ...

class GatewayToController(_message.Message):
    __slots__ = ("gateway_joined", "dispatch_asked", "prefill_finished", "request_ended")
    GATEWAY_JOINED_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_ASKED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FINISHED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ENDED_FIELD_NUMBER: _ClassVar[int]
    gateway_joined: GatewayJoined
    dispatch_asked: DispatchAsked
    prefill_finished: PrefillFinished
    request_ended: RequestEnded
    def __init__(self, gateway_joined: _Optional[_Union[GatewayJoined, _Mapping]] = ..., dispatch_asked: _Optional[_Union[DispatchAsked, _Mapping]] = ..., prefill_finished: _Optional[_Union[PrefillFinished, _Mapping]] = ..., request_ended: _Optional[_Union[RequestEnded, _Mapping]] = ...) -> None: ...

class ControllerToGateway(_message.Message):
    __slots__ = ("members_changed", "dispatched", "dispatch_refused")
    MEMBERS_CHANGED_FIELD_NUMBER: _ClassVar[int]
    DISPATCHED_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_REFUSED_FIELD_NUMBER: _ClassVar[int]
    members_changed: MembersChanged
    dispatched: Dispatched
    dispatch_refused: DispatchRefused
    def __init__(self, members_changed: _Optional[_Union[MembersChanged, _Mapping]] = ..., dispatched: _Optional[_Union[Dispatched, _Mapping]] = ..., dispatch_refused: _Optional[_Union[DispatchRefused, _Mapping]] = ...) -> None: ...

class GatewayToInstance(_message.Message):
    __slots__ = ("submit", "abandon")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABANDON_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    abandon: Abandon
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., abandon: _Optional[_Union[Abandon, _Mapping]] = ...) -> None: ...

class InstanceToGateway(_message.Message):
    __slots__ = ("tokens_made", "attempt_failed", "abandoned")
    TOKENS_MADE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FAILED_FIELD_NUMBER: _ClassVar[int]
    ABANDONED_FIELD_NUMBER: _ClassVar[int]
    tokens_made: TokensMade
    attempt_failed: AttemptFailed
    abandoned: Abandoned
    def __init__(self, tokens_made: _Optional[_Union[TokensMade, _Mapping]] = ..., attempt_failed: _Optional[_Union[AttemptFailed, _Mapping]] = ..., abandoned: _Optional[_Union[Abandoned, _Mapping]] = ...) -> None: ...

class PeerMessage(_message.Message):
    __slots__ = ("reserve_asked", "reserve_granted", "move_ended", "commit_asked", "committed", "move_queried")
    RESERVE_ASKED_FIELD_NUMBER: _ClassVar[int]
    RESERVE_GRANTED_FIELD_NUMBER: _ClassVar[int]
    MOVE_ENDED_FIELD_NUMBER: _ClassVar[int]
    COMMIT_ASKED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    MOVE_QUERIED_FIELD_NUMBER: _ClassVar[int]
    reserve_asked: ReserveAsked
    reserve_granted: ReserveGranted
    move_ended: MoveEnded
    commit_asked: CommitAsked
    committed: Committed
    move_queried: MoveQueried
    def __init__(self, reserve_asked: _Optional[_Union[ReserveAsked, _Mapping]] = ..., reserve_granted: _Optional[_Union[ReserveGranted, _Mapping]] = ..., move_ended: _Optional[_Union[MoveEnded, _Mapping]] = ..., commit_asked: _Optional[_Union[CommitAsked, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ..., move_queried: _Optional[_Union[MoveQueried, _Mapping]] = ...) -> None: ...

class GatewayJoined(_message.Message):
    __slots__ = ("gateway",)
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    gateway: _core_pb2.GatewayRef
    def __init__(self, gateway: _Optional[_Union[_core_pb2.GatewayRef, _Mapping]] = ...) -> None: ...

class DispatchAsked(_message.Message):
    __slots__ = ("gateway", "request_id", "epoch", "model", "prompt_tokens", "total_tokens", "priority", "tenant", "prefix_hashes", "avoid")
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HASHES_FIELD_NUMBER: _ClassVar[int]
    AVOID_FIELD_NUMBER: _ClassVar[int]
    gateway: _core_pb2.GatewayRef
    request_id: str
    epoch: int
    model: str
    prompt_tokens: int
    total_tokens: int
    priority: int
    tenant: str
    prefix_hashes: _containers.RepeatedScalarFieldContainer[int]
    avoid: _containers.RepeatedCompositeFieldContainer[_core_pb2.InstanceRef]
    def __init__(self, gateway: _Optional[_Union[_core_pb2.GatewayRef, _Mapping]] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., model: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., total_tokens: _Optional[int] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., prefix_hashes: _Optional[_Iterable[int]] = ..., avoid: _Optional[_Iterable[_Union[_core_pb2.InstanceRef, _Mapping]]] = ...) -> None: ...

class PrefillFinished(_message.Message):
    __slots__ = ("gateway", "request_id", "epoch")
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    gateway: _core_pb2.GatewayRef
    request_id: str
    epoch: int
    def __init__(self, gateway: _Optional[_Union[_core_pb2.GatewayRef, _Mapping]] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class RequestEnded(_message.Message):
    __slots__ = ("gateway", "request_id")
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    gateway: _core_pb2.GatewayRef
    request_id: str
    def __init__(self, gateway: _Optional[_Union[_core_pb2.GatewayRef, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class Joined(_message.Message):
    __slots__ = ("member", "load")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    member: _core_pb2.Member
    load: _core_pb2.Load
    def __init__(self, member: _Optional[_Union[_core_pb2.Member, _Mapping]] = ..., load: _Optional[_Union[_core_pb2.Load, _Mapping]] = ...) -> None: ...

class Reported(_message.Message):
    __slots__ = ("ref", "load")
    REF_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ref: _core_pb2.InstanceRef
    load: _core_pb2.Load
    def __init__(self, ref: _Optional[_Union[_core_pb2.InstanceRef, _Mapping]] = ..., load: _Optional[_Union[_core_pb2.Load, _Mapping]] = ...) -> None: ...

class Welcomed(_message.Message):
    __slots__ = ("lease_s",)
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    lease_s: float
    def __init__(self, lease_s: _Optional[float] = ...) -> None: ...

class JoinRefused(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class JoinAsked(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MembersChanged(_message.Message):
    __slots__ = ("version", "members", "lost")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    version: int
    members: _containers.RepeatedCompositeFieldContainer[_core_pb2.Member]
    lost: _containers.RepeatedCompositeFieldContainer[_core_pb2.InstanceRef]
    def __init__(self, version: _Optional[int] = ..., members: _Optional[_Iterable[_Union[_core_pb2.Member, _Mapping]]] = ..., lost: _Optional[_Iterable[_Union[_core_pb2.InstanceRef, _Mapping]]] = ...) -> None: ...

class Dispatched(_message.Message):
    __slots__ = ("request_id", "epoch", "prefill", "decode", "placement")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    prefill: _core_pb2.Endpoint
    decode: _core_pb2.Endpoint
    placement: _core_pb2.Placement
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., prefill: _Optional[_Union[_core_pb2.Endpoint, _Mapping]] = ..., decode: _Optional[_Union[_core_pb2.Endpoint, _Mapping]] = ..., placement: _Optional[_Union[_core_pb2.Placement, str]] = ...) -> None: ...

class DispatchRefused(_message.Message):
    __slots__ = ("request_id", "epoch", "code", "message", "retry_after_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    code: _core_pb2.Code
    message: str
    retry_after_s: float
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., code: _Optional[_Union[_core_pb2.Code, str]] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("gateway", "request", "epoch", "decode", "delivered", "timeout_s")
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    gateway: _core_pb2.GatewayRef
    request: _core_pb2.Request
    epoch: int
    decode: _core_pb2.Endpoint
    delivered: _containers.RepeatedScalarFieldContainer[int]
    timeout_s: float
    def __init__(self, gateway: _Optional[_Union[_core_pb2.GatewayRef, _Mapping]] = ..., request: _Optional[_Union[_core_pb2.Request, _Mapping]] = ..., epoch: _Optional[int] = ..., decode: _Optional[_Union[_core_pb2.Endpoint, _Mapping]] = ..., delivered: _Optional[_Iterable[int]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class Abandon(_message.Message):
    __slots__ = ("gateway", "request_id", "epoch")
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    gateway: _core_pb2.GatewayRef
    request_id: str
    epoch: int
    def __init__(self, gateway: _Optional[_Union[_core_pb2.GatewayRef, _Mapping]] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class Abandoned(_message.Message):
    __slots__ = ("source", "request_id", "epoch")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    source: _core_pb2.InstanceRef
    request_id: str
    epoch: int
    def __init__(self, source: _Optional[_Union[_core_pb2.InstanceRef, _Mapping]] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class SequenceOutput(_message.Message):
    __slots__ = ("request_id", "epoch", "first_index", "tokens", "finish", "timings")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    first_index: int
    tokens: _containers.RepeatedCompositeFieldContainer[_core_pb2.Token]
    finish: _core_pb2.FinishReason
    timings: _core_pb2.Timings
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., first_index: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_core_pb2.Token, _Mapping]]] = ..., finish: _Optional[_Union[_core_pb2.FinishReason, str]] = ..., timings: _Optional[_Union[_core_pb2.Timings, _Mapping]] = ...) -> None: ...

class TokensMade(_message.Message):
    __slots__ = ("source", "outputs")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    source: _core_pb2.InstanceRef
    outputs: _containers.RepeatedCompositeFieldContainer[SequenceOutput]
    def __init__(self, source: _Optional[_Union[_core_pb2.InstanceRef, _Mapping]] = ..., outputs: _Optional[_Iterable[_Union[SequenceOutput, _Mapping]]] = ...) -> None: ...

class AttemptFailed(_message.Message):
    __slots__ = ("source", "request_id", "epoch", "code", "message", "retriable", "culprit")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRIABLE_FIELD_NUMBER: _ClassVar[int]
    CULPRIT_FIELD_NUMBER: _ClassVar[int]
    source: _core_pb2.InstanceRef
    request_id: str
    epoch: int
    code: _core_pb2.Code
    message: str
    retriable: bool
    culprit: _core_pb2.InstanceRef
    def __init__(self, source: _Optional[_Union[_core_pb2.InstanceRef, _Mapping]] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., code: _Optional[_Union[_core_pb2.Code, str]] = ..., message: _Optional[str] = ..., retriable: bool = ..., culprit: _Optional[_Union[_core_pb2.InstanceRef, _Mapping]] = ...) -> None: ...

class ReserveAsked(_message.Message):
    __slots__ = ("move_id", "source", "destination", "gateway", "request", "epoch", "output", "fingerprint", "total_tokens", "timeout_s", "request_timeout_s")
    MOVE_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    REQUEST_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    move_id: str
    source: _core_pb2.Endpoint
    destination: _core_pb2.InstanceRef
    gateway: _core_pb2.GatewayRef
    request: _core_pb2.Request
    epoch: int
    output: _containers.RepeatedScalarFieldContainer[int]
    fingerprint: str
    total_tokens: int
    timeout_s: float
    request_timeout_s: float
    def __init__(self, move_id: _Optional[str] = ..., source: _Optional[_Union[_core_pb2.Endpoint, _Mapping]] = ..., destination: _Optional[_Union[_core_pb2.InstanceRef, _Mapping]] = ..., gateway: _Optional[_Union[_core_pb2.GatewayRef, _Mapping]] = ..., request: _Optional[_Union[_core_pb2.Request, _Mapping]] = ..., epoch: _Optional[int] = ..., output: _Optional[_Iterable[int]] = ..., fingerprint: _Optional[str] = ..., total_tokens: _Optional[int] = ..., timeout_s: _Optional[float] = ..., request_timeout_s: _Optional[float] = ...) -> None: ...

class ReserveGranted(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: _core_pb2.Ticket
    def __init__(self, ticket: _Optional[_Union[_core_pb2.Ticket, _Mapping]] = ...) -> None: ...

class MoveEnded(_message.Message):
    __slots__ = ("move_id", "sender", "reason", "retriable")
    MOVE_ID_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRIABLE_FIELD_NUMBER: _ClassVar[int]
    move_id: str
    sender: _core_pb2.InstanceRef
    reason: str
    retriable: bool
    def __init__(self, move_id: _Optional[str] = ..., sender: _Optional[_Union[_core_pb2.InstanceRef, _Mapping]] = ..., reason: _Optional[str] = ..., retriable: bool = ...) -> None: ...

class CommitAsked(_message.Message):
    __slots__ = ("move_id", "source", "nonce", "epoch", "total_tokens", "output", "recent", "reserve_s")
    MOVE_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    RESERVE_S_FIELD_NUMBER: _ClassVar[int]
    move_id: str
    source: _core_pb2.InstanceRef
    nonce: int
    epoch: int
    total_tokens: int
    output: _containers.RepeatedScalarFieldContainer[int]
    recent: _containers.RepeatedCompositeFieldContainer[_core_pb2.Token]
    reserve_s: float
    def __init__(self, move_id: _Optional[str] = ..., source: _Optional[_Union[_core_pb2.InstanceRef, _Mapping]] = ..., nonce: _Optional[int] = ..., epoch: _Optional[int] = ..., total_tokens: _Optional[int] = ..., output: _Optional[_Iterable[int]] = ..., recent: _Optional[_Iterable[_Union[_core_pb2.Token, _Mapping]]] = ..., reserve_s: _Optional[float] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("move_id", "sender", "epoch")
    MOVE_ID_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    move_id: str
    sender: _core_pb2.InstanceRef
    epoch: int
    def __init__(self, move_id: _Optional[str] = ..., sender: _Optional[_Union[_core_pb2.InstanceRef, _Mapping]] = ..., epoch: _Optional[int] = ...) -> None: ...

class MoveQueried(_message.Message):
    __slots__ = ("move_id", "sender")
    MOVE_ID_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    move_id: str
    sender: _core_pb2.InstanceRef
    def __init__(self, move_id: _Optional[str] = ..., sender: _Optional[_Union[_core_pb2.InstanceRef, _Mapping]] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class Holding(_message.Message):
    __slots__ = ("request_id", "epoch", "phase", "waits_for", "age_s", "blocks", "output_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    phase: str
    waits_for: str
    age_s: float
    blocks: int
    output_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., phase: _Optional[str] = ..., waits_for: _Optional[str] = ..., age_s: _Optional[float] = ..., blocks: _Optional[int] = ..., output_tokens: _Optional[int] = ...) -> None: ...

class InspectResponse(_message.Message):
    __slots__ = ("member", "load", "pid", "holdings")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    member: _core_pb2.Member
    load: _core_pb2.Load
    pid: int
    holdings: _containers.RepeatedCompositeFieldContainer[Holding]
    def __init__(self, member: _Optional[_Union[_core_pb2.Member, _Mapping]] = ..., load: _Optional[_Union[_core_pb2.Load, _Mapping]] = ..., pid: _Optional[int] = ..., holdings: _Optional[_Iterable[_Union[Holding, _Mapping]]] = ...) -> None: ...

class KvCheckRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KvCheckResponse(_message.Message):
    __slots__ = ("ref", "total", "by_state", "holders", "problem", "idle_and_clean")
    class ByStateEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    REF_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    BY_STATE_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    IDLE_AND_CLEAN_FIELD_NUMBER: _ClassVar[int]
    ref: _core_pb2.InstanceRef
    total: int
    by_state: _containers.ScalarMap[str, int]
    holders: int
    problem: str
    idle_and_clean: bool
    def __init__(self, ref: _Optional[_Union[_core_pb2.InstanceRef, _Mapping]] = ..., total: _Optional[int] = ..., by_state: _Optional[_Mapping[str, int]] = ..., holders: _Optional[int] = ..., problem: _Optional[str] = ..., idle_and_clean: bool = ...) -> None: ...
