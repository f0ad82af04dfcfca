"""The rules for the table of feedback events, as a Great Expectations suite that reports each violating row.

Great Expectations is imported inside the functions: the import takes five seconds, and most commands never need it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from deleatur.errors import DataError
from deleatur.feedback.events import parse_utc
from deleatur.records.feedback import FeedbackKind

VALID_ANSWERS: Mapping[str, frozenset[str]] = {
    "binary": frozenset({"yes", "no", "unsure", "skip", "withdrawn"}),
    "rank": frozenset({"ranked", "unsure", "skip", "withdrawn"}),
}
COPIED_COLUMNS = ("event_id", "concept", "kind", "answer", "rater", "source", "model_version", "consent_version")
DERIVED_COLUMNS = ("row", "asked", "moment", "seconds", "answer_fits", "items_fit", "ranks_fit", "digests", "missing")


@dataclass(frozen=True)
class Violation:
    """Row `position` of the table violates a rule."""

    position: int
    rule: str
    expected: str
    got: str
    remedy: str


@dataclass(frozen=True)
class ValidationResult:
    violations: list[Violation]
    summary: dict[str, Any]
    """JSON: success, and for each rule the number of rows checked and the ids of all violating events."""


def validate(
    table: pd.DataFrame, kinds: Mapping[str, FeedbackKind], image_digests: Collection[str], docs: Path
) -> ValidationResult:
    """Validates the table of events and writes Data Docs to the folder `docs`.

    table: from `events.to_frame`; kinds: feedback kind of each concept; image_digests: images in the archives.
    Few rules apply to a withdrawal, because a person's withdrawal must count.
    """
    expectations = build_expectations(sorted(kinds))
    results = {
        r.expectation_config.meta["rule"]: r
        for r in _run_checkpoint(derive_columns(table, kinds, image_digests), expectations, docs)
    }
    violations, rules = list[Violation](), list[dict[str, Any]]()
    for meta in (expectation.meta for expectation in expectations):
        result = results[meta["rule"]]
        if message := _exception_message(result.exception_info):
            raise DataError(f"the rule {meta['rule']!r} could not be applied: {message}", hint="deleatur check")
        positions = sorted({int(row["row"]) for row in result.result.get("unexpected_index_list") or []})
        rules.append(
            {
                "rule": meta["rule"],
                "expected": meta["expected"],
                "success": bool(result.success),
                "checked": int(result.result["element_count"]),
                "violations": len(positions),
                "event_ids": [str(table["event_id"].iloc[position]) for position in positions],
            }
        )
        for position in positions:
            got = ", ".join(f"{c} {_json_value(table[c].iloc[position])!r}" for c in meta["shows"])
            violations.append(Violation(position, meta["rule"], meta["expected"], got, meta["remedy"]))
    success = all(rule["success"] for rule in rules)
    return ValidationResult(violations, {"success": success, "rows": len(table), "rules": rules})


def derive_columns(
    table: pd.DataFrame, kinds: Mapping[str, FeedbackKind], image_digests: Collection[str]
) -> pd.DataFrame:
    """Scalar columns that expectations can check. Prompts and free text are left out: Data Docs display values."""
    available, records = frozenset(image_digests), list[dict[str, Any]]()
    for position, row in enumerate(table.to_dict("records")):
        is_answer, created_at = row["answer"] != "withdrawn", parse_utc(row["created_at"])
        records.append(
            {
                **{name: row[name] for name in COPIED_COLUMNS},
                "row": position,
                "asked": kinds.get(row["concept"]) if is_answer else None,
                "moment": str(created_at) if created_at else None,
                "seconds": row["seconds_spent"],
                "answer_fits": _answer_fits(row),
                "items_fit": not is_answer or _items_fit(row),
                "ranks_fit": not is_answer or _ranks_fit(row),
                "digests": ",".join(row["items"]) if is_answer else None,
                "missing": len(set(row["items"]) - available) if is_answer else 0,
            }
        )
    return pd.DataFrame.from_records(records, columns=[*COPIED_COLUMNS, *DERIVED_COLUMNS]).astype(
        {"seconds": "float64"}
    )


def build_expectations(concepts: list[str]) -> list[Any]:
    """The rules, most informative first. `shows`: the event fields quoted in the quarantine row."""
    import great_expectations.expectations as E

    def rule(name: str, expected: str, remedy: str, *shows: str) -> dict[str, Any]:
        return {
            "meta": {"rule": name, "expected": expected, "remedy": remedy, "shows": shows},
            "notes": f"{name}: {expected}",
        }

    known_concepts = ", ".join(concepts)
    resubmit = "append the corrected row with a new event_id"
    return [
        E.ExpectColumnValuesToBeUnique(
            column="event_id", **rule("event id", "an event_id that occurs once", resubmit, "event_id")
        ),
        E.ExpectColumnValueLengthsToBeBetween(
            column="event_id", min_value=1, **rule("event id given", "an event_id", resubmit, "event_id")
        ),
        E.ExpectColumnValuesToBeInSet(
            column="concept",
            value_set=concepts,
            **rule(
                "concept", f"one of {known_concepts}", "add the concept to params.yaml, or correct its name", "concept"
            ),
        ),
        E.ExpectColumnPairValuesToBeEqual(
            column_A="kind",
            column_B="asked",
            ignore_row_if="either_value_is_missing",
            **rule("kind", "the concept's kind in params.yaml", resubmit, "concept", "kind"),
        ),
        E.ExpectColumnValuesToBeInSet(
            column="answer_fits",
            value_set=[True],
            **rule(
                "answer",
                "binary: yes, no, unsure, skip; rank: ranked, unsure, skip; either: withdrawn, with replaces",
                resubmit,
                *("kind", "answer", "replaces"),
            ),
        ),
        E.ExpectColumnValuesToBeInSet(
            column="items_fit",
            value_set=[True],
            **rule(
                "items",
                "one image for a yes/no question, two or more different images for a ranking",
                resubmit,
                "items",
            ),
        ),
        E.ExpectColumnValuesToMatchRegex(
            column="digests",
            regex=r"^[0-9a-f]{64}(?:,[0-9a-f]{64})*$",
            **rule("digest", "SHA-256 digests of images, 64 lower-case hexadecimal digits", resubmit, "items"),
        ),
        E.ExpectColumnValuesToBeInSet(
            column="ranks_fit",
            value_set=[True],
            **rule(
                "ranks",
                "M ranks for a ranking of M images: distinct numbers from 1 to M, or null for X; no ranks otherwise",
                resubmit,
                "ranks",
            ),
        ),
        E.ExpectColumnValuesToBeBetween(
            column="missing",
            min_value=0,
            max_value=0,
            **rule(
                "image",
                "every image in an archive (.images.parquet) next to the sources",
                "add the archive with the image, or withdraw the answer",
                "items",
            ),
        ),
        E.ExpectColumnValuesToNotBeNull(
            column="moment", **rule("time", "created_at in ISO 8601, in UTC", resubmit, "created_at")
        ),
        E.ExpectColumnValuesToBeBetween(
            column="seconds", min_value=0, **rule("seconds", "seconds_spent of 0 or more", resubmit, "seconds_spent")
        ),
        E.ExpectColumnValuesToMatchRegex(
            column="rater", regex=r"^[^@\s]+$", **rule("rater", "a salted hash: no name, no e-mail address", resubmit)
        ),
        *(
            E.ExpectColumnValueLengthsToBeBetween(
                column=column, min_value=1, **rule(column, f"a non-empty {column}", resubmit, column)
            )
            for column in ("source", "model_version", "consent_version")
        ),
    ]


def _run_checkpoint(table: pd.DataFrame, expectations: list[Any], docs: Path) -> list[Any]:
    """Runs Great Expectations in memory, without a project folder; only the Data Docs are written to disk."""
    import great_expectations as gx
    from great_expectations.core.run_identifier import RunIdentifier

    context = gx.get_context(mode="ephemeral")
    context.enable_analytics(False)  # no usage statistics about a table of people's answers
    context.variables.progress_bars = {"globally": False}
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())}
    index = {"class_name": "DefaultSiteIndexBuilder"}
    site = {"class_name": "SiteBuilder", "site_index_builder": index, "store_backend": store}
    # The default site would write a copy to the system's temporary folder.
    context.update_data_docs_site(site_name="local_site", site_config=site)
    asset = context.data_sources.add_pandas("feedback").add_dataframe_asset("events")
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name="events",
            validation_definitions=[
                context.validation_definitions.add(
                    gx.ValidationDefinition(
                        name="events",
                        data=asset.add_batch_definition_whole_dataframe("all"),
                        suite=context.suites.add(gx.ExpectationSuite(name="events", expectations=expectations)),
                    )
                )
            ],
            actions=[gx.checkpoint.UpdateDataDocsAction(name="docs")],
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["row"]},
        )
    )
    run = RunIdentifier(run_name="events", run_time=_newest_event_time(table))
    [result] = checkpoint.run(batch_parameters={"dataframe": table}, run_id=run).run_results.values()
    _make_deterministic(docs, run.run_time)
    return list(result.results)


def _newest_event_time(table: pd.DataFrame) -> datetime:
    """Time of the newest event, used as the run time in Data Docs."""
    times = pd.to_datetime(table["moment"], format="ISO8601", utc=True).dropna()
    newest: datetime = times.max().to_pydatetime() if len(times) else datetime.fromtimestamp(0, UTC)
    return newest


TIMESTAMP = re.compile(r"\d{8}T\d{6}\.\d{6}Z")
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _make_deterministic(docs: Path, run_time: datetime) -> None:
    """Replaces the wall-clock times and random element ids of Data Docs, so that equal feedback gives equal pages."""
    for page in docs.rglob("*.html"):
        text = TIMESTAMP.sub(f"{run_time:%Y%m%dT%H%M%S.%fZ}", page.read_text("utf-8"))
        for i, name in enumerate(dict.fromkeys(UUID.findall(text))):
            text = text.replace(name, f"{i:08}")
        page.write_text(text, "utf-8")


def _exception_message(info: Mapping[str, Any]) -> str | None:
    """The message of an exception inside a rule. Great Expectations reports it flat, or nested per failed metric."""
    candidates = [info, *(value for value in info.values() if isinstance(value, Mapping))]
    return next((str(c.get("exception_message")) for c in candidates if c.get("raised_exception")), None)


def _answer_fits(row: Mapping[Any, Any]) -> bool:
    is_valid = row["answer"] in VALID_ANSWERS.get(row["kind"], ())
    return is_valid and (row["answer"] != "withdrawn" or bool(row["replaces"]))


def _items_fit(row: Mapping[Any, Any]) -> bool:
    n = len(row["items"])
    return (n == 1 if row["kind"] == "binary" else n >= 2) and len(set(row["items"])) == n


def _ranks_fit(row: Mapping[Any, Any]) -> bool:
    """Ranks if and only if the answer is a ranking, one per image. Numbers may have gaps: only the order matters."""
    if row["answer"] != "ranked" or row["ranks"] is None:
        return row["answer"] != "ranked" and row["ranks"] is None
    numbers, m = [rank for rank in row["ranks"] if rank is not None], len(row["items"])
    return len(row["ranks"]) == m and set(numbers) <= set(range(1, m + 1)) and len(set(numbers)) == len(numbers)


def _json_value(value: Any) -> Any:
    """The value as in the JSON line."""
    return list(value) if isinstance(value, tuple) else value
