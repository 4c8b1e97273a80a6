from distserve.v1 import core_pb2 as _core_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RankMoveKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RANK_MOVE_KIND_UNSPECIFIED: _ClassVar[RankMoveKind]
    RANK_MOVE_KIND_SENT: _ClassVar[RankMoveKind]
    RANK_MOVE_KIND_FAILED: _ClassVar[RankMoveKind]
    RANK_MOVE_KIND_STORED: _ClassVar[RankMoveKind]
    RANK_MOVE_KIND_CORRUPT: _ClassVar[RankMoveKind]
RANK_MOVE_KIND_UNSPECIFIED: RankMoveKind
RANK_MOVE_KIND_SENT: RankMoveKind
RANK_MOVE_KIND_FAILED: RankMoveKind
RANK_MOVE_KIND_STORED: RankMoveKind
RANK_MOVE_KIND_CORRUPT: RankMoveKind

class RankChallenge(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class RankHello(_message.Message):
    __slots__ = ("rank", "proof", "version")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    rank: int
    proof: bytes
    version: str
    def __init__(self, rank: _Optional[int] = ..., proof: _Optional[bytes] = ..., version: _Optional[str] = ...) -> None: ...

class RankWelcome(_message.Message):
    __slots__ = ("instance", "tp", "pp", "model", "dtype", "device", "threads", "pool_blocks", "block_size", "max_model_len", "transfer", "timeout_s", "log_level", "data_keys", "data_port", "kv_dtype", "kernels", "cuda_graphs", "cores")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    PP_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    POOL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    LOG_LEVEL_FIELD_NUMBER: _ClassVar[int]
    DATA_KEYS_FIELD_NUMBER: _ClassVar[int]
    DATA_PORT_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    CUDA_GRAPHS_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    instance: _core_pb2.InstanceRef
    tp: int
    pp: int
    model: str
    dtype: str
    device: str
    threads: int
    pool_blocks: int
    block_size: int
    max_model_len: int
    transfer: str
    timeout_s: float
    log_level: str
    data_keys: _containers.RepeatedScalarFieldContainer[bytes]
    data_port: int
    kv_dtype: str
    kernels: str
    cuda_graphs: str
    cores: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, instance: _Optional[_Union[_core_pb2.InstanceRef, _Mapping]] = ..., tp: _Optional[int] = ..., pp: _Optional[int] = ..., model: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., threads: _Optional[int] = ..., pool_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., transfer: _Optional[str] = ..., timeout_s: _Optional[float] = ..., log_level: _Optional[str] = ..., data_keys: _Optional[_Iterable[bytes]] = ..., data_port: _Optional[int] = ..., kv_dtype: _Optional[str] = ..., kernels: _Optional[str] = ..., cuda_graphs: _Optional[str] = ..., cores: _Optional[_Iterable[int]] = ...) -> None: ...

class RankReady(_message.Message):
    __slots__ = ("data_address", "fingerprint", "weight_bytes", "pool_bytes", "load_s")
    DATA_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    data_address: str
    fingerprint: str
    weight_bytes: int
    pool_bytes: int
    load_s: float
    def __init__(self, data_address: _Optional[str] = ..., fingerprint: _Optional[str] = ..., weight_bytes: _Optional[int] = ..., pool_bytes: _Optional[int] = ..., load_s: _Optional[float] = ...) -> None: ...

class RankSampling(_message.Message):
    __slots__ = ("item", "sampling", "output_index", "banned", "prompt", "output")
    ITEM_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_INDEX_FIELD_NUMBER: _ClassVar[int]
    BANNED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    item: int
    sampling: _core_pb2.Sampling
    output_index: int
    banned: _containers.RepeatedScalarFieldContainer[int]
    prompt: _containers.RepeatedScalarFieldContainer[int]
    output: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, item: _Optional[int] = ..., sampling: _Optional[_Union[_core_pb2.Sampling, _Mapping]] = ..., output_index: _Optional[int] = ..., banned: _Optional[_Iterable[int]] = ..., prompt: _Optional[_Iterable[int]] = ..., output: _Optional[_Iterable[int]] = ...) -> None: ...

class RankStep(_message.Message):
    __slots__ = ("number", "items", "heads", "token_ids", "blocks", "sampling")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    number: int
    items: int
    heads: bytes
    token_ids: bytes
    blocks: bytes
    sampling: _containers.RepeatedCompositeFieldContainer[RankSampling]
    def __init__(self, number: _Optional[int] = ..., items: _Optional[int] = ..., heads: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., blocks: _Optional[bytes] = ..., sampling: _Optional[_Iterable[_Union[RankSampling, _Mapping]]] = ...) -> None: ...

class RankTokens(_message.Message):
    __slots__ = ("number", "tokens")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    number: int
    tokens: _containers.RepeatedCompositeFieldContainer[_core_pb2.Token]
    def __init__(self, number: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_core_pb2.Token, _Mapping]]] = ...) -> None: ...

class RankOpenTicket(_message.Message):
    __slots__ = ("ticket", "blocks")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ticket: _core_pb2.Ticket
    blocks: bytes
    def __init__(self, ticket: _Optional[_Union[_core_pb2.Ticket, _Mapping]] = ..., blocks: _Optional[bytes] = ...) -> None: ...

class RankSendStage(_message.Message):
    __slots__ = ("ticket", "address", "start", "end", "blocks", "final")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    ticket: _core_pb2.Ticket
    address: str
    start: int
    end: int
    blocks: bytes
    final: bool
    def __init__(self, ticket: _Optional[_Union[_core_pb2.Ticket, _Mapping]] = ..., address: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., blocks: _Optional[bytes] = ..., final: bool = ...) -> None: ...

class RankOrder(_message.Message):
    __slots__ = ("number", "open_ticket", "close_ticket", "send_stage", "abort_send", "peer_lost")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    OPEN_TICKET_FIELD_NUMBER: _ClassVar[int]
    CLOSE_TICKET_FIELD_NUMBER: _ClassVar[int]
    SEND_STAGE_FIELD_NUMBER: _ClassVar[int]
    ABORT_SEND_FIELD_NUMBER: _ClassVar[int]
    PEER_LOST_FIELD_NUMBER: _ClassVar[int]
    number: int
    open_ticket: RankOpenTicket
    close_ticket: str
    send_stage: RankSendStage
    abort_send: str
    peer_lost: _core_pb2.InstanceRef
    def __init__(self, number: _Optional[int] = ..., open_ticket: _Optional[_Union[RankOpenTicket, _Mapping]] = ..., close_ticket: _Optional[str] = ..., send_stage: _Optional[_Union[RankSendStage, _Mapping]] = ..., abort_send: _Optional[str] = ..., peer_lost: _Optional[_Union[_core_pb2.InstanceRef, _Mapping]] = ...) -> None: ...

class RankAck(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class RankMoved(_message.Message):
    __slots__ = ("move_id", "nonce", "start", "end", "nbytes", "seconds", "reason", "detail", "retriable", "kind")
    MOVE_ID_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    RETRIABLE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    move_id: str
    nonce: int
    start: int
    end: int
    nbytes: int
    seconds: float
    reason: str
    detail: str
    retriable: bool
    kind: RankMoveKind
    def __init__(self, move_id: _Optional[str] = ..., nonce: _Optional[int] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., nbytes: _Optional[int] = ..., seconds: _Optional[float] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., retriable: bool = ..., kind: _Optional[_Union[RankMoveKind, str]] = ...) -> None: ...

class RankFailed(_message.Message):
    __slots__ = ("message", "asked")
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    message: str
    asked: bool
    def __init__(self, message: _Optional[str] = ..., asked: bool = ...) -> None: ...

class RankFrame(_message.Message):
    __slots__ = ("challenge", "hello", "welcome", "ready", "step", "tokens", "order", "ack", "moved", "failed")
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    challenge: RankChallenge
    hello: RankHello
    welcome: RankWelcome
    ready: RankReady
    step: RankStep
    tokens: RankTokens
    order: RankOrder
    ack: RankAck
    moved: RankMoved
    failed: RankFailed
    def __init__(self, challenge: _Optional[_Union[RankChallenge, _Mapping]] = ..., hello: _Optional[_Union[RankHello, _Mapping]] = ..., welcome: _Optional[_Union[RankWelcome, _Mapping]] = ..., ready: _Optional[_Union[RankReady, _Mapping]] = ..., step: _Optional[_Union[RankStep, _Mapping]] = ..., tokens: _Optional[_Union[RankTokens, _Mapping]] = ..., order: _Optional[_Union[RankOrder, _Mapping]] = ..., ack: _Optional[_Union[RankAck, _Mapping]] = ..., moved: _Optional[_Union[RankMoved, _Mapping]] = ..., failed: _Optional[_Union[RankFailed, _Mapping]] = ...) -> None: ...
