"""The next batches are drawn while this step computes: reading costs a step nothing, or less.

One thread draws, in order, so the batches are those of a run without it; and a checkpoint holds the
place behind the last batch that was *used*, so that a resume draws what was drawn ahead again.
It hides at most a step's own time: a source that is slower than the step still sets the pace.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dsv3_tutorial.train.corpus import Sampler

if TYPE_CHECKING:
    from dsv3_tutorial.train.step import TrainingState

Phases = Callable[[str], AbstractContextManager]


class PrefetchError(ValueError):
    """A number of batches that cannot be drawn ahead."""


class Prefetch(AbstractContextManager):
    """Stands in for a Sampler and draws `ahead` batches before they are asked for.

    Costs `ahead` batches of memory and a thread, which helps where the source waits or lets go of
    Python's lock (reading, unpacking, PyTorch). What drawing raises is raised by `draw`, at the
    batch that it befell, and at every later one until a state is loaded: none is skipped.
    """

    def __init__(self, sampler: Sampler, ahead: int = 2, phases: Phases | None = None):
        if not isinstance(ahead, int) or ahead < 1:
            raise PrefetchError(
                f"ahead = {ahead!r}: a thread that draws no batch in advance hides nothing. Give 1 "
                "or more (2 also hides a batch that takes longer than the others)."
            )
        self.sampler, self.ahead = sampler, ahead
        self.phases = phases or (lambda name: nullcontext())
        self.place = sampler.place
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.coming: deque[Future] = deque()
        self.starts, self.used = sampler.starts, sampler.state_dict()

    def draw(self) -> Tensor:
        """The next update's windows (B, S + 1) int64; waits only where none is ready."""
        self._order()
        batch, self.starts, self.used = self.coming[0].result()
        self.coming.popleft()
        self._order()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The place behind the last batch that `draw` gave out."""
        return dict(self.used)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to another place; what was drawn ahead is forgotten."""
        self._forget()
        self.sampler.load_state_dict(state)
        self.used = self.sampler.state_dict()

    def close(self) -> None:
        """End the thread, after the draw that it is in, and leave the sampler at the place used."""
        self._forget()
        self.pool.shutdown(wait=True)
        self.sampler.load_state_dict(self.used)
        self.sampler.starts = self.starts

    def __exit__(self, *_: object) -> None:
        self.close()

    def _order(self) -> None:
        while len(self.coming) < self.ahead and not self._failed():
            self.coming.append(self.pool.submit(self._next))

    def _failed(self) -> bool:
        return any(f.done() and not f.cancelled() and f.exception() for f in self.coming)

    def _next(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        with self.phases("data"):
            batch = self.sampler.draw()
        return batch, self.sampler.starts, self.sampler.state_dict()

    def _forget(self) -> None:
        for future in self.coming:
            future.cancel()
        for future in self.coming:
            if not future.cancelled():
                future.exception()  # waits for the draw that is going on
        self.coming.clear()


@contextmanager
def drawn_ahead(state: "TrainingState", ahead: int, phases: Phases | None = None) -> Iterator[None]:
    """Inside, the state's batches are drawn ahead (0: as they are); afterwards all is as before."""
    if not ahead:
        yield
        return
    sampler = state.sampler
    drawing = state.sampler = Prefetch(sampler, ahead, phases)
    try:
        yield
    finally:
        drawing.close()
        state.sampler = sampler
