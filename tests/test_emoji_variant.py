"""`emoji/variant.py` changes only seed, width and budgets, and stops at the script that fails."""

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


def test_every_script_exists() -> None:
    assert all((EMOJI / script[0]).is_file() for script in variant.NETWORKS.values())


def test_a_script_that_fails_is_named_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variant, "EMOJI", tmp_path)
    (tmp_path / "bad.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(SystemExit, match=r"bad\.py failed\nNext: less .*bad\.py\.log"):
        variant.run("bad.py", env=dict(os.environ), logs=tmp_path)
