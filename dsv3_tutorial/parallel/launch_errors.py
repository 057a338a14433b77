"""What can go wrong with ranks, each with the rank it is about."""


class ParallelError(RuntimeError):
    """Ranks could not be started, or did not end well."""


class RankFailed(ParallelError):
    """One rank raised or died: `rank`, and `traceback`, its own ("" where it was killed)."""

    def __init__(self, rank: int, message: str, traceback: str = ""):
        self.rank, self.traceback = rank, traceback
        super().__init__(message)


class RankTimeout(ParallelError):
    """Ranks did not end in time: `ranks`, and `stacks`, {rank: where it stood}."""

    def __init__(self, ranks: tuple[int, ...], stacks: dict[int, str], message: str):
        self.ranks, self.stacks = ranks, stacks
        super().__init__(message)
