"""Token ids for simulated prompts: equal exactly where the trace says that prompts share a prefix."""

from __future__ import annotations

from distserve_planner.workload import Workload

SESSION = 1 << 31
"""Ids from here on are of one request alone; prefix block ids of a trace stay below."""


class Prompts:
    """Of one workload. Ids stand for content and nothing else; a block is one id, repeated."""

    def __init__(self, workload: Workload, *, distinct: bool) -> None:
        self._jobs = workload.jobs
        self._block = workload.prefix_tokens
        self._distinct = distinct
        longest = max((j.prompt for j in workload.jobs), default=0)
        self._same = (0,) * longest  # nobody compares prompts without a prefix cache

    def tokens(self, index: int) -> tuple[int, ...]:
        """``prompt`` ids; without a prefix cache all alike, which is quicker."""
        job = self._jobs[index]
        if not self._distinct:
            return self._same[: job.prompt]
        if not job.prefix:
            return (SESSION + index,) * job.prompt
        ids: list[int] = []
        for block in job.prefix:
            ids += [block] * self._block
        return tuple(ids[: job.prompt])
