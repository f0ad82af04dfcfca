"""Parts of a stage's work in other processes, on this machine or on others: by Dask, where `workers.dask` says so.

What all parts have in common goes to each process once, then part after part, a few ahead. Pictures depend on nothing
but their recipe, and each part is one call of the function that would be called here: the results are the same bits
where libraries, devices and numbers of threads are. A scheduler runs whatever it is sent: it has no place in an open
network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch

from deleatur.config.settings import Workers
from deleatur.errors import ServiceError, SettingsError

C = TypeVar("C")
P = TypeVar("P")
S = TypeVar("S")
R = TypeVar("R")

AHEAD = 2
"""Parts that wait at each process, so that none waits for us."""
PATIENCE = 60.0
"""Seconds for a scheduler to answer, and for its first worker to come."""


@contextmanager
def hands(workers: Workers) -> Iterator[Any]:
    """Inside, a client of the scheduler that the settings name, or of as many processes here; None where none does."""
    if workers.dask is None:
        yield None
        return
    try:
        from distributed import Client, LocalCluster
    except ImportError as e:
        raise SettingsError(
            "workers.dask: expected Dask to be installed, and it is not", hint="pip install 'deleatur[dask]'"
        ) from e
    if isinstance(workers.dask, int):
        # Processes with a thread each, as the one that asks; how much memory a model takes is nobody's business here.
        how = {"threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None}
        with LocalCluster(n_workers=workers.dask, **how) as cluster, Client(cluster) as client:
            yield client
        return
    with ExitStack() as opened:
        try:
            client = opened.enter_context(Client(workers.dask, timeout=PATIENCE))
            client.wait_for_workers(1, timeout=PATIENCE)
        except (OSError, ValueError) as e:  # a TimeoutError is an OSError
            raise ServiceError(
                f"the Dask scheduler {workers.dask} did not answer, or has no worker: {e}",
                hint=f"dask worker {workers.dask}, in the project's folder",
            ) from e
        yield client


def spread(
    client: Any, work: Callable[[C, S], R], common: C, parts: Sequence[P], sent: Callable[[P], S]
) -> Iterator[tuple[P, R]]:
    """(part, work(common, sent(part))) for all parts, in the order in which they are done."""
    if not parts:
        return
    left, threads = iter(parts), torch.get_num_threads()
    # By a name of its own: named by its content, it would be cleared away with what the call before has sent.
    [shared] = client.scatter([common], broadcast=True, hash=False)
    of: dict[Any, P] = {}

    def submit(part: P) -> Any:
        future = client.submit(_worked, threads, work, shared, sent(part), pure=False)
        of[future] = part
        return future

    from distributed import CancelledError, KilledWorker, as_completed

    first = islice(left, AHEAD * max(1, len(client.nthreads())))
    done = as_completed([submit(part) for part in first])
    for future in done:
        try:
            result: R = future.result()
        except (KilledWorker, CancelledError) as e:
            raise ServiceError(f"Dask lost a part of the work: {e}", hint="the same command, to go on") from e
        yield of.pop(future), result
        for part in islice(left, 1):
            done.add(submit(part))


_OWN: dict[str, tuple[str, Any]] = {}


def own(kind: str, key: str, make: Callable[[], R]) -> R:
    """What such a process has loaded for one part serves the next ones; the newest of each kind is kept."""
    if _OWN.get(kind, ("", None))[0] != key:
        _OWN[kind] = (key, make())
    found: R = _OWN[kind][1]
    return found


def _worked(threads: int, work: Callable[[C, S], R], common: C, part: S) -> R:
    torch.set_num_threads(threads)
    return work(common, part)
