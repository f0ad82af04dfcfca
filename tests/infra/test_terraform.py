"""The Terraform files, checked as far as possible without their provider, which needs the network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import hcl2
import pytest
from programs import INFRA, program, run

FOLDER = INFRA / "terraform"
FILES = sorted(FOLDER.glob("*.tf"))


def test_files_are_formatted() -> None:
    terraform = program("terraform", "no package registry has it", required=False)
    done = run(terraform, "fmt", "-check", FOLDER)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def blocks() -> dict[str, list[Any]]:
    blocks_by_kind: dict[str, list[Any]] = {}
    for file in FILES:
        for kind, declared_blocks in hcl2.loads(file.read_text("utf-8")).items():
            blocks_by_kind.setdefault(kind, []).extend(declared_blocks if isinstance(declared_blocks, list) else [])
    return blocks_by_kind


def bare(name: str) -> str:
    return name.strip('"')


def declared(blocks: dict[str, list[Any]]) -> Iterator[str]:
    for block in blocks["variable"]:
        yield from (f"var.{bare(name)}" for name in block)
    for block in blocks["locals"]:
        yield from (f"local.{name}" for name in block if not name.startswith("__"))  # the parser's own
    for kind, prefix in (("resource", ""), ("data", "data.")):
        for block in blocks[kind]:
            yield from (f"{prefix}{bare(t)}.{bare(name)}" for t, by_name in block.items() for name in by_name)


def test_references_are_declared_and_variables_are_used(blocks: dict[str, list[Any]]) -> None:
    text = re.sub(r"#.*", "", "\n".join(file.read_text("utf-8") for file in FILES))
    known = set(declared(blocks))
    used = set(re.findall(r"\b(?:var|local)\.\w+|\b(?:data\.)?aws_\w+\.\w+", text))
    used = {name for name in used if f"data.{name}" not in used} | {n for n in used if n.startswith("data.")}
    assert used <= known, used - known
    assert {name for name in known if name.startswith(("var.", "local."))} <= used


def test_bucket_and_database_are_private_and_encrypted(blocks: dict[str, list[Any]]) -> None:
    resources = {bare(t): by_name for block in blocks["resource"] for t, by_name in block.items()}
    [access] = resources["aws_s3_bucket_public_access_block"].values()
    assert all(v is True for k, v in access.items() if k.startswith(("block_", "ignore_", "restrict_")))
    [database] = resources["aws_db_instance"].values()
    assert database["storage_encrypted"] is True
    assert database["manage_master_user_password"] is True
    assert "password" not in database
    assert database.get("publicly_accessible", False) is False
    [nodes] = resources["aws_eks_node_group"].values()
    [taint] = nodes["taint"]
    assert bare(taint["key"]) == "nvidia.com/gpu"
