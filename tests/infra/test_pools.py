"""Compose, the manifests, prefect.yaml and the work pool templates are consistent with each other."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import INFRA, ROOT, program, run_checked
from test_compose import BUILT_IMAGE, GPU, config_command, services, write_env_file
from test_kubernetes import KUBERNETES, containers, documents, pods
from test_kubernetes import built as built  # the fixture

from deleatur.storage.processes import GRACE_PERIOD

POOLS = ("cpu", "gpu")
SETUP = "python flows/setup.py && prefect --no-prompt deploy --all"
PLACEHOLDER = re.compile(r"\{\{ (\w+) \}\}")


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """compose.yaml without the GPU overlay."""
    return dict(yaml.safe_load(run_checked(*config_command(write_env_file(tmp_path_factory.mktemp("env"))))))


def template(kind: str, pool: str) -> dict[str, Any]:
    return dict(json.loads((INFRA / f"pools/{kind}-{pool}.json").read_text("utf-8")))


def defaults(kind: str, pool: str) -> dict[str, Any]:
    declared = template(kind, pool)["variables"]["properties"]
    return {name: variable["default"] for name, variable in declared.items() if "default" in variable}


def rendered_job(pool: str) -> dict[str, Any]:
    """The job manifest with the template's defaults; fields without a value are left out."""
    variables = defaults("kubernetes", pool) | {"name": "run"}

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: v for k, v in ((k, fill(v)) for k, v in value.items()) if v is not None}
        if isinstance(value, list):
            return [fill(v) for v in value]
        if isinstance(value, str) and (placeholder := PLACEHOLDER.fullmatch(value)):
            return variables.get(placeholder[1])
        return PLACEHOLDER.sub(lambda match: variables[match[1]], value) if isinstance(value, str) else value

    return dict(fill(template("kubernetes", pool)["job_configuration"]["job_manifest"]))


def test_compose_and_kubernetes_run_the_same_setup_command(composed: dict[str, Any], built: dict[str, Path]) -> None:
    assert composed["services"]["setup"]["command"][-1] == SETUP
    for overlay in built.values():
        [setup] = [c for name, c in containers(overlay) if name == "setup" and c["name"] == "setup"]
        assert setup["args"][-1] == SETUP


def test_prefect_has_the_same_settings_everywhere(
    composed: dict[str, Any], built: dict[str, Path], tmp_path: Path
) -> None:
    """Apart from addresses and passwords."""
    sys.path.insert(0, str(INFRA))
    from local import Stack

    environments = [composed["services"]["prefect"]["environment"], Stack(tmp_path)._prefect(None).env]
    for path in built.values():
        [container] = [c for name, c in containers(path) if name == "prefect"]
        environments.append({v["name"]: v["value"] for v in container["env"] if "value" in v})
        mounted = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        [pod] = [pod for name, pod in pods(path) if name == "prefect"]
        persistent = [v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        assert [mounted[environments[-1]["PREFECT_HOME"]]] == persistent, "leases survive a restart"
    local = {"PREFECT_SERVER_API_AUTH_STRING", "PREFECT_SERVER_UI_API_URL", "PREFECT_HOME"}
    image = {"PREFECT_SERVER_ANALYTICS_ENABLED"}
    first, *rest = [
        {n: v for n, v in e.items() if n.startswith("PREFECT_") and n not in local | image} for e in environments
    ]
    assert len(first) >= 4
    assert all(other == first for other in rest)


def test_every_pool_has_workers_of_the_type_that_setup_creates(
    composed: dict[str, Any], built: dict[str, Path]
) -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text("utf-8"))["deployments"]
    assert {d["work_pool"]["name"] for d in deployments} == set(POOLS)
    started = [[c["args"] for _, c in containers(path) if c["name"] == "worker"] for path in built.values()]
    for commands in (*started, [composed["services"][f"worker-{pool}"]["command"] for pool in POOLS]):
        assert [command[command.index("--pool") + 1] for command in sorted(commands)] == list(POOLS)
        assert {command[command.index("--type") + 1] for command in commands} == {"process"}, "as flows/setup.py"


@pytest.mark.parametrize("pool", POOLS)
def test_templates_use_existing_images_volumes_and_networks(
    pool: str, composed: dict[str, Any], built: dict[str, Path], tmp_path: Path
) -> None:
    docker, kubernetes = defaults("docker", pool), defaults("kubernetes", pool)
    images = [s["image"] for s in services(tmp_path, GPU).values() if BUILT_IMAGE.match(s["image"])]
    assert docker["image"] in images
    assert docker["networks"] == [composed["networks"]["default"]["name"]]
    volumes = {volume["name"] for volume in composed["volumes"].values()}
    assert {volume.partition(":")[0] for volume in docker["volumes"]} <= volumes
    name = yaml.safe_load((INFRA / "kubernetes/base/kustomization.yaml").read_text("utf-8"))
    tags = {image["newName"] + ":" + image["newTag"] for image in name["images"] if "newName" in image}
    assert kubernetes["image"] in tags
    assert kubernetes["namespace"] == name["namespace"]
    named = {(d["kind"], d["metadata"]["name"]) for d in documents(built["aws"])}
    assert ("ServiceAccount", kubernetes["service_account_name"]) in named
    if pool == "cpu":
        [workspace] = [
            d for d in documents(built["aws"]) if (d["kind"], d["metadata"]["name"]) == ("StatefulSet", "worker-cpu")
        ]
        [claim] = workspace["spec"]["volumeClaimTemplates"]
        claimed = f"{claim['metadata']['name']}-{workspace['metadata']['name']}-0"
        assert kubernetes["project_claim"] == claimed
        assert docker["volumes"][0].partition(":")[2] == kubernetes["project_path"] == "/workspace"
    else:
        default = composed["services"]["checkout"]["environment"]["DELEATUR_REPOSITORY"]
        assert f":{default}:" in docker["volumes"][0], "the default repository is mounted"


@pytest.mark.parametrize("pool", POOLS)
def test_a_run_on_kubernetes_is_a_valid_restricted_job(pool: str, tmp_path: Path) -> None:
    manifest = rendered_job(pool)
    manifest["metadata"]["name"] = manifest["metadata"].pop("generateName") + "1"  # as Kubernetes does
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(manifest), "utf-8")
    run_checked(program("kubernetes-validate"), "--strict", "-k", KUBERNETES, path)
    pod = manifest["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert pod["terminationGracePeriodSeconds"] >= GRACE_PERIOD + 30
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) is (pool == "gpu")
