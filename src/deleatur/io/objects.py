"""Addresses → local folders: s3://bucket/prefix by boto3, models:/name@alias by MLflow, all else as it is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from deleatur.errors import ServiceError

CACHE = Path.home() / ".cache" / "deleatur"


def local(address: str, part: str = "pipeline") -> str:
    """A path or hub id that the libraries load themselves. Downloads are kept and not repeated.

    part: which folder of a registered model, "pipeline" or "delta"; other addresses are such a folder already.
    """
    if address.startswith("s3://"):
        return str(_from_s3(address))
    if address.startswith("models:/"):
        return str(_from_registry(address, part))
    return address


def _from_s3(address: str) -> Path:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = address.removeprefix("s3://").rstrip("/").partition("/")
    prefix += "/" if prefix else ""  # a folder, not all whose names begin so
    target = CACHE / hashlib.sha256(address.encode()).hexdigest()[:16]
    try:
        client = boto3.client("s3")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for entry in (e for page in pages for e in page.get("Contents", [])):
            file = target / str(entry["Key"]).removeprefix(prefix)
            if file.is_file() and file.stat().st_size == entry["Size"]:
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".{file.name}.partial")
            client.download_file(bucket, entry["Key"], str(partial))
            partial.replace(file)
    except (BotoCoreError, ClientError) as e:
        raise ServiceError(f"{address} could not be fetched: {e}", hint="check AWS_ENDPOINT_URL_S3 and AWS_*") from e
    return target


def _from_registry(address: str, part: str) -> Path:
    from deleatur.io import tracking

    place = f"{tracking.place_of(address)}/artifacts/{part}"
    if folder := tracking.on_disk(place):
        return folder  # it is read in place
    target = CACHE / hashlib.sha256(place.encode()).hexdigest()[:16]
    if not target.is_dir():
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        tracking.download(place, partial).replace(target)
    return target
