"""`emoji/variant.py` changes only seed, width and budgets, and stops at the first script that fails."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml

EMOJI = Path(__file__).parents[1] / "emoji"
sys.path.append(str(EMOJI))

import variant  # noqa: E402


def test_only_seed_width_and_budgets_change() -> None:
    built_in = yaml.safe_load((EMOJI / "params.yaml").read_text("utf-8"))
    params = variant.variant_params(7, 48, 1.0)
    assert (params["seed"], params["unet"]["channels"]) == (7, [48, 96])
    budgets = {"seed", "minutes", "samples", "processes", "channels"}

    def changed(old: object, new: object, key: str = "") -> set[str]:
        if isinstance(old, dict) and isinstance(new, dict):
            assert old.keys() == new.keys()
            return {name for k in old for name in changed(old[k], new[k], k) | set()}
        return {key} if old != new and key != "channels" else set()

    assert changed(built_in, params) <= budgets
    assert params["vae"]["channels"] == built_in["vae"]["channels"]


def test_every_script_of_a_phase_exists_and_takes_its_argument() -> None:
    scripts = [script for sequences in variant.PHASES for sequence in sequences for script in sequence]
    assert all((EMOJI / script[0]).is_file() for script in scripts)
    assert {script[1] for script in scripts if script[0] == "classify.py"} == {"judge", "rater", "style"}


def test_a_script_that_fails_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variant, "EMOJI", tmp_path)
    (tmp_path / "bad.py").write_text("import sys; sys.exit(3)")
    (tmp_path / "long.py").write_text("import time; time.sleep(600)")
    (tmp_path / "never.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    with pytest.raises(SystemExit, match=r"bad\.py failed\nNext: less .*bad\.py\.log"):
        variant.run_phase([[("long.py",), ("never.py",)], [("bad.py",)]], dict(os.environ), tmp_path)
    assert not (tmp_path / "ran").exists()
