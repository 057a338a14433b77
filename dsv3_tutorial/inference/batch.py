"""Continuous batching: requests join the batch when there is room and leave it when they end.

A static batch waits for its longest text and reserves the longest cache for all. Here each step
decodes one token of every running request, gives back what ended, and starts what waits, first come
first served. B batch, S prompt positions, V vocab_size.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dsv3_tutorial.attention.cache_paged import PagedCache
from dsv3_tutorial.attention.paged import LatentPages, PoolFull
from dsv3_tutorial.inference.batch_requests import Event, Job, Request, Result, Stats, Tally
from dsv3_tutorial.inference.requests import Answer, GenerationError, check_prompt, check_stop
from dsv3_tutorial.inference.sample import next_tokens, problem_of
from dsv3_tutorial.model import DeepSeekV3

__all__ = ["Event", "Request", "Result", "Server", "Stats"]


class Server:
    """Serves requests on one model from one pool of pages, at most `max_batch` at a time.

    pages: a LatentPages of the model's, or how many pages of `page_size` tokens to make, in the
    weights' dtype. A request starts only once pages for its prompt and all its new tokens are
    reserved, so none that started can fail for want of memory; until then it queues, and nobody
    passes it. Prompts of equal length that start together are read together, up to
    `prefill_tokens` tokens at once. A request's tokens are those of `generate` alone with the same
    sampling: its logits differ by rounding only, by at most 1e-5 of the largest in float32, whoever
    shares the batch. Where `weights.cpu` rounds inputs to BF16 or INT8 the last bit may tip such a
    rounding: logits then differ by thousandths of the largest, by a tenth where a choice of experts
    tips (the weights' own rounding moves them as far), and nearly as likely tokens may swap. A GPU
    is waited for once a step where all are greedy. For one thread.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        pages: LatentPages | int,
        max_batch: int = 8,
        page_size: int = 64,
        prefill_tokens: int = 2048,
    ):
        if max_batch < 1:
            raise GenerationError(
                f"max_batch is {max_batch}: no request could ever run. Allow 1 or more at a time."
            )
        weight = model.lm_head.weight
        if isinstance(pages, int):
            pages = LatentPages(model.cfg, pages, page_size, weight.dtype, weight.device)
        _check_pages(model, pages)
        self.model, self.pages, self.max_batch = model, pages, max_batch
        self.prefill_tokens, self.device = prefill_tokens, weight.device
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []
        self._events: list[Event] = []  # not yet handed out: kept if a step fails half-way
        self._tally, self._submitted = Tally(), 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do and nothing to tell."""
        return not (self._queue or self._running or self._events)

    @property
    def stats(self) -> Stats:
        pages = self.pages
        return self._tally.stats(
            len(self._queue), len(self._running), pages.pool.n_pages, pages.free
        )

    def submit(self, request: Request) -> int:
        """Queue a request, give back its number. Raises GenerationError for one never to be served.

        Refused at once: what `generate` refuses, and what would not fit in an empty pool.
        """
        cfg = self.model.cfg
        prompt = check_prompt(cfg, request.prompt, request.max_new_tokens)
        answer = Answer(request.max_new_tokens, check_stop(cfg, request.stop))
        (generator,) = request.sampling.generators(1)
        steps = self._tally.steps
        job = Job(self._submitted, prompt, answer, request.sampling, generator, steps)
        needed, pages = self.pages.needs(job.room), self.pages.pool.n_pages
        if needed > pages:
            raise GenerationError(
                f"The request needs {needed} pages for {job.room} tokens and the whole pool has "
                f"{pages}: it would wait for ever, and everybody behind it. Shorten it to "
                f"{pages * self.pages.page_size} tokens, or make the pool larger."
            )
        self._submitted += 1
        self._queue.append(job)
        return job.id

    def cancel(self, request: int) -> bool:
        """End a request now, queued or running; False where it ended already.

        Its pages are free at once; the next step tells the tokens that it got. Raises
        GenerationError for a number that was never given out.
        """
        if not 0 <= request < self._submitted:
            raise GenerationError(
                f"There is no request {request!r}: {self._submitted} were submitted, numbered from "
                "0. Cancelling another's would lose its text. Pass what submit() gave."
            )
        job = next((job for job in (*self._running, *self._queue) if job.id == request), None)
        if job is None:
            return False
        if job in self._queue:
            self._queue.remove(job)
        self._end(job, "cancelled")
        return True

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token for each running request, then start what has room: what happened, in order.

        If it raises, nothing is lost: pages and lengths are as they were, what was about to start
        is queued again, and the next call repeats the step with the same random numbers.
        """
        if self._running:
            self._decode(list(self._running))
        while jobs := self._startable():
            self._prefill(jobs)
        self._tally.steps += 1
        events, self._events = self._events, []
        return events

    def run(self) -> dict[int, Result]:
        """Step until nothing is left to do: the results of all that ended meanwhile."""
        results = {}
        while not self.idle:
            events = self.step()
            if not (events or self._running):
                raise GenerationError(
                    f"{len(self._queue)} requests wait and none can start: whoever shares the pool "
                    f"holds {self.pages.pool.n_pages - self.pages.free} of its pages. Close those "
                    "texts, or give this server a pool of its own."
                )
            results |= {event.request: event.result for event in events if event.result}
        return results

    def _decode(self, jobs: list[Job]) -> None:
        newest = [[job.answer.tokens[-1]] for job in jobs]
        caches = self.pages.caches([job.id for job in jobs])
        with _undone(jobs, caches):
            logits = self._logits(newest, caches)
            tokens = _chosen(logits, jobs)
        self._take(jobs, tokens, logits)

    def _startable(self) -> list[Job]:
        """The head of the queue and those behind it that are as long, their pages reserved."""
        jobs: list[Job] = []
        while self._queue and len(self._running) + len(jobs) < self.max_batch:
            job = self._queue[0]
            length = len(job.prompt)
            if jobs and length != len(jobs[0].prompt):
                break
            if jobs and length * (len(jobs) + 1) > self.prefill_tokens:
                break
            try:
                self.pages.open(job.id, job.room)
            except PoolFull:
                break
            jobs.append(self._queue.popleft())
        return jobs

    def _prefill(self, jobs: list[Job]) -> None:
        try:
            caches = self.pages.caches([job.id for job in jobs])
            with _undone(jobs, caches):
                logits = self._logits([job.prompt for job in jobs], caches)
                tokens = _chosen(logits, jobs)
        except BaseException:
            for job in jobs:
                self.pages.close(job.id)
            self._queue.extendleft(reversed(jobs))
            raise
        for job in jobs:
            job.waited = self._tally.steps - job.submitted
            self._tally.start(job.waited)
            self._events.append(Event(job.id, "started"))
        self._running += jobs
        self._take(jobs, tokens, logits)

    def _logits(self, ids: Sequence[Sequence[int]], caches: list[PagedCache]) -> Tensor:
        """Read ids (B, S) behind each text -> logits (B, V) of the last position alone."""
        ids = torch.tensor(ids).to(self.device, non_blocking=True)  # a GPU is not waited for
        hidden = self.model.model(ids, caches)  # (B, S, D)
        return self.model.lm_head(hidden[:, -1])  # (B, V)

    def _take(self, jobs: list[Job], tokens: list[int | None], logits: Tensor) -> None:
        for place, (job, token) in enumerate(zip(jobs, tokens, strict=True)):
            if token is None:
                self._end(job, "error", problem_of(logits[place]))
                continue
            before = len(job.answer.tokens)
            job.answer.add(token)
            if len(job.answer.tokens) > before:
                self._tally.tokens += 1
                self._events.append(Event(job.id, "token", token=token))
            if job.answer.reason:
                self._end(job, job.answer.reason)

    def _end(self, job: Job, reason: str, problem: str | None = None) -> None:
        if job in self._running:
            self._running.remove(job)
            self.pages.close(job.id)
        self._tally.end(reason)
        self._events.append(Event(job.id, "finished", result=job.result(reason, problem)))


def _check_pages(model: DeepSeekV3, pages: LatentPages) -> None:
    cfg, held = model.cfg, (len(pages.storages), pages.layout.rank, pages.layout.rope)
    wanted = model.model.depth, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    if held[0] < wanted[0] or held[1:] != wanted[1:]:
        raise GenerationError(
            f"These pages are for {held[0]} layers, latents of {held[1]} and RoPE keys of "
            f"{held[2]}; the model has {wanted[0]}, {wanted[1]} and {wanted[2]}: its rows would "
            "not fit. Make them with LatentPages(model.cfg, ...)."
        )


def _chosen(logits: Tensor, jobs: list[Job]) -> list[int | None]:
    return next_tokens(logits, [job.sampling for job in jobs], [job.generator for job in jobs])


@contextmanager
def _undone(jobs: list[Job], caches: list[PagedCache]) -> Iterator[None]:
    """If the body raises, no layer keeps a token of it, and no generator a number that it drew."""
    drawn = [None if job.sampling.greedy else job.generator.get_state() for job in jobs]
    try:
        yield
    except BaseException:
        for cache in caches:
            cache.trim([job.stored for job in jobs])
        for job, state in zip(jobs, drawn):
            if state is not None:
                job.generator.set_state(state)
        raise
