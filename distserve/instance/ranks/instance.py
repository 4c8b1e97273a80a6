"""An instance of several ranks, as its process sees it: an engine and a data plane made of all of them."""

from __future__ import annotations

from collections.abc import Callable

from distserve.engine.config import EngineConfig
from distserve.engine.native import native_copies
from distserve.instance.ranks.engine import RankedEngine
from distserve.instance.ranks.moves import RankedDataPlane, Tally
from distserve.instance.ranks.muster import Mustered, Orders, Processes, muster
from distserve.instance.ranks.place import BadPlace, Place
from distserve.models.weights import Progress
from distserve.observe.startup import Mark, unmarked
from distserve.transfer import Mover, MoverEvent, TransferConfig
from distserve.transfer.address import data_address


class RankedInstance:
    """``load`` on the step thread, then ``data_plane``. ``lost`` and ``asked`` are a crew's, ``report`` a mover's."""

    def __init__(
        self,
        orders: Orders,
        place: Place | None,
        *,
        lost: Callable[[str], None],
        asked: Callable[[], None],
        report: Callable[[MoverEvent], None],
    ) -> None:
        self._orders = orders
        self._place = place
        self._lost, self._asked = lost, asked
        self._tally = Tally(orders.parallel.ranks, report)
        self._processes = Processes()
        self._mustered: Mustered | None = None
        self._kernels = "auto"

    def load(self, config: EngineConfig, progress: Progress, mark: Mark = unmarked) -> RankedEngine:
        """Bring the ranks together and load. Raises ModelError, BadPlace or RankLost with a sentence."""
        try:
            self._mustered = muster(
                config,
                self._orders,
                self._place,
                self._processes,
                progress,
                lost=self._lost,
                asked=self._asked,
                report=self._tally.take,
                mark=mark,
            )
        except RuntimeError as error:
            raise BadPlace(f"the ranks of {self._orders.ref.id} did not come together: {error}") from error
        self._kernels = config.kernels
        return RankedEngine(self._mustered.engine, self._mustered.crew, config.steps_in_flight)

    def data_plane(self, config: TransferConfig) -> RankedDataPlane:
        """Rank 0's own mover and the others', as one. It ends the ranks when it is closed."""
        assert self._mustered is not None, "the ranks were brought together"
        engine = self._mustered.engine
        own = Mover(
            self._orders.ref,
            engine.pool.tensor,
            engine.spec.block_size,
            fingerprint=engine.spec.fingerprint,
            report=lambda event: self._tally.take(0, event),
            kind=self._orders.transfer,
            config=config,
            cut=engine.cut,
            rank=0,
            native=native_copies(self._kernels),
        )
        address = data_address(self._orders.parallel, (own.address, *self._mustered.data_addresses))
        return RankedDataPlane(own, self._mustered.crew, self._tally, address, self._close)

    def kill(self) -> None:
        """The instance cannot go on: end the ranks that we started, whatever they do."""
        self._processes.kill()

    def _close(self) -> None:
        """Part: every rank ends by itself when its link does."""
        assert self._mustered is not None
        self._mustered.crew.close()
        self._processes.close()
