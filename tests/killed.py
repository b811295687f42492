"""A process that imports everything once and forks a command line for each request.

What is forked runs `main(argv)` as `scripts/train.py` does, is killed for real by signal 9, and
says in a shared byte what it was doing. `Forge` is the side of the tests.
"""

import contextlib
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PHASES = {
    "between two steps": (),
    "choosing the rows": ("lightning_gd.data.tensors", "GlobalBatches", "_block"),
    "updating": ("lightning_gd.module", "GradientDescentModule", "training_step"),
    "ending an epoch": ("lightning.pytorch.loops.fit_loop", "_FitLoop", "on_advance_end"),
    "validating": ("lightning.pytorch.loops.evaluation_loop", "_EvaluationLoop", "run"),
    "gathering a checkpoint": ("lightning.pytorch", "Trainer", "save_checkpoint"),
    "writing curves": ("lightning_gd.curves", "Curves", "write"),
    "writing a checkpoint": ("lightning_gd.checkpoints", "SafeCheckpointIO", "save_checkpoint"),
}


class Forge:
    """Starts, kills and awaits command lines; a context manager."""

    def __init__(self, folder):
        self.folder, self.runs = Path(folder), 0
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.server.communicate()

    def _ask(self, **request):
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, argv, world=1, die=None):
        """Fork `world` processes that run `main(argv)` together; what they are known by."""
        self.runs += 1
        log = self.folder / f"{self.runs}.log"
        (self.folder / f"{self.runs}.phase").write_bytes(b"\0")
        pids = self._ask(argv=argv, world=world, die=die, log=str(log), port=free_port())
        return {"pids": pids, "log": log, "phase": log.with_suffix(".phase")}

    def wait(self, run):
        """The exit statuses, negative for a signal."""
        return self._ask(wait=run["pids"])

    def run(self, argv, world=1, die=None):
        """Statuses and output of a run that is let alone."""
        run = self.start(argv, world, die)
        return self.wait(run), run["log"].read_text()

    @staticmethod
    def kill(run):
        for pid in run["pids"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @staticmethod
    def phase(run):
        return list(PHASES)[run["phase"].read_bytes()[0]]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def serve():
    import torch

    from lightning_gd import cli, lightning_cli  # noqa: F401 - imported once, for all forks

    torch.set_num_threads(1)
    for number, place in enumerate(PHASES.values()):
        if place:
            note(number, *place)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            statuses = [os.waitpid(pid, 0)[1] for pid in request["wait"]]
            answer = [os.waitstatus_to_exitcode(status) for status in statuses]
        else:
            answer = [fork(cli.main, request, rank) for rank in range(request["world"])]
        print(json.dumps(answer), flush=True)


def note(number, module, owner, name):
    """While a function runs, the shared byte holds its number."""
    owner = getattr(__import__(module, fromlist=[owner]), owner)
    function = getattr(owner, name)

    def noted(*args, **kwargs):
        before, Shared.byte[0] = Shared.byte[0], number
        try:
            return function(*args, **kwargs)
        finally:
            Shared.byte[0] = before

    setattr(owner, name, noted)


class Shared:
    byte: bytearray | mmap.mmap = bytearray(1)


def fork(main, request, rank):
    pid = os.fork()
    if pid:
        return pid
    try:
        output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(0)
        if rank == 0:
            with open(request["log"].replace(".log", ".phase"), "r+b") as file:
                Shared.byte = mmap.mmap(file.fileno(), 1)
        if request["world"] > 1:  # what torchrun tells its processes
            os.environ.update(
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(request["port"]),
                WORLD_SIZE=str(request["world"]),
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                GROUP_RANK="0",
                LOCAL_WORLD_SIZE=str(request["world"]),
                TORCHELASTIC_RUN_ID="killed",
            )
            from lightning.pytorch.utilities import rank_zero_only

            rank_zero_only.rank = rank  # set at the import, which was before
        if request["die"] and rank == 0:
            arrange(**request["die"])
        code = main(request["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:
        print(repr(error), flush=True)
        code = 99
    sys.exit(code)  # all the way through the end of the interpreter, as a script does


def arrange(save, how):
    """In the `save`-th writing of a checkpoint: die there by signal 9, or find the disk full."""
    from lightning_gd.checkpoints import SafeCheckpointIO

    write, fsync, replace = SafeCheckpointIO.save_checkpoint, os.fsync, os.replace
    count = 0

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    def half(descriptor):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        die()

    def save_checkpoint(*args, **kwargs):
        nonlocal count
        count += 1
        if count < save:
            return write(*args, **kwargs)
        if how == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        os.fsync = {"half written": half, "before the sync": die}.get(how, fsync)
        os.replace = {"before the rename": die, "after the rename": after}.get(how, replace)
        return write(*args, **kwargs)

    def after(*args):
        replace(*args)
        die()

    SafeCheckpointIO.save_checkpoint = save_checkpoint


def first_checkpoint(folder, timeout=120.0):
    """Wait until a run has written its first checkpoint."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if any(Path(folder).glob("**/checkpoints/last.ckpt")):
            return
        time.sleep(0.002)
    raise TimeoutError(f"no checkpoint in {folder} after {timeout} s")


if __name__ == "__main__":
    serve()
