"""Python runs this when it starts with this folder on PYTHONPATH: commands and test processes then run in a fork of the
warm server, which has imported their dependencies (see server.py), instead of importing them for seconds.

To its parent, this process is the command: same arguments, directory, environment, streams and exit status; signals are
passed on, and the command dies with it.
"""

import os
import sys

SOCKET_ENV = "WARM_SOCKET"
TEST_PROCESS = ["-u", "-c", "import sys;exec(eval(sys.stdin.readline()))"]
"""Arguments of a process of pytest-xdist."""
MODULES = ("deleatur", "dvc", "prefect", "prefect.engine", "pytest")


def warm_command() -> list[str] | None:
    """["-m", module, …], ["-c", code] or [script, …], where the warm server can run it."""
    command = sys.orig_argv[1:]
    if command == TEST_PROCESS:
        return command[1:]
    if command[:1] == ["-m"] and command[1:2] and command[1] in MODULES:
        return command
    if command and (
        os.path.basename(command[0]) == "deleatur" or os.path.basename(os.path.dirname(command[0])) == "flows"
    ):
        return command
    return None


def run_warm(command: list[str], address: str) -> None:
    """Runs the command in the warm server and ends as it does; returns where there is no server yet."""
    import json
    import signal
    import socket

    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:
        return
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    for number in signals:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: connection.send(bytes([number])))
    request = json.dumps({"command": command, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(request)
    answer = connection.recv(8)
    if not answer:  # the server was stopped
        os._exit(1)
    status = int.from_bytes(answer, "big", signed=True)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if SOCKET_ENV in os.environ and "PYTHONIOENCODING" not in os.environ and (command := warm_command()):
    run_warm(command, os.environ[SOCKET_ENV])
