from distserve.v1 import core_pb2 as _core_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListInstancesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListInstancesResponse(_message.Message):
    __slots__ = ("instances", "ready")
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    instances: _containers.RepeatedCompositeFieldContainer[InstanceStatus]
    ready: bool
    def __init__(self, instances: _Optional[_Iterable[_Union[InstanceStatus, _Mapping]]] = ..., ready: bool = ...) -> None: ...

class InstanceStatus(_message.Message):
    __slots__ = ("id", "incarnation", "role", "address", "model", "state", "connected", "pid", "version", "load", "pool_tokens")
    ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    POOL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    id: str
    incarnation: int
    role: _core_pb2.Role
    address: str
    model: str
    state: str
    connected: bool
    pid: int
    version: str
    load: _core_pb2.Load
    pool_tokens: int
    def __init__(self, id: _Optional[str] = ..., incarnation: _Optional[int] = ..., role: _Optional[_Union[_core_pb2.Role, str]] = ..., address: _Optional[str] = ..., model: _Optional[str] = ..., state: _Optional[str] = ..., connected: bool = ..., pid: _Optional[int] = ..., version: _Optional[str] = ..., load: _Optional[_Union[_core_pb2.Load, _Mapping]] = ..., pool_tokens: _Optional[int] = ...) -> None: ...

class GetRequestRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class GetRequestResponse(_message.Message):
    __slots__ = ("request_id", "phase", "owner", "epoch", "age_s", "waits_for", "deadline_in_s", "output_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_IN_S_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    phase: str
    owner: str
    epoch: int
    age_s: float
    waits_for: str
    deadline_in_s: float
    output_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., phase: _Optional[str] = ..., owner: _Optional[str] = ..., epoch: _Optional[int] = ..., age_s: _Optional[float] = ..., waits_for: _Optional[str] = ..., deadline_in_s: _Optional[float] = ..., output_tokens: _Optional[int] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class CancelResponse(_message.Message):
    __slots__ = ("cancelled",)
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    cancelled: bool
    def __init__(self, cancelled: bool = ...) -> None: ...

class ClusterKvCheckRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClusterKvCheckResponse(_message.Message):
    __slots__ = ("instances",)
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    instances: _containers.RepeatedCompositeFieldContainer[InstanceKvStatus]
    def __init__(self, instances: _Optional[_Iterable[_Union[InstanceKvStatus, _Mapping]]] = ...) -> None: ...

class InstanceKvStatus(_message.Message):
    __slots__ = ("instance", "total", "by_state", "holders", "problem", "idle_and_clean")
    class ByStateEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    BY_STATE_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    IDLE_AND_CLEAN_FIELD_NUMBER: _ClassVar[int]
    instance: str
    total: int
    by_state: _containers.ScalarMap[str, int]
    holders: int
    problem: str
    idle_and_clean: bool
    def __init__(self, instance: _Optional[str] = ..., total: _Optional[int] = ..., by_state: _Optional[_Mapping[str, int]] = ..., holders: _Optional[int] = ..., problem: _Optional[str] = ..., idle_and_clean: bool = ...) -> None: ...

class WatchTrafficRequest(_message.Message):
    __slots__ = ("duration_s",)
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    duration_s: float
    def __init__(self, duration_s: _Optional[float] = ...) -> None: ...

class WatchTrafficResponse(_message.Message):
    __slots__ = ("arrival_s", "prompt_tokens", "output_tokens", "prefix_blocks", "client", "slo_class", "outcome", "ttft_s", "total_s")
    ARRIVAL_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SLO_CLASS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_blocks: _containers.RepeatedScalarFieldContainer[int]
    client: int
    slo_class: str
    outcome: str
    ttft_s: float
    total_s: float
    def __init__(self, arrival_s: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., prefix_blocks: _Optional[_Iterable[int]] = ..., client: _Optional[int] = ..., slo_class: _Optional[str] = ..., outcome: _Optional[str] = ..., ttft_s: _Optional[float] = ..., total_s: _Optional[float] = ...) -> None: ...
