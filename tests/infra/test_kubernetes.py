"""The manifests: built by kustomize, validated against Kubernetes' schemas and our own rules."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import INFRA, program, run, run_checked
from test_compose import FILE as COMPOSE
from test_compose import write_env_file
from test_images import VERSION

from deleatur.storage.processes import GRACE_PERIOD

OVERLAYS = ("local", "aws")
KUBERNETES = "1.33"
Document = dict[str, Any]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each overlay with its secrets filled in, as one file."""
    root = tmp_path_factory.mktemp("infra")
    shutil.copytree(INFRA, root, dirs_exist_ok=True)
    out = {}
    for name in OVERLAYS:
        folder = root / "kubernetes/overlays" / name
        shutil.copy(write_env_file(root), folder / "secrets.env")
        out[name] = root / f"{name}.yaml"
        out[name].write_text(run_checked(program("kubectl"), "kustomize", folder), "utf-8")
    return out


def documents(path: Path) -> list[Document]:
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def pods(path: Path) -> Iterator[tuple[str, Document]]:
    for document in documents(path):
        if document["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def containers(path: Path) -> Iterator[tuple[str, Document]]:
    for name, pod in pods(path):
        yield from ((name, c) for c in (*pod.get("initContainers", []), *pod["containers"]))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_without_secrets_nothing_is_built(overlay: str) -> None:
    done = run(program("kubectl"), "kustomize", INFRA / "kubernetes/overlays" / overlay)
    assert done.returncode != 0
    assert "secrets.env" in done.stderr


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_match_kubernetes_schemas(overlay: str, built: dict[str, Path], tmp_path: Path) -> None:
    check = (program("kubernetes-validate"), "--strict", "-k", KUBERNETES)
    run_checked(*check, built[overlay])
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(built[overlay].read_text("utf-8").replace("readinessProbe", "readynessProbe", 1), "utf-8")
    assert run(*check, wrong).returncode != 0


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_meets_the_restricted_standard(overlay: str, built: dict[str, Path]) -> None:
    for name, pod in pods(built[overlay]):
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["enableServiceLinks"] is False, f"{name}: the variable PREFECT_PORT would be read as a setting"
    for name, container in containers(built[overlay]):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"], name
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_has_limits_a_pinned_image_and_probes(overlay: str, built: dict[str, Path]) -> None:
    for name, container in containers(built[overlay]):
        assert "memory" in container["resources"]["limits"], name
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
        assert VERSION.search(container["image"]), name
    for name, pod in pods(built[overlay]):
        if pod.get("restartPolicy") != "OnFailure":
            assert all("livenessProbe" in container for container in pod["containers"]), name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_only_in_secret_objects(overlay: str, built: dict[str, Path]) -> None:
    rest = [d for d in documents(built[overlay]) if d["kind"] != "Secret"]
    assert "given-" not in yaml.safe_dump(rest)
    for path in (INFRA / "kubernetes").rglob("*.yaml"):
        assert "kind: Secret" not in path.read_text("utf-8"), path


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_references_resolve(overlay: str, built: dict[str, Path]) -> None:
    named = {(d["kind"], d["metadata"]["name"]) for d in documents(built[overlay])}
    [keys] = [set(d["data"]) for d in documents(built[overlay]) if d["kind"] == "Secret"]
    for name, container in containers(built[overlay]):
        for source in container.get("envFrom", []):
            for kind, ref in ((kind.removesuffix("Ref"), ref) for kind, ref in source.items()):
                known = (kind[0].upper() + kind[1:], ref["name"]) in named
                assert known or ref.get("optional"), f"{name}: {ref['name']}"
        for variable in container.get("env", []):
            if ref := variable.get("valueFrom", {}).get("secretKeyRef"):
                assert ("Secret", ref["name"]) in named, name
                assert ref["key"] in keys or ref.get("optional"), f"{name}: {ref['key']}"


def test_workers_have_time_to_save_and_one_gpu(built: dict[str, Path]) -> None:
    pod_specs = dict(pods(built["aws"]))
    for name in ("worker-cpu", "worker-gpu"):
        assert pod_specs[name]["terminationGracePeriodSeconds"] >= GRACE_PERIOD + 30, name
    [worker] = pod_specs["worker-gpu"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_the_local_overlay_runs_the_gpu_worker_without_a_gpu(built: dict[str, Path]) -> None:
    [other], [worker] = (dict(pods(built[name]))["worker-gpu"]["containers"] for name in ("aws", "local"))
    images = {c["image"].rpartition("/")[2] for name, c in containers(built["aws"]) if name == "worker-cpu"}
    assert {worker["image"]} == images, "the image of the pool cpu"
    assert "nvidia" not in str(worker["resources"])
    assert worker["args"] == other["args"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_writable_paths_are_mounted(overlay: str, built: dict[str, Path]) -> None:
    """Temporary files and caches; the root is read-only."""
    for name, container in containers(built[overlay]):
        if container["image"].startswith("deleatur:") or "/deleatur:" in container["image"]:
            env = {v["name"]: v.get("value") for v in container.get("env", [])}
            mounted = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
            assert {env.get("TMPDIR", "/tmp"), "/tmp", "/home/deleatur"} <= mounted, f"{name}: {container['name']}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_notification_addresses_are_set_wherever_setup_runs(overlay: str, built: dict[str, Path]) -> None:
    notified = {(name, c["name"]) for name, c in containers(built[overlay]) if "DELEATUR_NOTIFY" in str(c.get("env"))}
    assert {("setup", "setup"), ("worker-cpu", "worker")} <= notified


def test_images_match_compose(built: dict[str, Path]) -> None:
    theirs = {
        str(image)
        for service in yaml.safe_load(COMPOSE.read_text("utf-8"))["services"].values()
        if not str(image := service.get("image", "deleatur")).startswith("deleatur")
    }
    assert theirs == {c["image"] for _, c in containers(built["local"]) if not c["image"].startswith("deleatur")}
