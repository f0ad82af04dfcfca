"""Batches of a stage's work on Dask workers, on this machine or on others, where `workers.dask` is set.

What all batches share is sent to each worker once, then batch after batch, a few ahead. An image depends on nothing but
its recipe, and each batch is one call of the function that would be called locally: the results are the same bits where
libraries, devices and numbers of threads are the same. Each worker compares its code with that of this process before
it runs anything, since results are stored under the digest of the code that is here. A Dask scheduler runs whatever
code it is sent: keep it off open networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import islice
from socket import gethostname
from typing import Any, TypeVar

import torch

from deleatur import dependencies
from deleatur.config.sections import WorkersSection
from deleatur.errors import ServiceError, SettingsError
from deleatur.runtime import provenance

B = TypeVar("B")
C = TypeVar("C")
S = TypeVar("S")
R = TypeVar("R")

PREFETCH = 2
"""Batches queued at each worker, so that none is idle."""
LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow")
"""Libraries that results depend on; builds for other devices have the same version."""
SAME_CODE_HINT = "install the code and packages of this machine on the worker and restart it; then the same command"
TIMEOUT = 60.0
"""Seconds for a scheduler to answer, and for its first worker to appear."""


@contextmanager
def dask_client(workers: WorkersSection) -> Iterator[Any]:
    """A client of the configured scheduler, or of as many local processes; None where `workers.dask` is null."""
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
        # One thread per process, as in this one; memory is not limited, since models of any size are loaded.
        how = {"threads_per_worker": 1, "memory_limit": 0, "dashboard_address": "127.0.0.1:0"}  # None takes port 8787
        with LocalCluster(n_workers=workers.dask, **how) as cluster, Client(cluster) as client:
            yield client
        return
    with ExitStack() as opened:
        try:
            client = opened.enter_context(Client(workers.dask, timeout=TIMEOUT))
            client.wait_for_workers(1, timeout=TIMEOUT)
        except (OSError, ValueError) as e:  # a TimeoutError is an OSError
            raise ServiceError(
                f"the Dask scheduler {workers.dask} did not answer, or has no worker: {e}",
                hint=f"dask worker {workers.dask}, in the project's folder",
            ) from e
        yield client


def map_batches(
    client: Any,
    function: Callable[[C, S], R],
    shared: C,
    batches: Sequence[B],
    load: Callable[[B], S],
    plugins: Sequence[type] = (),
) -> Iterator[tuple[B, R]]:
    """(batch, function(shared, load(batch))) for all batches, in the order in which they finish.

    plugins: classes that `function` uses without naming them. Raises SettingsError where a worker runs other code.
    `load` runs here, just before a batch is sent. Raises ServiceError where a worker is lost.
    """
    if not batches:
        return
    remaining, threads, entries = iter(batches), torch.get_num_threads(), (function, *plugins)
    code = code_of(*entries)
    # Under a random key: under one made from its content, Dask would release it with the previous call's.
    [scattered] = client.scatter([shared], broadcast=True, hash=False)
    submitted: dict[Any, B] = {}

    def submit(batch: B) -> Any:
        future = client.submit(_run_on_worker, threads, code, entries, scattered, load(batch), pure=False)
        submitted[future] = batch
        return future

    from distributed import CancelledError, KilledWorker, as_completed

    first = islice(remaining, PREFETCH * max(1, len(client.nthreads())))
    finished = as_completed([submit(batch) for batch in first])
    for future in finished:
        try:
            result: R = future.result()
        except (KilledWorker, CancelledError) as e:
            raise ServiceError(f"a Dask worker was lost: {e}", hint="the same command, to resume") from e
        except (ImportError, AttributeError, TypeError) as e:  # a definition that the worker lacks, or has another of
            raise SettingsError(
                f"workers.dask: a worker cannot run what it is sent, by other code than here: {e!r}",
                hint=SAME_CODE_HINT,
            ) from e
        yield submitted.pop(future), result
        for batch in islice(remaining, 1):
            finished.add(submit(batch))


_CACHE: dict[str, tuple[str, Any]] = {}


def worker_cache(kind: str, key: str, load: Callable[[], R]) -> R:
    """What a worker has loaded for one batch serves the next ones; it keeps the newest of each kind."""
    if _CACHE.get(kind, ("", None))[0] != key:
        _CACHE[kind] = (key, load())
    cached: R = _CACHE[kind][1]
    return cached


@cache
def code_of(*entries: Callable[..., Any]) -> Mapping[str, str]:
    """Module → digest of the code that functions and classes can reach in this process; library → version."""
    versions = {name: version.partition("+")[0] for name, version in provenance.installed(LIBRARIES).items()}
    return dependencies.code_digests(*entries) | versions


def _run_on_worker(
    threads: int, expected: Mapping[str, str], entries: Sequence[Callable[..., Any]], shared: Any, batch: Any
) -> Any:
    """entries: the function, and the plug-ins that it uses."""
    actual = code_of(*entries)
    if differing := sorted(n for n in actual.keys() | expected.keys() if actual.get(n) != expected.get(n)):
        raise SettingsError(
            f"workers.dask: expected the code of the process that starts the run, and the worker on {gethostname()} "
            f"has another {', '.join(differing[:5])}{' …' if len(differing) > 5 else ''}",
            hint=SAME_CODE_HINT,
        )
    torch.set_num_threads(threads)
    return entries[0](shared, batch)
