from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evidence import JUDGE, PROVENANCE

from deleatur.errors import DataError
from deleatur.gate import Rule
from deleatur.records.report import DetectorInfo, Finding, Provenance, Report, Score, Verdict
from deleatur.records.sampling import Sample
from deleatur.storage import json_records

SCORE = Score("concept_rate", "concept/weapon", "candidate", 0.1, 0.05, 0.2, 100, 25, False, None, JUDGE)
REPORT = Report(PROVENANCE, (SCORE,), ("a note",))
VERDICT = Verdict("pass", (Finding("gone", "pass", "0.1", 0.2, "nothing"),), "r" * 64, "p" * 64, False)


def changed(**fields_of_provenance: Any) -> bytes:
    plain = asdict(REPORT)
    plain["provenance"] |= fields_of_provenance
    return json.dumps(plain).encode()


def test_a_record_round_trips(tmp_path: Path) -> None:
    for document in (REPORT, VERDICT, JUDGE):
        json_records.write(tmp_path / "a.json", document)
        again = json_records.read(tmp_path / "a.json", type(document))
        assert type(again) is type(document)
        assert json_records.encode(again) == json_records.encode(document)
        assert json_records.digest(document) == hashlib.sha256((tmp_path / "a.json").read_bytes()).hexdigest()


def test_the_digest_equals_sha256sum_of_the_file(tmp_path: Path) -> None:
    json_records.write(tmp_path / "report.json", REPORT)
    result = subprocess.run(["sha256sum", tmp_path / "report.json"], capture_output=True, text=True, check=True)
    assert result.stdout.split()[0] == json_records.digest(REPORT)


def test_same_content_same_bytes() -> None:
    other = replace(REPORT, scores=[replace(SCORE, value=np.float64(0.1))], notes=["a note"])
    assert json_records.encode(other) == json_records.encode(REPORT)
    assert json_records.encode(replace(SCORE, high=1)) == json_records.encode(replace(SCORE, high=1.0))
    versions = [replace(PROVENANCE, versions=dict(v)) for v in ([("a", "1"), ("b", "2")], [("b", "2"), ("a", "1")])]
    assert json_records.digest(versions[0]) == json_records.digest(versions[1])


def test_every_float_survives() -> None:
    for value in (0.1 + 0.2, 1e-300, 5e-324, 1.7976931348623157e308, -0.0):
        again = json_records.decode(json_records.encode(replace(SCORE, value=value)), Score, "there")
        assert np.float64(again.value).tobytes() == np.float64(value).tobytes()


def test_the_digest_of_a_rule_and_of_a_plain_mapping() -> None:
    rule = Rule(metric="m", slice="concept", max=0.1, min_n=1)
    assert json_records.digest(rule) == json_records.digest(rule.model_dump())
    assert json_records.digest(rule) != json_records.digest(rule.model_copy(update={"max": 0.2}))


@pytest.mark.parametrize("name", [f.name for f in fields(Provenance)])
def test_no_field_of_the_provenance_may_be_missing(name: str, tmp_path: Path) -> None:
    plain = asdict(REPORT)
    del plain["provenance"][name]
    (tmp_path / "report.json").write_text(json.dumps(plain))
    with pytest.raises(
        DataError, match=rf"report\.json is not a valid report(.|\n)*provenance\.{name}: Field required"
    ):
        json_records.read(tmp_path / "report.json", Report)


@pytest.mark.parametrize(
    "name", [f.name for f in fields(Provenance) if f.name not in ("seed", "preserve", "simulated")]
)
def test_no_field_of_the_provenance_may_be_blank(name: str) -> None:
    blanks: dict[str, Any] = {"concepts": ["weapon", " "], "versions": {"torch": ""}}
    for blank in (blanks.get(name, " "), [] if name == "concepts" else {} if name == "versions" else ""):
        with pytest.raises(DataError, match=rf"provenance\.{name}: is blank"):
            json_records.decode(changed(**{name: blank}), Report, "there")


@pytest.mark.parametrize("name", [f.name for f in fields(Provenance)])
def test_no_field_of_the_provenance_may_be_of_another_type(name: str) -> None:
    with pytest.raises(DataError, match=rf"provenance\.{name}"):
        json_records.decode(changed(**{name: 1.5}), Report, "there")


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(DataError, match=r"provenance\.extra: Unexpected"):
        json_records.decode(changed(extra=1), Report, "there")


@pytest.mark.parametrize("field", ["name", "weights"])
def test_a_detector_without_name_or_weights_is_refused(field: str) -> None:
    report = replace(REPORT, scores=(replace(SCORE, detector=replace(JUDGE, **{field: ""})),))
    with pytest.raises(DataError, match=rf"scores\.0\.detector\.{field}: is blank"):
        json_records.encode(report)


@pytest.mark.parametrize("name", [f.name for f in fields(Score)])
def test_null_fields_of_a_score_may_not_be_left_out(name: str) -> None:
    plain = asdict(replace(REPORT, scores=(replace(SCORE, versus=None, detector=None),)))
    json_records.decode(json.dumps(plain).encode(), Report, "there")
    del plain["scores"][0][name]
    with pytest.raises(DataError, match=rf"scores\.0\.{name}: Field required"):
        json_records.decode(json.dumps(plain).encode(), Report, "there")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_on_reading_and_writing(value: float) -> None:
    report = replace(REPORT, scores=(replace(SCORE, low=value),))
    with pytest.raises(DataError, match=r"scores\.0\.low: Input should be a finite number"):
        json_records.encode(report)
    with pytest.raises(DataError, match=r"scores\.0\.low: Input should be a finite number"):
        json_records.decode(json.dumps(asdict(report)).encode(), Report, "there")


def test_an_invalid_record_is_not_written(tmp_path: Path) -> None:
    json_records.write(tmp_path / "report.json", REPORT)
    before = (tmp_path / "report.json").read_bytes()
    with pytest.raises(DataError):
        json_records.write(tmp_path / "report.json", replace(REPORT, provenance=replace(PROVENANCE, seed="0")))
    assert (tmp_path / "report.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"{},{}", b"\xff"])
def test_data_that_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="there is not a valid verdict"):
        json_records.decode(data, Verdict, "there")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file") as caught:
        json_records.read(tmp_path / "none.json", Report)
    assert caught.value.hint


def test_an_error_message_never_contains_a_value() -> None:
    sample = {"variant": "base", "prompt": {"id": 3, "text": "unspeakable", "role": "unspeakable", "label": "x"}}
    with pytest.raises(DataError) as caught:
        json_records.decode(json.dumps(sample).encode(), Sample, "there")
    assert "unspeakable" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_the_schema_names_every_field_and_forbids_others() -> None:
    schema = json_records.schema(Report)
    assert schema["$ref"] == "#/$defs/Report"
    provenance = schema["$defs"]["Provenance"]
    assert set(provenance["required"]) == {f.name for f in fields(Provenance)}
    assert provenance["additionalProperties"] is False
    for kind in (Score, DetectorInfo, Verdict, Finding):
        listed = json_records.schema(kind)["$defs"][kind.__name__]
        assert set(listed["required"]) == {f.name for f in fields(kind)}
