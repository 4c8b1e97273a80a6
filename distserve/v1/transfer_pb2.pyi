from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TransferLaneKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSFER_LANE_KIND_UNSPECIFIED: _ClassVar[TransferLaneKind]
    TRANSFER_LANE_KIND_AUTO: _ClassVar[TransferLaneKind]
    TRANSFER_LANE_KIND_SHM: _ClassVar[TransferLaneKind]
    TRANSFER_LANE_KIND_GLOO: _ClassVar[TransferLaneKind]
    TRANSFER_LANE_KIND_NCCL: _ClassVar[TransferLaneKind]
    TRANSFER_LANE_KIND_IPC: _ClassVar[TransferLaneKind]
TRANSFER_LANE_KIND_UNSPECIFIED: TransferLaneKind
TRANSFER_LANE_KIND_AUTO: TransferLaneKind
TRANSFER_LANE_KIND_SHM: TransferLaneKind
TRANSFER_LANE_KIND_GLOO: TransferLaneKind
TRANSFER_LANE_KIND_NCCL: TransferLaneKind
TRANSFER_LANE_KIND_IPC: TransferLaneKind

class TransferPeer(_message.Message):
    __slots__ = ("id", "incarnation")
    ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    id: str
    incarnation: int
    def __init__(self, id: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class TransferLayout(_message.Message):
    __slots__ = ("layers", "kv_heads", "head_dim", "dtype", "block_size")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_size: int
    def __init__(self, layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ...) -> None: ...

class TransferHello(_message.Message):
    __slots__ = ("version", "source", "destination", "fingerprint", "layout", "kind", "generation", "host", "cuda", "source_rank", "destination_rank", "move_id", "nonce", "proof", "gpu")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    CUDA_FIELD_NUMBER: _ClassVar[int]
    SOURCE_RANK_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_RANK_FIELD_NUMBER: _ClassVar[int]
    MOVE_ID_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    version: int
    source: TransferPeer
    destination: TransferPeer
    fingerprint: str
    layout: TransferLayout
    kind: TransferLaneKind
    generation: int
    host: str
    cuda: bool
    source_rank: TransferRank
    destination_rank: TransferRank
    move_id: str
    nonce: bytes
    proof: bytes
    gpu: str
    def __init__(self, version: _Optional[int] = ..., source: _Optional[_Union[TransferPeer, _Mapping]] = ..., destination: _Optional[_Union[TransferPeer, _Mapping]] = ..., fingerprint: _Optional[str] = ..., layout: _Optional[_Union[TransferLayout, _Mapping]] = ..., kind: _Optional[_Union[TransferLaneKind, str]] = ..., generation: _Optional[int] = ..., host: _Optional[str] = ..., cuda: bool = ..., source_rank: _Optional[_Union[TransferRank, _Mapping]] = ..., destination_rank: _Optional[_Union[TransferRank, _Mapping]] = ..., move_id: _Optional[str] = ..., nonce: _Optional[bytes] = ..., proof: _Optional[bytes] = ..., gpu: _Optional[str] = ...) -> None: ...

class TransferRank(_message.Message):
    __slots__ = ("tp", "pp", "rank")
    TP_FIELD_NUMBER: _ClassVar[int]
    PP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    tp: int
    pp: int
    rank: int
    def __init__(self, tp: _Optional[int] = ..., pp: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class TransferChallenge(_message.Message):
    __slots__ = ("nonce", "proof")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    proof: bytes
    def __init__(self, nonce: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class TransferProof(_message.Message):
    __slots__ = ("proof",)
    PROOF_FIELD_NUMBER: _ClassVar[int]
    proof: bytes
    def __init__(self, proof: _Optional[bytes] = ...) -> None: ...

class TransferOffer(_message.Message):
    __slots__ = ("kind", "slots", "slot_bytes", "slice_bytes", "segment", "group", "device_memory")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MEMORY_FIELD_NUMBER: _ClassVar[int]
    kind: TransferLaneKind
    slots: int
    slot_bytes: int
    slice_bytes: int
    segment: TransferSegment
    group: TransferGroup
    device_memory: TransferDeviceMemory
    def __init__(self, kind: _Optional[_Union[TransferLaneKind, str]] = ..., slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., slice_bytes: _Optional[int] = ..., segment: _Optional[_Union[TransferSegment, _Mapping]] = ..., group: _Optional[_Union[TransferGroup, _Mapping]] = ..., device_memory: _Optional[_Union[TransferDeviceMemory, _Mapping]] = ...) -> None: ...

class TransferSegment(_message.Message):
    __slots__ = ("locator", "proof")
    LOCATOR_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    locator: str
    proof: bytes
    def __init__(self, locator: _Optional[str] = ..., proof: _Optional[bytes] = ...) -> None: ...

class TransferDeviceMemory(_message.Message):
    __slots__ = ("handle", "proof")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    handle: bytes
    proof: bytes
    def __init__(self, handle: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class TransferGroup(_message.Message):
    __slots__ = ("port", "prefix")
    PORT_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    port: int
    prefix: str
    def __init__(self, port: _Optional[int] = ..., prefix: _Optional[str] = ...) -> None: ...

class TransferAnswer(_message.Message):
    __slots__ = ("ok", "reason")
    OK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    reason: str
    def __init__(self, ok: bool = ..., reason: _Optional[str] = ...) -> None: ...

class TransferReady(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TransferRefusal(_message.Message):
    __slots__ = ("reason", "ticket")
    REASON_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    reason: str
    ticket: bool
    def __init__(self, reason: _Optional[str] = ..., ticket: bool = ...) -> None: ...

class TransferStageBegin(_message.Message):
    __slots__ = ("stage", "move_id", "request_id", "epoch", "source", "destination", "fingerprint", "nonce", "start", "end", "first_token", "block_size", "final", "checksum")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    MOVE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    stage: int
    move_id: str
    request_id: str
    epoch: int
    source: TransferPeer
    destination: TransferPeer
    fingerprint: str
    nonce: int
    start: int
    end: int
    first_token: int
    block_size: int
    final: bool
    checksum: bool
    def __init__(self, stage: _Optional[int] = ..., move_id: _Optional[str] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., source: _Optional[_Union[TransferPeer, _Mapping]] = ..., destination: _Optional[_Union[TransferPeer, _Mapping]] = ..., fingerprint: _Optional[str] = ..., nonce: _Optional[int] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., first_token: _Optional[int] = ..., block_size: _Optional[int] = ..., final: bool = ..., checksum: bool = ...) -> None: ...

class TransferPiece(_message.Message):
    __slots__ = ("stage", "index", "nbytes", "checksums")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    stage: int
    index: int
    nbytes: int
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, stage: _Optional[int] = ..., index: _Optional[int] = ..., nbytes: _Optional[int] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...

class TransferStageAbort(_message.Message):
    __slots__ = ("stage",)
    STAGE_FIELD_NUMBER: _ClassVar[int]
    stage: int
    def __init__(self, stage: _Optional[int] = ...) -> None: ...

class TransferConsumed(_message.Message):
    __slots__ = ("pieces",)
    PIECES_FIELD_NUMBER: _ClassVar[int]
    pieces: int
    def __init__(self, pieces: _Optional[int] = ...) -> None: ...

class TransferStageEnd(_message.Message):
    __slots__ = ("stage", "reason", "detail", "consumed")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    CONSUMED_FIELD_NUMBER: _ClassVar[int]
    stage: int
    reason: str
    detail: str
    consumed: int
    def __init__(self, stage: _Optional[int] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., consumed: _Optional[int] = ...) -> None: ...

class TransferFrame(_message.Message):
    __slots__ = ("hello", "offer", "answer", "ready", "refusal", "begin", "piece", "abort", "consumed", "end", "challenge", "proof")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    CONSUMED_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    hello: TransferHello
    offer: TransferOffer
    answer: TransferAnswer
    ready: TransferReady
    refusal: TransferRefusal
    begin: TransferStageBegin
    piece: TransferPiece
    abort: TransferStageAbort
    consumed: TransferConsumed
    end: TransferStageEnd
    challenge: TransferChallenge
    proof: TransferProof
    def __init__(self, hello: _Optional[_Union[TransferHello, _Mapping]] = ..., offer: _Optional[_Union[TransferOffer, _Mapping]] = ..., answer: _Optional[_Union[TransferAnswer, _Mapping]] = ..., ready: _Optional[_Union[TransferReady, _Mapping]] = ..., refusal: _Optional[_Union[TransferRefusal, _Mapping]] = ..., begin: _Optional[_Union[TransferStageBegin, _Mapping]] = ..., piece: _Optional[_Union[TransferPiece, _Mapping]] = ..., abort: _Optional[_Union[TransferStageAbort, _Mapping]] = ..., consumed: _Optional[_Union[TransferConsumed, _Mapping]] = ..., end: _Optional[_Union[TransferStageEnd, _Mapping]] = ..., challenge: _Optional[_Union[TransferChallenge, _Mapping]] = ..., proof: _Optional[_Union[TransferProof, _Mapping]] = ...) -> None: ...
