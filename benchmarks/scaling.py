"""Sampling on several Dask workers: speed-up over one worker, and equality of the outputs.
python benchmarks/scaling.py [--help]

The stage `sample` of a model that UCE has edited. Scheduler and workers are started before the clock; importing and
loading the model in a worker counts. This process has as many threads as a worker, because another number could change
bits. The first row samples without Dask.
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
"""Images in a shard. With more shards a worker idles less at the end."""


@contextmanager
def scheduler(workers: int) -> Iterator[str | None]:
    """The address of a scheduler with that many workers; None without workers."""
    if not workers:
        yield None
        return
    with LocalCluster(n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address=None) as cluster:
        cluster.wait_for_workers(workers)
        yield cluster.scheduler_address


def edited_model(per_prompt: int) -> tuple[dict[str, Any], Settings]:
    """Changes to params.yaml that all rows share, and the settings with the edited model."""
    roles = dict.fromkeys(("concept", "word", "neighbour", "keep", "unseen"), per_prompt)
    changes: dict[str, Any] = {
        "targets": ["weapon"],
        "erase": {"method": "uce", "source": "words"},
        "attack": {"methods": {}},
        "sample": {"images_per_prompt": roles | {"token": 0}, "shard_size": SHARD},
    }
    bench.run(bench.variant("ingest", {}), ("ingest",))
    settings = bench.variant("scaling", changes)
    bench.run(settings, ("reward", "erase"))
    return changes, settings


def time_sampling(workers: int, per_prompt: int, threads: int) -> tuple[float, int, dict[str, str]]:
    """(seconds, number of images, digest of every output file)."""
    changes, model = edited_model(per_prompt)
    settings = bench.variant(f"scaling-{workers}-{threads}", changes, {"delta": str(model.paths.delta)})
    with scheduler(workers) as address:
        settings = settings.model_copy(update={"workers": settings.workers.model_copy(update={"dask": address})})
        seconds = bench.run(settings, ("sample",))["sample"]
    return seconds, len(samples.read_listing(settings.paths.samples)), file_digests(settings)


def file_digests(settings: Settings) -> dict[str, str]:
    files = (path for path in sorted(settings.paths.samples.rglob("*")) if path.is_file())
    return {str(f.relative_to(settings.paths.samples)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--per-prompt", type=int, default=4, help="images of each prompt and variant")
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker and of this process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {
        n: time_sampling(n, arguments.per_prompt, arguments.threads) for n in dict.fromkeys([0, 1, *arguments.workers])
    }
    (_, images, expected), (one_worker, _, _) = results[0], results[1]
    rows = [
        {
            "Dask workers": str(n) if n else "none",
            "seconds": f"{seconds:.1f}",
            "of one worker's": f"{seconds / one_worker:.2f}",
            "images per second": f"{images / seconds:.1f}",
            "same bits as without": "yes" if digests == expected else "NO",
        }
        for n, (seconds, _, digests) in results.items()
    ]
    bench.print_table(f"Sampling {images} images in shards of {SHARD}", rows)


if __name__ == "__main__":
    main()
