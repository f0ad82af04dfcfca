"""Pictures drawn by several Dask workers against one: how much sooner, and are they the same?
python benchmarks/scaling.py [--help]

The stage `sample` of a model that UCE has edited. Scheduler and workers are up before the clock starts, as in a network
they would be; that a worker imports and loads the model counts. The thread that each of them has, one unless said
otherwise, this process has too: another number could be other bits. The first row draws without Dask.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bench
import torch
from distributed import LocalCluster

from deleatur.config.settings import Settings
from deleatur.storage import samples

SHARD = 64
"""Pictures in a part of the work. The more parts, the less a worker waits for the other's last."""


@contextmanager
def scheduler(workers: int) -> Iterator[str | None]:
    """Inside, the address of a scheduler with so many workers; None without any."""
    if not workers:
        yield None
        return
    with LocalCluster(n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address=None) as cluster:
        cluster.wait_for_workers(workers)
        yield cluster.scheduler_address


def edited(per_prompt: int) -> tuple[dict[str, Any], Settings]:
    """What all rows have in common: how much is drawn, and the model."""
    roles = dict.fromkeys(("concept", "word", "neighbour", "keep", "unseen"), per_prompt)
    changes: dict[str, Any] = {
        "targets": ["weapon"],
        "erase": {"method": "uce", "source": "words"},
        "attack": {"methods": {}},
        "sample": {"per_prompt": roles | {"token": 0}, "shard": SHARD},
    }
    bench.run(bench.variant("ingest", {}), ("ingest",))
    settings = bench.variant("scaling", changes)
    bench.run(settings, ("reward", "erase"))
    return changes, settings


def drawn(workers: int, per_prompt: int, threads: int) -> tuple[float, int, dict[str, str]]:
    """Seconds, pictures, and the digest of every file that the stage leaves."""
    changes, model = edited(per_prompt)
    settings = bench.variant(f"scaling-{workers}-{threads}", changes, {"delta": str(model.paths.delta)})
    with scheduler(workers) as address:
        settings = settings.model_copy(update={"workers": settings.workers.model_copy(update={"dask": address})})
        seconds = bench.run(settings, ("sample",))["sample"]
    return seconds, len(samples.listed(settings.paths.shots)), bits(settings)


def bits(settings: Settings) -> dict[str, str]:
    files = (path for path in sorted(settings.paths.shots.rglob("*")) if path.is_file())
    return {str(f.relative_to(settings.paths.shots)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--per-prompt", type=int, default=4, help="pictures of each prompt and side")
    parser.add_argument("--threads", type=int, default=1, help="of each worker, and of this process")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    found = {n: drawn(n, asked.per_prompt, asked.threads) for n in dict.fromkeys([0, 1, *asked.workers])}
    (_, pictures, same), (one, _, _) = found[0], found[1]
    rows = [
        {
            "Dask workers": str(n) if n else "none",
            "seconds": f"{seconds:.1f}",
            "of one worker's": f"{seconds / one:.2f}",
            "pictures a second": f"{pictures / seconds:.1f}",
            "same bits as without": "yes" if made == same else "NO",
        }
        for n, (seconds, _, made) in found.items()
    ]
    bench.show(f"Sampling {pictures} pictures in parts of {SHARD}", rows)


if __name__ == "__main__":
    main()
