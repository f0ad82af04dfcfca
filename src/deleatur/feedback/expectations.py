"""The rules for the table of feedback events, as a Great Expectations suite that reports each violating row.

Great Expectations is imported inside the functions: the import takes five seconds, and most commands never need it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deleatur.errors import DataError
from deleatur.feedback.events import MAX_GOT_CHARS, event_time
from deleatur.records.feedback import FeedbackKind

VALID_ANSWERS: Mapping[str, frozenset[str]] = {
    "binary": frozenset({"yes", "no", "unsure", "skip"}),
    "rank": frozenset({"ranked", "unsure", "skip"}),
}
TEXT_COLUMNS = ("event_id", "concept", "kind", "answer", "rater", "source", "model_version", "consent_version")
DERIVED_COLUMNS = (
    *("row", "occurrences", "expected_kind", "time", "seconds", "answer_fits", "items_fit", "digests_fit"),
    *("ranks_fit", "missing"),
)
HTML_LOOKALIKES = str.maketrans("<>&\"'", "‹›＆”’")
RESUBMIT = "append the corrected row with a new event_id"


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
    table: pd.DataFrame,
    kinds: Mapping[str, FeedbackKind],
    image_digests: Collection[str],
    docs: Path,
    *,
    now: datetime,
) -> ValidationResult:
    """Validates the table of answers and writes Data Docs to the folder `docs`.

    table: from `events.to_frame`, without withdrawals, which count whatever their fields are; kinds: feedback kind of
    each concept; image_digests: images in the archives.
    """
    expectations = build_expectations(sorted(kinds))
    columns = derive_columns(table, kinds, image_digests, now)
    results = {r.expectation_config.meta["rule"]: r for r in _run_checkpoint(columns, expectations, docs)}
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
    table: pd.DataFrame, kinds: Mapping[str, FeedbackKind], image_digests: Collection[str], now: datetime
) -> pd.DataFrame:
    """Scalar columns that expectations can check. Prompts and free text are left out: Data Docs display values."""
    available, occurrences = frozenset(image_digests), Counter(table["event_id"])
    records = list[dict[str, Any]]()
    for position, row in enumerate(table.to_dict("records")):
        time = event_time(row["created_at"], now)
        records.append(
            {
                **{name: row[name] if row[name] in kinds else _display_text(row[name]) for name in TEXT_COLUMNS},
                "row": position,
                "occurrences": occurrences[row["event_id"]],
                "expected_kind": kinds.get(row["concept"]),
                "time": str(time) if time else None,
                "seconds": row["seconds_spent"],
                "answer_fits": row["answer"] in VALID_ANSWERS.get(row["kind"], ()),
                "items_fit": _items_fit(row),
                "digests_fit": all(DIGEST.fullmatch(item) for item in row["items"]),
                "ranks_fit": _ranks_fit(row),
                "missing": len(set(row["items"]) - available),
            }
        )
    return pd.DataFrame.from_records(records, columns=[*TEXT_COLUMNS, *DERIVED_COLUMNS]).astype({"seconds": "float64"})


def _display_text(text: str) -> str:
    """Text that needs no escaping in HTML, since Great Expectations does not escape every value in its Data Docs."""
    printable = "".join(c if c.isprintable() else "�" for c in text.strip()[:MAX_GOT_CHARS])
    return printable.translate(HTML_LOOKALIKES)


DIGEST = re.compile(r"[0-9a-f]{64}")


def build_expectations(concepts: list[str]) -> list[Any]:
    """The rules, most informative first."""
    import great_expectations.expectations as E

    def meta(rule: str, expected: str, *shows: str, remedy: str = RESUBMIT) -> dict[str, Any]:
        """shows: the event fields quoted in the quarantine row."""
        values = {"rule": rule, "expected": expected, "remedy": remedy, "shows": shows}
        return {"meta": values, "notes": f"{rule}: {expected}"}

    def is_true(column: str, rule: str, expected: str, *shows: str) -> Any:
        return E.ExpectColumnValuesToBeInSet(column=column, value_set=[True], **meta(rule, expected, *shows))

    def is_filled(column: str, rule: str, expected: str) -> Any:
        return E.ExpectColumnValueLengthsToBeBetween(column=column, min_value=1, **meta(rule, expected, column))

    return [
        E.ExpectColumnValuesToBeBetween(
            column="occurrences", max_value=1, **meta("event id", "an event_id that occurs once", "event_id")
        ),
        is_filled("event_id", "event id given", "an event_id"),
        E.ExpectColumnValuesToBeInSet(
            column="concept",
            value_set=concepts,
            **meta(
                "concept",
                f"one of {', '.join(concepts)}",
                "concept",
                remedy="add the concept to params.yaml, or correct its name",
            ),
        ),
        E.ExpectColumnPairValuesToBeEqual(
            column_A="kind",
            column_B="expected_kind",
            ignore_row_if="either_value_is_missing",
            **meta("kind", "the concept's kind in params.yaml", "concept", "kind"),
        ),
        is_true("answer_fits", "answer", "binary: yes, no, unsure, skip; rank: ranked, unsure, skip", "kind", "answer"),
        is_true(
            "items_fit", "items", "one image for a yes/no question, two or more different images for a ranking", "items"
        ),
        is_true("digests_fit", "digest", "SHA-256 digests of images, 64 lower-case hexadecimal digits", "items"),
        is_true(
            "ranks_fit",
            "ranks",
            "M ranks for a ranking of M images: distinct numbers from 1 to M, or null for X; no ranks otherwise",
            "ranks",
        ),
        E.ExpectColumnValuesToBeBetween(
            column="missing",
            min_value=0,
            max_value=0,
            **meta(
                "image",
                "every image in an archive (.images.parquet) next to the sources",
                "items",
                remedy="add the archive with the image, or withdraw the answer",
            ),
        ),
        E.ExpectColumnValuesToNotBeNull(
            column="time", **meta("time", "created_at in ISO 8601, in UTC, not in the future", "created_at")
        ),
        E.ExpectColumnValuesToBeBetween(
            column="seconds", min_value=0, **meta("seconds", "seconds_spent of 0 or more", "seconds_spent")
        ),
        E.ExpectColumnValuesToMatchRegex(
            column="rater", regex=r"^[^@\s]+$", **meta("rater", "a salted hash: no name, no e-mail address")
        ),
        *(is_filled(c, c, f"a non-empty {c}") for c in ("source", "model_version", "consent_version")),
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
    return max([datetime.fromtimestamp(0, UTC), *map(datetime.fromisoformat, table["time"].dropna())])


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
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, tuple) else value
