"""The warm server: imports what commands and flows import; runs each in a fork.

Imports take several CPU seconds per process, and the tests start hundreds of processes. A command that would import the
package from elsewhere imports all of it itself. Usage: python server.py SOCKET
"""

from __future__ import annotations

import ast
import atexit
import gc
import importlib.machinery
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "deleatur"
OWN = {"deleatur", "prefect", *(path.stem for path in (ROOT / "flows").glob("*.py"))}
"""Not imported for the sake of a name in them: the package, which follows; Prefect, which reads its settings when it is
imported; flows."""
ENVIRONMENT_READERS = ("deleatur.cli", "deleatur.registry")
"""They read the environment, which is the command's, when they are imported: each command imports them itself, and the
modules that import them."""
OTHERS = (
    *("dvc.cli.parser", "dvc.repo.datasets", "dvc.repo.index", "dvc.repo.init", "dvc.repo.metrics"),
    *("dvc.repo.plots", "dvc.repo.reproduce", "dvc.repo.stage", "dvc.rwlock", "dvc.scm", "dvc.stage.cache", "dvc.lock"),
    *("dvc.cachemgr", "dvc.data_cloud", "dvc.utils.strictyaml", "dvc_data.hashfile.db.local", "configobj", "pyparsing"),
    *("dvc.repo.open_repo", "dulwich.ignore", "dulwich.worktree", "fsspec.implementations.memory", "pygit2"),
    *("mlflow.store.model_registry.sqlalchemy_store", "mlflow.store.tracking.sqlalchemy_store"),
    *("fastapi", "aiosqlite", "asyncpg", "coolname", "griffe", "websockets"),
)
"""Imported by DVC, MLflow and Prefect when they are used."""


def import_dependencies() -> None:
    """Whatever the package and the flows import from other packages, at the top of a file or in a function."""
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "flows").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Import(names=names):
                    for name in names:
                        import_module(name.name)
                case ast.ImportFrom(module=str(module), level=0, names=names):
                    for name in names:
                        import_module(module, name.name)
    for module in OTHERS:
        import_module(module)
    # Builds a table of all models, for every process that loads one: 0.2 CPU seconds.
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("clip")


def import_package() -> None:
    sys.modules |= dict.fromkeys(ENVIRONMENT_READERS)  # type: ignore[arg-type]  # None: importing it fails
    for module in pkgutil.walk_packages([str(PACKAGE)], "deleatur.", onerror=lambda name: None):
        with suppress(ImportError):
            importlib.import_module(module.name)
    for name in ENVIRONMENT_READERS:
        del sys.modules[name]


def drop_package_from_elsewhere() -> None:
    """Forgets the imported package, for a command whose sys.path has another one."""
    spec = importlib.machinery.PathFinder.find_spec("deleatur")
    if spec is None or spec.origin != str(PACKAGE / "__init__.py"):
        for name in [name for name in sys.modules if name.partition(".")[0] == "deleatur"]:
            del sys.modules[name]


def import_module(module: str, name: str = "") -> None:
    if module.partition(".")[0] not in OWN:
        with suppress(ImportError):
            # Some packages import what a name stands for when it is first used.
            getattr(importlib.import_module(module), name or "__name__", None)


def serve(address: str) -> None:
    import_dependencies()
    import_package()
    assert not {*ENVIRONMENT_READERS, "prefect"} & sys.modules.keys(), "each command imports them itself"
    assert threading.active_count() == 1, "a fork has one thread"
    gc.freeze()  # forks neither look through what is imported here nor copy its pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors are reaped by the kernel
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        while True:
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    supervise(connection)


def supervise(connection: socket.socket) -> NoReturn:
    """Runs one command in a fork, passes signals on to it, and reports how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    header, streams, _, _ = socket.recv_fds(connection, 8, 3)
    size, request = int.from_bytes(header, "big"), b""
    while len(request) < size:
        request += connection.recv(size - len(request))
    if (pid := os.fork()) == 0:
        connection.close()
        run(streams=streams, **json.loads(request))
    for stream in streams:
        os.close(stream)
    end = os.pidfd_open(pid)
    selector = selectors.DefaultSelector()
    selector.register(connection, selectors.EVENT_READ)
    selector.register(end, selectors.EVENT_READ)
    while not any(key.fd == end for key, _ in selector.select()):
        if not (numbers := connection.recv(16)):  # the process that stands for the command was killed
            selector.unregister(connection)
        for number in numbers or [signal.SIGKILL]:
            os.kill(pid, number)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(OSError):
        connection.sendall(status.to_bytes(8, "big", signed=True))
    os._exit(0)


def run(command: list[str], cwd: str, env: dict[str, str], streams: list[int]) -> NoReturn:
    """Becomes the command: its directory, environment, streams and sys.path."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    is_live = bool(env.get("PYTHONUNBUFFERED")) or os.isatty(1)
    sys.stdout = os.fdopen(1, "w", 1 if is_live else -1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    kind = command[0] if command[0] in ("-m", "-c") else ""
    first = {"-m": cwd, "-c": ""}.get(kind, os.path.dirname(command[0]))
    sys.path[:0] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    drop_package_from_elsewhere()
    sys.argv = {"-m": command[1:], "-c": ["-c"]}.get(kind, command)
    status = 0
    try:
        if kind == "-m":
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.modules["__main__"] = ModuleType("__main__")
            exec(command[1], vars(sys.modules["__main__"]))
        else:
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        status = exit_status(end.code)
    except KeyboardInterrupt:
        finish()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        status = 1
    finish()
    os._exit(status)


def exit_status(code: Any) -> int:
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def finish() -> None:
    """What the interpreter does at its end."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()


if __name__ == "__main__":
    sys.path = sys.path[1:]  # this folder, with its sitecustomize
    serve(sys.argv[1])
