"""A Python that has loaded libraries once; every process that is asked of it is forked from it.

    python tests/fork_server.py ADDRESS [MODULE ...]      the server, at a Unix socket
    python tests/fork_server.py --at ADDRESS ARGUMENT ...  `allocator ARGUMENT ...`, in a fork

A forked process is a real one, with its own number, environment, folder, output and exit code, and
imports torch no more. The server has computed nothing, so that a fork is safe. A fresh interpreter,
as a person starts it, is tested by the tests that start one.
"""

import importlib
import json
import os
import signal
import socket
import sys
import traceback

N_BYTES = 1 << 20


def serve(address, modules):
    """Forks for every request, until the process is killed."""
    for module in modules:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks that wait
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _answer(connection)
            connection.close()


def _answer(connection):
    """Runs the request in another fork; sends its number, then its exit code as `Popen` has it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, output, _, _ = socket.recv_fds(connection, N_BYTES, 2)
    request = json.loads(text)
    pid = os.fork()
    if pid == 0:
        connection.close()
        _run(request, output)
    connection.sendall(f"{pid}\n".encode())
    status = os.waitpid(pid, 0)[1]
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _run(request, output):
    """What an interpreter does with `-c code arguments`; never returns."""
    code = 1
    try:
        for number, stream in zip(output, (1, 2), strict=True):
            os.dup2(number, stream)
            os.close(number)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv[:] = ["-c", *request["arguments"]]
        exec(compile(request["code"], "<forked>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def ask(address, code, arguments, *, output, environment, folder):
    """Starts a process; returns the connection, as a file, that says its number and exit code.

    Args:
        address: the server's.
        code: Python.
        arguments: its `sys.argv[1:]`.
        output: descriptors of its stdout and stderr.
        environment: variables by name.
        folder: in which it runs.
    """
    request = {
        "code": code, "arguments": [str(x) for x in arguments], "environment": dict(environment),
        "folder": str(folder),
    }  # fmt: skip
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [json.dumps(request).encode()], list(output))
    with connection:
        return connection.makefile("r")


COMMAND = "import sys; from allocator.cli import main; sys.exit(main(sys.argv[1:]))"

if __name__ == "__main__":
    if sys.argv[1] == "--at":
        answers = ask(
            sys.argv[2], COMMAND, sys.argv[3:], output=(1, 2), environment=os.environ,
            folder=os.getcwd(),
        )  # fmt: skip
        sys.exit([int(line) for line in answers][1])
    serve(sys.argv[1], sys.argv[2:])
