"""What the table of events must look like, as a Great Expectations suite: rows that break a rule are named.

Great Expectations is imported inside the functions: it takes five seconds, and most commands never need it.
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
from deleatur.feedback.events import utc
from deleatur.records.feedback import Kind

ANSWERS: Mapping[str, frozenset[str]] = {
    "binary": frozenset({"yes", "no", "unsure", "skip", "withdrawn"}),
    "rank": frozenset({"ranked", "unsure", "skip", "withdrawn"}),
}
PLAIN = ("event_id", "concept", "kind", "answer", "rater", "source", "model_version", "consent_version")
DERIVED = ("row", "asked", "moment", "seconds", "answer_fits", "items_fit", "ranks_fit", "digests", "missing")


@dataclass(frozen=True)
class Violation:
    """Row `place` of the table breaks a rule."""

    place: int
    rule: str
    expected: str
    got: str
    remedy: str


@dataclass(frozen=True)
class Checked:
    violations: list[Violation]
    summary: dict[str, Any]
    """JSON: success, and per rule how many rows were looked at and which events break it, all of them."""


def validate(table: pd.DataFrame, kinds: Mapping[str, Kind], pictures: Collection[str], docs: Path) -> Checked:
    """Holds the table of events against the suite and leaves Data Docs in the folder `docs`.

    table: as `events.table` makes it; kinds: the concepts there are; pictures: digests at hand.
    A withdrawal has to fit as little as possible, because a person's withdrawal must count.
    """
    expectations = suite(sorted(kinds))
    results = {r.expectation_config.meta["rule"]: r for r in _run(facts(table, kinds, pictures), expectations, docs)}
    violations, rules = list[Violation](), list[dict[str, Any]]()
    for meta in (expectation.meta for expectation in expectations):
        result = results[meta["rule"]]
        if message := _failure(result.exception_info):
            raise DataError(f"the rule {meta['rule']!r} could not be applied: {message}", hint="deleatur check")
        places = sorted({int(row["row"]) for row in result.result.get("unexpected_index_list") or []})
        rules.append(
            {
                "rule": meta["rule"],
                "expected": meta["expected"],
                "success": bool(result.success),
                "checked": int(result.result["element_count"]),
                "violations": len(places),
                "event_ids": [str(table["event_id"].iloc[place]) for place in places],
            }
        )
        for place in places:
            got = ", ".join(f"{c} {_plain(table[c].iloc[place])!r}" for c in meta["shows"])
            violations.append(Violation(place, meta["rule"], meta["expected"], got, meta["remedy"]))
    success = all(rule["success"] for rule in rules)
    return Checked(violations, {"success": success, "rows": len(table), "rules": rules})


def facts(table: pd.DataFrame, kinds: Mapping[str, Kind], pictures: Collection[str]) -> pd.DataFrame:
    """The table as plain columns an expectation can judge. No prompt and no free text: Data Docs show values."""
    at_hand, found = frozenset(pictures), list[dict[str, Any]]()
    for place, row in enumerate(table.to_dict("records")):
        given, moment = row["answer"] != "withdrawn", utc(row["created_at"])
        found.append(
            {
                **{name: row[name] for name in PLAIN},
                "row": place,
                "asked": kinds.get(row["concept"]) if given else None,
                "moment": str(moment) if moment else None,
                "seconds": row["seconds_spent"],
                "answer_fits": _answer_fits(row),
                "items_fit": not given or _items_fit(row),
                "ranks_fit": not given or _ranks_fit(row),
                "digests": ",".join(row["items"]) if given else None,
                "missing": len(set(row["items"]) - at_hand) if given else 0,
            }
        )
    return pd.DataFrame.from_records(found, columns=[*PLAIN, *DERIVED]).astype({"seconds": "float64"})


def suite(concepts: list[str]) -> list[Any]:
    """The rules, most telling first. `shows`: the fields of the event that a person needs to see."""
    import great_expectations.expectations as E

    def rule(name: str, expected: str, remedy: str, *shows: str) -> dict[str, Any]:
        return {
            "meta": {"rule": name, "expected": expected, "remedy": remedy, "shows": shows},
            "notes": f"{name}: {expected}",
        }

    listed = ", ".join(concepts)
    again = "append the mended row with a new event_id"
    return [
        E.ExpectColumnValuesToBeUnique(
            column="event_id", **rule("event id", "an event_id that occurs once", again, "event_id")
        ),
        E.ExpectColumnValueLengthsToBeBetween(
            column="event_id", min_value=1, **rule("event id given", "an event_id", again, "event_id")
        ),
        E.ExpectColumnValuesToBeInSet(
            column="concept",
            value_set=concepts,
            **rule("concept", f"one of {listed}", "add the concept to params.yaml, or correct its name", "concept"),
        ),
        E.ExpectColumnPairValuesToBeEqual(
            column_A="kind",
            column_B="asked",
            ignore_row_if="either_value_is_missing",
            **rule("kind", "the kind that params.yaml gives for the concept", again, "concept", "kind"),
        ),
        E.ExpectColumnValuesToBeInSet(
            column="answer_fits",
            value_set=[True],
            **rule(
                "answer",
                "binary: yes, no, unsure, skip; rank: ranked, unsure, skip; either: withdrawn, with replaces",
                again,
                *("kind", "answer", "replaces"),
            ),
        ),
        E.ExpectColumnValuesToBeInSet(
            column="items_fit",
            value_set=[True],
            **rule("items", "one picture for a yes or no, two or more different ones for a ranking", again, "items"),
        ),
        E.ExpectColumnValuesToMatchRegex(
            column="digests",
            regex=r"^[0-9a-f]{64}(?:,[0-9a-f]{64})*$",
            **rule("digest", "SHA-256 digests of pictures, 64 small hexadecimal digits", again, "items"),
        ),
        E.ExpectColumnValuesToBeInSet(
            column="ranks_fit",
            value_set=[True],
            **rule("ranks", "ranks of a ranking only: 1…M, none twice but X (null), M of them", again, "ranks"),
        ),
        E.ExpectColumnValuesToBeBetween(
            column="missing",
            min_value=0,
            max_value=0,
            **rule(
                "picture",
                "every picture in an archive (.images.parquet) beside the sources",
                "add the archive that holds the picture, or withdraw the answer",
                "items",
            ),
        ),
        E.ExpectColumnValuesToNotBeNull(
            column="moment", **rule("time", "created_at in ISO 8601, in UTC", again, "created_at")
        ),
        E.ExpectColumnValuesToBeBetween(
            column="seconds", min_value=0, **rule("seconds", "seconds_spent of 0 or more", again, "seconds_spent")
        ),
        E.ExpectColumnValuesToMatchRegex(
            column="rater", regex=r"^[^@\s]+$", **rule("rater", "a salted hash, no name, no address", again)
        ),
        *(
            E.ExpectColumnValueLengthsToBeBetween(
                column=column, min_value=1, **rule(column, f"a {column} that is not empty", again, column)
            )
            for column in ("source", "model_version", "consent_version")
        ),
    ]


def _run(table: pd.DataFrame, expectations: list[Any], docs: Path) -> list[Any]:
    """Great Expectations in memory, without a project of its own; only the Data Docs reach the disk."""
    import great_expectations as gx
    from great_expectations.core.run_identifier import RunIdentifier

    context = gx.get_context(mode="ephemeral")
    context.enable_analytics(False)  # a table about people's answers is nobody's usage statistics
    context.variables.progress_bars = {"globally": False}
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())}
    index = {"class_name": "DefaultSiteIndexBuilder"}
    site = {"class_name": "SiteBuilder", "site_index_builder": index, "store_backend": store}
    # The default site would leave a copy in the system's folder for temporary files.
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
    run = RunIdentifier(run_name="events", run_time=_newest(table))
    [result] = checkpoint.run(batch_parameters={"dataframe": table}, run_id=run).run_results.values()
    _without_clock(docs, run.run_time)
    return list(result.results)


def _newest(table: pd.DataFrame) -> datetime:
    """The moment of the newest event: what Data Docs call the time of the run."""
    moments = pd.to_datetime(table["moment"], format="ISO8601", utc=True).dropna()
    newest: datetime = moments.max().to_pydatetime() if len(moments) else datetime.fromtimestamp(0, UTC)
    return newest


STAMP = re.compile(r"\d{8}T\d{6}\.\d{6}Z")
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _without_clock(docs: Path, moment: datetime) -> None:
    """Data Docs hold the time at which they were made, and random names for what can be folded open. Both are replaced,
    so that the same feedback gives the same pages.
    """
    for page in docs.rglob("*.html"):
        text = STAMP.sub(f"{moment:%Y%m%dT%H%M%S.%fZ}", page.read_text("utf-8"))
        for i, name in enumerate(dict.fromkeys(UUID.findall(text))):
            text = text.replace(name, f"{i:08}")
        page.write_text(text, "utf-8")


def _failure(info: Mapping[str, Any]) -> str | None:
    """Why a rule could not be applied. Great Expectations reports it flat, or once per measurement that failed."""
    found = [info, *(one for one in info.values() if isinstance(one, Mapping))]
    return next((str(one.get("exception_message")) for one in found if one.get("raised_exception")), None)


def _answer_fits(row: Mapping[Any, Any]) -> bool:
    known = row["answer"] in ANSWERS.get(row["kind"], ())
    return known and (row["answer"] != "withdrawn" or bool(row["replaces"]))


def _items_fit(row: Mapping[Any, Any]) -> bool:
    n = len(row["items"])
    return (n == 1 if row["kind"] == "binary" else n >= 2) and len(set(row["items"])) == n


def _ranks_fit(row: Mapping[Any, Any]) -> bool:
    """Ranks exactly when something was ranked, one per picture; numbers may leave gaps, since only order counts."""
    if row["answer"] != "ranked" or row["ranks"] is None:
        return row["answer"] != "ranked" and row["ranks"] is None
    numbers, m = [rank for rank in row["ranks"] if rank is not None], len(row["items"])
    return len(row["ranks"]) == m and set(numbers) <= set(range(1, m + 1)) and len(set(numbers)) == len(numbers)


def _plain(value: Any) -> Any:
    """A value as it stood in the line."""
    return list(value) if isinstance(value, tuple) else value
