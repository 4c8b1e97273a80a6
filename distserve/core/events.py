"""Every thing that may happen, to any of the three machines. Frozen data; handled elsewhere.

One machine's ``Send`` effect carries another machine's event, so this list *is* the wire protocol: ``protos/`` mirrors
it one to one and a test keeps the two in step. Events marked *local* come from the shell that hosts the machine and
never travel. Those of the move stand in ``moves``.
"""

from __future__ import annotations

from dataclasses import dataclass

from distserve.core.moves import (
    CommitAsked as CommitAsked,
)
from distserve.core.moves import (
    Committed as Committed,
)
from distserve.core.moves import (
    MoveEnded as MoveEnded,
)
from distserve.core.moves import (
    MoveQueried as MoveQueried,
)
from distserve.core.moves import (
    PeerLost as PeerLost,
)
from distserve.core.moves import (
    ReserveAsked as ReserveAsked,
)
from distserve.core.moves import (
    ReserveGranted as ReserveGranted,
)
from distserve.core.moves import (
    StageCorrupt as StageCorrupt,
)
from distserve.core.moves import (
    StageFailed as StageFailed,
)
from distserve.core.moves import (
    StageSent as StageSent,
)
from distserve.core.moves import (
    StageStored as StageStored,
)
from distserve.core.types import (
    Code,
    Endpoint,
    FinishReason,
    GatewayRef,
    InstanceRef,
    Load,
    Member,
    Placement,
    Request,
    Timings,
    Token,
)

# ── gateway → controller ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class GatewayJoined:
    """A gateway's control stream is up."""

    gateway: GatewayRef


@dataclass(frozen=True, slots=True)
class GatewayLeft:
    """Local to the controller: a gateway's control stream broke or it said goodbye."""

    gateway: GatewayRef
    why: str = ""


@dataclass(frozen=True, slots=True)
class DispatchAsked:
    """A gateway wants a prefill and a decode instance for one attempt of a request."""

    gateway: GatewayRef
    request_id: str
    epoch: int
    model: str
    prompt_tokens: int  # prompt and tokens already delivered
    total_tokens: int  # the most the sequence can come to
    priority: int = 0
    tenant: str = ""
    prefix_hashes: tuple[int, ...] = ()  # chain over runs of PREFIX_RUN tokens, for affinity
    avoid: tuple[InstanceRef, ...] = ()  # lives that just failed this request


@dataclass(frozen=True, slots=True)
class PrefillFinished:
    """A gateway saw the first token of an attempt: its prompt no longer queues."""

    gateway: GatewayRef
    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """A gateway is done with a request, for whatever reason."""

    gateway: GatewayRef
    request_id: str


# ── instance → controller ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Joined:
    """An instance registers (or registers again with a new controller)."""

    member: Member
    load: Load


@dataclass(frozen=True, slots=True)
class Reported:
    """A heartbeat with the instance's load. Silence past the lease means death."""

    ref: InstanceRef
    load: Load


@dataclass(frozen=True, slots=True)
class InstanceLeft:
    """Local to the controller: an instance's control stream broke, or it said goodbye."""

    ref: InstanceRef
    why: str = ""


# ── controller → instance, controller → gateway ──────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The controller took the instance in; it expects a report at least every ``lease_s``."""

    lease_s: float


@dataclass(frozen=True, slots=True)
class JoinRefused:
    """The controller will not have this instance; ``reason`` names both sides in a sentence."""

    reason: str


@dataclass(frozen=True, slots=True)
class JoinAsked:
    """The controller does not know the sender of a report (its lease ran out): it should join again."""


@dataclass(frozen=True, slots=True)
class MembersChanged:
    """All members now, in order of joining. ``version`` only grows within one controller's life.

    Sent to gateways (to connect and to dispatch in bypass) and to instances (to end moves with the dead). ``lost``
    names the lives that this controller saw go lately; a member that is merely not (yet) listed, as after a
    controller's restart, is not thereby lost.
    """

    version: int
    members: tuple[Member, ...]
    lost: tuple[InstanceRef, ...] = ()


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Where an attempt goes. ``decode == prefill`` means no hand-off. ``placement``: why; None when it was not said."""

    request_id: str
    epoch: int
    prefill: Endpoint
    decode: Endpoint
    placement: Placement | None = None


@dataclass(frozen=True, slots=True)
class DispatchRefused:
    """No instance for this attempt. ``RESOURCE_EXHAUSTED`` and ``UNAVAILABLE`` carry when to try again."""

    request_id: str
    epoch: int
    code: Code
    message: str
    retry_after_s: float = 0.0


# ── gateway ↔ instance ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Submit:
    """Prefill this request here; then hand it off to ``decode`` unless that is this instance.

    ``delivered`` are output tokens the client already has (a resumed attempt): they are computed like prompt, and the
    next token sampled has index ``len(delivered)``. ``timeout_s`` is what is left of the request's deadline.
    """

    gateway: GatewayRef
    request: Request
    epoch: int
    decode: Endpoint
    delivered: tuple[int, ...] = ()
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Abandon:
    """Give up everything held for this request at epochs ``<= epoch``. Valid in every phase, and before Submit."""

    gateway: GatewayRef
    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Abandoned:
    """Nothing is held here any more for this request at epochs ``<= epoch``."""

    source: InstanceRef
    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What one sequence has to say after a step. Indices count the request's output tokens from 0."""

    request_id: str
    epoch: int
    first_index: int
    tokens: tuple[Token, ...]
    finish: FinishReason | None = None
    timings: Timings | None = None  # the parts measured since the last time they were sent


@dataclass(frozen=True, slots=True)
class TokensMade:
    """One message a step for all of a gateway's requests on the sending instance."""

    source: InstanceRef
    outputs: tuple[SequenceOutput, ...]


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """The owner gives an attempt up and holds nothing for it any more. ``retriable``: another place may do better."""

    source: InstanceRef
    request_id: str
    epoch: int
    code: Code
    message: str
    retriable: bool
    culprit: InstanceRef | None = None  # the life to avoid next time


@dataclass(frozen=True, slots=True)
class GatewayAttached:
    """Local to the instance: a gateway's token stream is up."""

    gateway: GatewayRef


@dataclass(frozen=True, slots=True)
class GatewayLost:
    """Local to the instance: a gateway's token stream broke. All its requests end here."""

    gateway: GatewayRef


@dataclass(frozen=True, slots=True)
class Draining:
    """Local to the instance: told to end, it finishes what it has and grants no move any more."""


# ── engine → instance (local) ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class StepDone:
    """The step ran. ``tokens`` holds (request id, token) for each item that sampled, in item order."""

    number: int
    tokens: tuple[tuple[str, Token], ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The forward pass raised; no token of this step exists."""

    number: int
    message: str


@dataclass(frozen=True, slots=True)
class StepAbandoned:
    """The step was given up before its end, for nobody waited for it any more: it counts as never run."""

    number: int


# ── client → gateway (local) ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Submitted:
    """A client's request, validated and tokenized. ``tokenize_s`` was spent on it before it came here."""

    request: Request
    tokenize_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ClientCancelled:
    """The client left, a stop string matched, or an operator cancelled. ``finish`` is what the stream ends with."""

    request_id: str
    finish: FinishReason = FinishReason.CANCELLED


@dataclass(frozen=True, slots=True)
class InstanceFound:
    """Local to the gateway: the token stream to this life of an instance is up."""

    ref: InstanceRef


@dataclass(frozen=True, slots=True)
class InstanceLost:
    """Local to the gateway: the token stream to this life of an instance broke."""

    ref: InstanceRef
    why: str = ""


@dataclass(frozen=True, slots=True)
class ControllerLost:
    """Local to gateway and instance: the control stream broke."""


@dataclass(frozen=True, slots=True)
class ControllerFound:
    """Local to gateway and instance: the control stream is up (again)."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Local to all: time has passed; act on deadlines."""


GatewayEvent = (
    Submitted
    | ClientCancelled
    | Dispatched
    | DispatchRefused
    | MembersChanged
    | TokensMade
    | AttemptFailed
    | Abandoned
    | InstanceFound
    | InstanceLost
    | ControllerLost
    | ControllerFound
    | Tick
)

ClusterEvent = (
    GatewayJoined
    | GatewayLeft
    | DispatchAsked
    | PrefillFinished
    | RequestEnded
    | Joined
    | Reported
    | InstanceLeft
    | Tick
)

InstanceEvent = (
    Submit
    | Abandon
    | GatewayAttached
    | GatewayLost
    | Draining
    | ReserveAsked
    | ReserveGranted
    | MoveEnded
    | CommitAsked
    | Committed
    | MoveQueried
    | PeerLost
    | StageSent
    | StageFailed
    | StageStored
    | StageCorrupt
    | StepDone
    | StepFailed
    | StepAbandoned
    | Welcomed
    | JoinRefused
    | JoinAsked
    | MembersChanged
    | ControllerLost
    | ControllerFound
    | Tick
)

Event = GatewayEvent | ClusterEvent | InstanceEvent
