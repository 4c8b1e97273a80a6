"""Which rank this process is, and where the ranks of its instance meet: told by torchrun or Kubernetes through the
environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK, LOCAL_WORLD_SIZE), or by rank 0 when it starts the
others itself.

The meeting point is a store of ``torch.distributed`` that rank 0 keeps (under torchrun, its agent does). It holds two
things: where rank 0 listens, and what process groups need to find each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from distserve.kv.shard import Parallel
from distserve.wire.channels import own_host
from distserve_kernels.cores import share_cores

ADDRESS_KEY = "distserve/address-of-rank-0"


class BadPlace(ValueError):
    """The environment does not fit the instance; the text is for the user."""


@dataclass(frozen=True, slots=True)
class Place:
    """One rank of an instance and its meeting point."""

    rank: int
    world: int
    host: str  # of the store
    port: int
    local_rank: int  # on its machine
    keeper: bool  # whether this process keeps the store
    local_world: int = 1  # ranks on its machine
    attempt: str = "0"  # of the whole group of processes; stores that outlive it tell attempts apart by this

    def cores(self, cores: Sequence[int], threads: int) -> tuple[int, ...]:
        """This rank's own of the cores that its instance keeps to here; all of them where they do not suffice."""
        if self.local_rank >= self.local_world:  # nobody said how many ranks share this machine
            return tuple(cores)
        return share_cores(cores, [max(1, threads)] * self.local_world)[self.local_rank] or tuple(cores)

    @property
    def interface(self) -> str:
        """Our own address towards the others."""
        return own_host("0.0.0.0", f"{self.host}:{self.port}")

    def store(self, timeout_s: float) -> dist.Store:
        """Open, or reach, the meeting point. BadPlace when it cannot be had in time."""
        try:
            store = dist.TCPStore(
                self.host,
                self.port,
                is_master=self.keeper,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
            )
        except (RuntimeError, ValueError) as error:
            verb = "kept" if self.keeper else "reached"
            raise BadPlace(
                f"the meeting point of this instance's ranks cannot be {verb} at {self.host}:{self.port} "
                f"(MASTER_ADDR, MASTER_PORT): {str(error).splitlines()[0]}"
            ) from None
        return self.prefixed(store)

    def prefixed(self, store: dist.Store) -> dist.Store:
        """The keys of this attempt."""
        return dist.PrefixStore(f"distserve/{self.attempt}", store)

    def environ(self) -> dict[str, str]:
        """What tells another process its place."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "MASTER_ADDR": self.host,
            "MASTER_PORT": str(self.port),
        }


def place_of(environ: Mapping[str, str], parallel: Parallel) -> Place | None:
    """The place that the environment gives; None when it gives none, or the instance is one rank. Raises BadPlace."""
    if parallel.ranks == 1 or "RANK" not in environ:
        return None
    try:
        rank, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        local, beside = int(environ.get("LOCAL_RANK", "0")), int(environ.get("LOCAL_WORLD_SIZE", "1"))
    except (KeyError, ValueError) as error:
        raise BadPlace(
            f"RANK is set, but {error} is missing or no number: set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for "
            "every rank, or none of them to have rank 0 start the others"
        ) from None
    if world != parallel.ranks or not 0 <= rank < world:
        raise BadPlace(
            f"--tp {parallel.tp} --pp {parallel.pp} is {parallel.ranks} ranks, but RANK={rank} WORLD_SIZE={world} "
            "in the environment; make them fit"
        )
    agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keeper = rank == 0 and not agent
    return Place(rank, world, host, port, local, keeper=keeper, local_world=max(1, beside), attempt=attempt)


def rank_device(device: str, local_rank: int) -> str:
    """The device of a rank: ``cuda`` is one GPU for each rank of a machine, ``cuda:2`` the first of them."""
    kind, _, first = device.partition(":")
    return device if kind != "cuda" else f"cuda:{int(first or 0) + local_rank}"
