"""Runs, models and aliases in MLflow: every verb that talks to it is in this file.

One verdict is one run and, if it passed, one version, however often it is registered: both carry the digest of their
evidence, and what is there already is found instead of made again. A run is FINISHED only after the last alias moved,
so a kill leaves the released model as it was, and the next try goes on from there. What the aliases are to say is
decided in the ledger; `mark` is its last line that was carried out here.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version as installed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import pandas as pd

from deleatur.errors import DataError, DeleaturError, ServiceError, SettingsError
from deleatur.registry import signing
from deleatur.registry.ledger import Mark
from deleatur.storage import remote
from deleatur.storage.remote import CACHE, without_password

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",  # half a minute instead of four: whoever calls us tries again anyway
}
for _name, _value in QUIET.items():  # MLflow reads them when it is imported
    os.environ.setdefault(_name, _value)

import mlflow  # noqa: E402
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelStatus, Metric, Param, Run, RunTag  # noqa: E402
from mlflow.entities.model_registry import ModelVersion, RegisteredModel  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.models import Model, ModelSignature  # noqa: E402
from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository  # noqa: E402
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema  # noqa: E402
from mlflow.utils import get_results_from_paginated_fn  # noqa: E402

GIVEN = os.environ.get("MLFLOW_TRACKING_URI")
"""As it was when we came: MLflow itself sets the variable whenever it is told an address, see `use`."""

CHAMPION, CHALLENGER, LAST, QUARANTINED = "champion", "challenger", "last_known_good", "quarantined"
ALIASES = (QUARANTINED, LAST, CHAMPION, CHALLENGER)
"""Ours, in the order in which they move: what is live changes in one call, after those that say what was."""

SERVED = Path(__file__).with_name("pyfunc_model.py")
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "prompt"), ColSpec("long", "seed")]),
    outputs=Schema([ColSpec("string")]),
    params=ParamSchema([ParamSpec("steps", "long", 30), ParamSpec("guidance", "double", 7.5)]),
)
SERVING = ("mlflow", "torch", "diffusers", "transformers", "accelerate", "safetensors", "pillow", "pandas")
"""What the registered model needs. Named, because MLflow's own guess leaves out torch and adds strangers."""

EVIDENCE = "deleatur.evidence"
MARK = "deleatur.ledger"
DIGEST = 36
"""Characters that MLflow keeps of a dataset's digest; the whole one is a tag."""
PAGE = 100
"""Runs or versions that MLflow is asked for at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class Evidence:
    """All that is kept of one verdict. `digest` names it: the same evidence is registered once."""

    digest: str
    name: str
    """For people, in lists."""
    tags: Mapping[str, str]
    settings: Mapping[str, Any]
    """Nested; logged as flat params."""
    scores: Mapping[str, float] = field(default_factory=dict)
    curves: Sequence[tuple[str, int, float]] = ()
    """(name, step, value)."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Place among the run's artifacts → a file or a folder; what is not there is left out."""
    feedback: pd.DataFrame | None = None
    feedback_digest: str = ""
    feedback_source: str = ""

    @property
    def marked(self) -> dict[str, str]:
        """The tags with our prefix, the evidence's own digest among them."""
        return {EVIDENCE: self.digest} | {f"deleatur.{k}": v for k, v in self.tags.items()}


@dataclass(frozen=True)
class Registry:
    """One tracking store, experiment and registered model. The environment's MLFLOW_TRACKING_URI goes before `uri`.

    Whatever MLflow refuses or fails to do becomes a ServiceError, or a SettingsError where the names are wrong.
    """

    uri: str
    experiment: str
    model: str

    @cached_property
    def client(self) -> mlflow.MlflowClient:
        use(self.uri)
        return mlflow.MlflowClient()

    @cached_property
    def experiment_id(self) -> str:
        use(self.uri)
        return str(mlflow.set_experiment(self.experiment).experiment_id)

    def finished(self, evidence: str) -> bool:
        """Whether this evidence has been registered to the end."""
        with answering(self.uri):
            run = self._run(evidence)
        return run is not None and run.info.status == "FINISHED"

    @contextmanager
    def running(self, evidence: Evidence) -> Iterator[str]:
        """Inside: the evidence's run, new or taken up again. FINISHED if the block ends well, FAILED if it raises."""
        with answering(self.uri):
            found = self._run(evidence.digest)
            tags = evidence.marked
            run = found or self.client.create_run(self.experiment_id, run_name=evidence.name, tags=tags)
            run_id = str(run.info.run_id)
            self.client.update_run(run_id, "RUNNING")
            try:
                yield run_id
            except BaseException:
                self.client.set_terminated(run_id, "FAILED")
                raise
            self.client.set_terminated(run_id, "FINISHED")

    def log(self, run_id: str, evidence: Evidence) -> None:
        """Settings, lineage, curves, scores and files. What an earlier try has logged stays as it is."""
        with answering(self.uri):
            run = self.client.get_run(run_id)
            start = run.info.start_time  # one time for all numbers: the same number is then never kept twice
            params = {k: v for k, v in flat(evidence.settings).items() if k not in run.data.params}
            metrics = [Metric(k, v, start, 0) for k, v in evidence.scores.items()]
            metrics += [Metric(k, v, start, step) for k, step, v in evidence.curves]
            tags = [RunTag(k, v) for k, v in evidence.marked.items()]
            self.client.log_batch(run_id, tags=tags)
            for part in _parts([Param(k, v) for k, v in params.items()], 100):  # MLflow's limit for one request
                self.client.log_batch(run_id, params=part)
            for part in _parts(metrics, 1000):
                self.client.log_batch(run_id, metrics=part)
            if evidence.feedback is not None:
                self.client.log_inputs(run_id, [_input(evidence)])
            for place, path in evidence.files.items():
                if path.is_dir():
                    self.client.log_artifacts(run_id, str(path), place)
                elif path.is_file():
                    self.client.log_artifact(run_id, str(path), place)

    def version(self, evidence: str) -> str | None:
        """The version made from this evidence, if there is one."""
        with answering(self.uri):
            found = self.client.search_model_versions(f"name = '{self.model}' and tag.`{EVIDENCE}` = '{evidence}'")
            return str(found[0].version) if found else None

    def add_version(
        self, run_id: str, evidence: Evidence, pipeline: Path, delta: Path, about: str, keys: signing.Keys
    ) -> str:
        """Stores a diffusers folder and its delta as a model that plain MLflow loads, and says by digest, signed, which
        files it has; a new version of it.
        """
        with answering(self.uri):
            uri = self._stored(run_id, evidence) or self._store(run_id, evidence, pipeline, delta)
            tags = evidence.marked | self._seal(uri, evidence, keys)
            with _already():
                self.client.create_registered_model(self.model)
            made = self.client.create_model_version(
                self.model, uri, run_id, tags=tags, description=about, model_id=uri.rpartition("/")[2]
            )
            return str(made.version)

    def tags(self, version: str) -> dict[str, str]:
        """What a version says of itself, without our prefix. Raises DataError when there is no such version."""
        with answering(
            self.uri,
            DataError(f"{self.model} has no version {version}", hint="mlflow ui"),
        ):
            found = self.client.get_model_version(self.model, version).tags
            return {k.removeprefix("deleatur."): v for k, v in found.items()}

    def tag(self, version: str, tags: Mapping[str, str]) -> None:
        with answering(self.uri):
            for key, value in tags.items():
                self.client.set_model_version_tag(self.model, version, f"deleatur.{key}", value)

    def aliases(self) -> dict[str, str]:
        """Those of ours that there are, and the version that each names."""
        found = self._registered()
        return {name: str(found.aliases[name]) for name in ALIASES if name in found.aliases} if found else {}

    def alias(self, name: str) -> str | None:
        """The version that carries it."""
        return self.aliases().get(name)

    def set_aliases(self, wanted: Mapping[str, str]) -> None:
        """Ours as wanted, and none besides."""
        now = self.aliases()
        with answering(self.uri):
            for name in (name for name in ALIASES if wanted.get(name) != now.get(name)):
                if name in wanted:
                    self.client.set_registered_model_alias(self.model, name, wanted[name])
                else:
                    self.client.delete_registered_model_alias(self.model, name)

    def mark(self) -> Mark | None:
        """The last line of the ledger that was carried out here; None before there was one."""
        found = self._registered()
        return Mark.read(found.tags[MARK]) if found and MARK in found.tags else None

    def set_mark(self, mark: Mark) -> None:
        with answering(self.uri):
            with _already():  # a ledger can begin with a verdict that makes no version
                self.client.create_registered_model(self.model)
            self.client.set_registered_model_tag(self.model, MARK, str(mark))

    def _registered(self) -> RegisteredModel | None:
        with answering(self.uri):
            try:
                return self.client.get_registered_model(self.model)
            except MlflowException as e:
                if e.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise

    def file(self, version: str, place: str) -> str:
        """The text of one of the files that a version rests on. Raises DataError when there is no such version."""
        with (
            answering(self.uri, DataError(f"{self.model} has no version {version} with a {place}", hint="mlflow ui")),
            TemporaryDirectory(prefix="deleatur-") as folder,
        ):
            run_id = str(self.client.get_model_version(self.model, version).run_id)
            return Path(self.client.download_artifacts(run_id, place, folder)).read_text("utf-8")

    def spent(self, before: float) -> dict[str, str]:
        """Runs that ended before a time, in seconds since 1970, and that no version came from: id → name."""
        with answering(self.uri):
            kept = {version.run_id for version in self.versions()}
            ended = self.runs(f"attributes.end_time < {int(before * 1000)}")
            return {run.info.run_id: run.info.run_name for run in ended if run.info.run_id not in kept}

    def runs(self, which: str = "") -> list[Run]:
        """Those that a filter of MLflow's lets through, all pages of them."""
        with answering(self.uri):
            return _all(self.client.search_runs, [self.experiment_id], which)

    def versions(self) -> list[ModelVersion]:
        """All of the model, in the order of their numbers."""
        with answering(self.uri):
            found = _all(self.client.search_model_versions, f"name = '{self.model}'")
            return sorted(found, key=lambda v: int(v.version))

    def delete_run(self, run_id: str) -> None:
        """It can be restored until somebody runs `mlflow gc`."""
        with answering(self.uri):
            self.client.delete_run(run_id)

    def _run(self, evidence: str) -> Run | None:
        found = self.client.search_runs([self.experiment_id], f"tags.`{EVIDENCE}` = '{evidence}'", max_results=1)
        return found[0] if found else None

    def _stored(self, run_id: str, evidence: Evidence) -> str | None:
        """The model that an earlier try stored whole; what it left in pieces is deleted."""
        found = self.client.search_logged_models([self.experiment_id], f"tags.`{EVIDENCE}` = '{evidence.digest}'")
        for model in (m for m in found if m.status != LoggedModelStatus.READY):
            self.client.delete_logged_model(model.model_id)
        whole = [m for m in found if m.status == LoggedModelStatus.READY and m.source_run_id == run_id]
        return str(whole[0].model_uri) if whole else None

    def _store(self, run_id: str, evidence: Evidence, pipeline: Path, delta: Path) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # asks for an input example, which would draw a picture to store it
            info = Model.log(
                artifact_path=None,
                name=self.model,
                flavor=mlflow.pyfunc,
                run_id=run_id,
                tags=evidence.marked,
                metadata=evidence.marked,
                python_model=str(SERVED),
                artifacts={"pipeline": str(pipeline), "delta": str(delta)},
                signature=SIGNATURE,
                pip_requirements=[f"{name}=={installed(name).partition('+')[0]}" for name in SERVING],
            )
        return str(info.model_uri)

    def _seal(self, uri: str, evidence: Evidence, keys: signing.Keys) -> dict[str, str]:
        """About what the store holds, not what was sent there."""
        with files_of(uri) as folder, TemporaryDirectory(prefix="deleatur-") as place:
            envelope, statement = signing.seal(folder, {**evidence.tags, "evidence": evidence.digest}, keys)
            (Path(place) / signing.NAME).write_bytes(envelope)
            model_id = uri.rpartition("/")[2]
            self.client.log_model_artifact(model_id, str(Path(place) / signing.NAME), signing.PLACE)
        return {"deleatur.files": statement.digest, "deleatur.signed_by": statement.signed_by}


def use(uri: str) -> None:
    """MLflow's own loaders shall look where we look; our child processes decide for themselves."""
    mlflow.set_tracking_uri(GIVEN or uri)
    if GIVEN is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)


def place_of(address: str) -> str:
    """models:/name/version, models:/name@alias or models:/id → where its files lie, a path or an address.

    Raises DataError when there is no such model, version or alias.
    """
    uri = mlflow.get_tracking_uri()
    missing = DataError(
        f"{address}: there is no such model, version or alias in {uri}",
        hint="mlflow ui",
    )
    with answering(uri, missing):
        return str(ModelsArtifactRepository.get_underlying_uri(address))


def on_disk(place: str) -> Path | None:
    """Where a store's files lie on this disk; None: they have to be fetched."""
    split = urlsplit(place)
    return Path(unquote(split.path)) if split.scheme in ("", "file") else None


@contextmanager
def files_of(address: str, part: str = "") -> Iterator[Path]:
    """The files of a registered model, or those below a part of it, fetched where they are not on this disk."""
    place = place_of(address)
    if folder := on_disk(place):
        yield folder
        return
    with TemporaryDirectory(prefix="deleatur-") as target:
        fetched = download(f"{place}/{part}".rstrip("/"), (Path(target) / part).parent if part else Path(target))
        yield Path(target) if part else fetched


def download(place: str, target: Path) -> Path:
    """A folder of a store that is not on this disk; what comes back lies inside `target`."""
    with answering(mlflow.get_tracking_uri()):
        return Path(mlflow.artifacts.download_artifacts(place, dst_path=str(target)))


@contextmanager
def answering(uri: str, missing: DeleaturError | None = None) -> Iterator[None]:
    """What MLflow says becomes an error a person can act on; `missing` is raised where it has not got the thing."""
    try:
        yield
    except MlflowException as e:
        if missing and e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise missing from e
        where, said = without_password(GIVEN or uri), without_password(str(e).strip().splitlines()[0])
        if e.error_code == "INVALID_PARAMETER_VALUE":
            raise SettingsError(f"MLflow at {where} does not accept the `register` section: {said}") from e
        if e.error_code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise SettingsError(
                f"MLflow at {where} refuses the credentials: {said}",
                hint="export MLFLOW_TRACKING_USERNAME=… MLFLOW_TRACKING_PASSWORD=…",
            ) from e
        raise ServiceError(f"MLflow at {where} did not do it: {said}", hint="deleatur stage register") from e


def _all(search: Callable[..., Any], *asked: Any) -> list[Any]:
    def page(n: int, token: str | None) -> Any:
        return search(*asked, max_results=n, page_token=token)

    found: list[Any] = get_results_from_paginated_fn(page, PAGE)
    return found


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"erase": {"lr": 1}} → {"erase.lr": "1"}; lists as JSON."""
    out: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return out


def _input(evidence: Evidence) -> DatasetInput:
    assert evidence.feedback is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a source that two equal readers could read; integers that might be missing
        dataset = mlflow.data.from_pandas(
            evidence.feedback,
            name="feedback",
            source=evidence.feedback_source,
            digest=evidence.feedback_digest[:DIGEST],
        ).to_dict()
    return DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", "feedback")])


@contextmanager
def _already() -> Iterator[None]:
    """To make what is there already is no fault."""
    try:
        yield
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def local(address: str, part: str = "pipeline") -> str:
    """As `storage.remote.local`, and models:/… by what MLflow has of it.

    part: which folder of a registered version, "pipeline" or "delta"; other addresses are such a folder already.
    """
    return str(_downloaded(address, part)) if address.startswith("models:/") else remote.local(address)


def _downloaded(address: str, part: str) -> Path:
    place = f"{place_of(address)}/artifacts/{part}"
    if folder := on_disk(place):
        return folder  # it is read in place
    target = CACHE / hashlib.sha256(place.encode()).hexdigest()[:16]
    if not target.is_dir():
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        download(place, partial).replace(target)
    return target
