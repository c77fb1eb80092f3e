"""``moa`` from a process that has imported everything already: a fork of it runs each command.

A command of the README takes a second or two; importing torch, Lightning and transformers takes eight. The fork has the
caller's arguments, folder, environment and files, and it ends as a process of its own does.
"""

import gc
import importlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
sys.exit(int(server.makefile().read()))
"""
# Not wandb: the folder for media that it makes on import would end with the first fork.
_PARTS = (
    "lightning.pytorch.loggers",
    "matplotlib.backends.backend_agg",
    "peft",
    "rich.progress",
    *(
        f"moa_lightning.commands.{name}"
        for name in ("combiners.pages", "compare", "export.command", "fit.cli", "label.command")
    ),
    *(f"moa_lightning.stages.{name}" for name in ("reward_model", "supervised")),
)


@contextmanager
def preloaded_moa(client: Path, script: Path) -> Iterator[None]:
    """Context manager: ``client`` is an executable file that does what the installed ``script`` does.

    With ``-c CODE`` it runs Python code instead, as ``python`` does.
    """
    address = client.with_name("socket")
    command = [sys.executable, str(Path(__file__).resolve()), str(address), str(script)]
    server = subprocess.Popen(command, text=True, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n", "the imports failed; their traceback is above"
        client.write_text(_CLIENT.format(python=sys.executable, address=str(address)))
        client.chmod(0o755)
        yield
    finally:
        server.kill()
        server.communicate()


def _imports() -> None:
    for name in _PARTS:
        importlib.import_module(name)
    # What libraries compute once for each process: transformers' table of old checkpoints, matplotlib's of fonts.
    from matplotlib.figure import Figure
    from transformers import AutoModelForCausalLM

    Figure().savefig(io.BytesIO())
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_pretrained(policy_folder(Path(folder)))


def _serve(address: str) -> list[str]:
    """Fork for each request. Returns in the fork alone, with the arguments of its command."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    gc.collect()
    gc.freeze()  # else each fork's collector copies the memory that it looks at
    print("ready", flush=True)
    while True:
        caller, _ = listening.accept()
        size, files, _, _ = socket.recv_fds(caller, 8, 3)
        arguments, folder, environment = json.loads(_exactly(caller, int.from_bytes(size, "big")))
        fork = os.fork()
        if fork == 0:
            for number, file in enumerate(files):
                os.dup2(file, number)
            for file in (*files, caller.detach(), listening.detach()):
                os.close(file)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            return list(arguments)
        for file in files:
            os.close(file)
        _, status = os.waitpid(fork, 0)
        caller.sendall(str(os.waitstatus_to_exitcode(status) % 256).encode())
        caller.close()


def _exactly(caller: socket.socket, size: int) -> bytes:
    with caller.makefile("rb") as file:
        return file.read(size)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from tests.helpers.tiny import policy_folder

    sys.path.pop()
    _imports()
    command = _serve(sys.argv[1])
    if command[0] == "-c":
        sys.argv, sys.path[:0] = command[:1], [""]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
        sys.exit()
    sys.argv = [sys.argv[2], *command]
    from moa_lightning.cli import main

    sys.exit(main())
