"""A process that imports everything once and forks a command line for each request.

A fork runs `main(argv)` as `scripts/train.py` does, is killed by signal 9, and says in a shared
byte what it was doing. `Forge` is the side of the tests.
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
    "choosing the rows": ("lightning_gd.data.loader", "GlobalBatches", "_mini"),
    "updating": ("lightning_gd.module", "GradientDescentModule", "training_step"),
    "ending an epoch": ("lightning_gd.hooks", "RunHooks", "on_train_epoch_end"),
    "validating": ("lightning_gd.evaluation", "EvaluatedModule", "validation_step"),
    "gathering a checkpoint": ("lightning.pytorch", "Trainer", "save_checkpoint"),
    "writing curves": ("lightning_gd.curves", "Curves", "write"),
    "writing a checkpoint": ("lightning_gd.checkpoints", "SafeCheckpointIO", "save_checkpoint"),
}


class Forge:
    """Starts, kills and awaits command lines; a context manager."""

    def __init__(self, folder):
        self.folder, self.runs = Path(folder), 0
        env, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
        words = [sys.executable, __file__]
        self.server = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=env)

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
        log, phase = (self.folder / f"{self.runs}.{kind}" for kind in ("log", "phase"))
        log.touch()
        phase.write_bytes(b"\0")
        how = {"log": str(log), "phase": str(phase), "port": free_port(), "die": die}
        how["folder"] = os.getcwd()
        return {"log": log, "phase": phase, "pids": self._ask(argv=argv, world=world, **how)}

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
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            statuses = [os.waitpid(pid, 0)[1] for pid in request["wait"]]
            answer = [os.waitstatus_to_exitcode(status) for status in statuses]
        else:
            answer = [fork(cli.main, request, rank) for rank in range(request["world"])]
        print(json.dumps(answer), flush=True)


def fork(main, request, rank):
    pid = os.fork()
    if pid:
        return pid
    try:
        become(rank, **request)
        code = main(request["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:
        print(repr(error), flush=True)
        code = 99
    sys.exit(code)  # all the way through the end of the interpreter, as a script does


def become(rank, world, folder, log, phase, port, die, **_):
    """Write to the log, and be process `rank` of a world as torchrun starts it."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(0)
    os.chdir(folder)
    if world > 1:
        from lightning.pytorch.utilities import rank_zero_only

        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        place |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ["TORCHELASTIC_RUN_ID"] = "killed"
        rank_zero_only.rank = rank  # set at the import, which was before
    if rank == 0:
        with open(phase, "r+b") as file:
            byte = mmap.mmap(file.fileno(), 1)
        for number, place in enumerate(PHASES.values()):
            if place:
                note(byte, number, *place)
        if die:
            arrange(**die)


def note(byte, number, module, owner, name):
    """While a method runs, the shared byte holds its number."""
    owner = getattr(__import__(module, fromlist=[owner]), owner)
    function = getattr(owner, name)

    def noted(*args, **kwargs):
        before, byte[0] = byte[0], number
        try:
            return function(*args, **kwargs)
        finally:
            byte[0] = before

    setattr(owner, name, noted)


def arrange(save, how):
    """In the `save`-th writing of a checkpoint: die there by signal 9, or find the disk full."""
    from lightning_gd.checkpoints import SafeCheckpointIO

    write, fsync, replace = SafeCheckpointIO.save_checkpoint, os.fsync, os.replace
    before = iter(range(save - 1))

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    def half(descriptor):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        die()

    def after(*args):
        replace(*args)
        die()

    def save_checkpoint(*args, **kwargs):
        if next(before, None) is None:
            if how == "full disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            os.fsync = {"half written": half, "before the sync": die}.get(how, fsync)
            os.replace = {"before the rename": die, "after the rename": after}.get(how, replace)
        return write(*args, **kwargs)

    SafeCheckpointIO.save_checkpoint = save_checkpoint


def first_checkpoint(run, folder, timeout=120.0):
    """Wait until a run has written its first checkpoint."""
    until = time.monotonic() + timeout
    while not any(Path(folder).glob("**/checkpoints/last.ckpt")):
        output = run["log"].read_text()
        assert "error:" not in output and time.monotonic() < until, output
        time.sleep(0.002)


if __name__ == "__main__":
    serve()
