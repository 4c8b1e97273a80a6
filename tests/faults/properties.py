"""What must hold: every property by name, and what is raised where one does not. Knows no machine.

To add a property: name it here with its promise, raise ``Violation`` where it can be seen (``checks_*`` for what a
machine's state and effects show, ``shells`` and ``dataplane`` for what is done with blocks, ``clients`` for what a
client is told, ``world`` for what is left in the end), and break it on purpose in ``breakages``.
"""

from __future__ import annotations

from enum import StrEnum


class Property(StrEnum):
    """One promise; the value is the name that reports and tables print."""

    TOKENS = "exact stream"
    REASON = "fitting end"
    ACCOUNT = "times add up"
    OWNER = "one owner"
    EPOCH = "no stale epoch"
    LEDGER = "ledger"
    STATE = "machine's own check"
    WRITES = "ticketed writes"
    KV = "right KV"
    STEP = "sound steps"
    DEADLINE = "waits have deadlines"
    OVERDUE = "deadlines are kept"
    REPEAT = "the unanswered is repeated"
    SPIN = "no spinning"
    PROGRESS = "who can act acts"
    LETGO = "let go at once"
    ORDER = "first token first"
    TOLD = "every holder is told"
    TOMBSTONE = "tombstones end"
    CYCLE = "waits form no cycle"
    ALIVE = "the living are not declared dead"
    LIVENESS = "drains in time"
    RECOVERY = "moves on after faults"
    REST = "nothing left at rest"
    SERVES = "serves again"
    CRASH = "a machine raised"


PROMISES: dict[Property, str] = {
    Property.TOKENS: "a client gets the expected tokens, in order, each once",
    Property.REASON: "a stream ends when it should, or with a reason that fits what happened",
    Property.ACCOUNT: "the parts of TTFT sum to it; an account counts what was delivered",
    Property.OWNER: "an epoch of a request has one owner, once, in the cluster; an instance holds one thing for it",
    Property.EPOCH: "a gateway takes tokens from the highest epoch seen alone, and believes no outdated member list",
    Property.LEDGER: "block states sum to the pool; every block that is not free has a live owner able to release it",
    Property.STATE: "queue, running set, moves, streams and counts agree with each other",
    Property.WRITES: "KV is written by a step into its own blocks, or under a valid ticket into the blocks it reserved",
    Property.KV: "a step reads, and a stage sends, exactly the KV of its tokens",
    Property.STEP: "one step at a time, of the right tokens, into blocks that are nobody else's until it is done",
    Property.DEADLINE: "whoever waits has a next deadline",
    Property.OVERDUE: "no wait outlasts the time configured for it, nor is a move given up before",
    Property.REPEAT: "an ask, a commit or an abandonment without an answer is repeated at its configured pace",
    Property.SPIN: "a tick leaves no deadline in the past",
    Property.PROGRESS: "work with all it needs is done at once: admitted, granted, stepped, sent, committed, adopted",
    Property.LETGO: "what was abandoned, or belongs to the lost, is held no more once that is heard",
    Property.ORDER: "the first token leaves the prefill instance before its KV does",
    Property.TOLD: "who gives an attempt up tells every reachable holder in the same breath",
    Property.TOMBSTONE: "no tombstone is older than its bound, nor lasts longer",
    Property.CYCLE: "the graph of instances whose blocks wait for blocks of others has no cycle",
    Property.ALIVE: "the controller gives up no life whose heartbeats reach it, however long its step takes",
    Property.LIVENESS: "once faults are over every request ends within its own timeout and 10 s",
    Property.RECOVERY: "faults over, KV moves or some client hears something every 12 s while any waits, each in 100 s",
    Property.REST: "at rest nobody is open, all blocks are free or cached, no timer runs, no ticket is open",
    Property.SERVES: "at rest the cluster serves one request more through every gateway, without an error",
    Property.CRASH: "no event makes a machine raise",
}


class Violation(AssertionError):
    """A property of the cluster does not hold."""

    def __init__(self, broken: Property, what: str) -> None:
        super().__init__(what)
        self.broken = broken
