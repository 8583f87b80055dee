"""What experiments ask of a training run: that it ends, and that a long one can go on where it was killed."""

import jax

from experiments._side_by_side import WORKERS
from theorykit import results, training
from theorykit._memory import free_bytes

# Updates of all members together from which on checkpoints and an estimate of memory are due. At the preset quick one
# takes 3 ms of a core, so that a kill costs a shorter training, which begins anew, at most 18 s; finished ones are kept
# as parts of the result. A checkpoint takes 0.1 s.
LONG = 6_000
# Steps between checkpoints: 10 to 15 s with the 12 to 20 members that train at once at quick.
EVERY = 250


def one_thread() -> dict:
    """Compiler options of programs of small matrices that run side by side: each product by one thread of the CPU.

    By two threads a step of the transformers takes a third more processor time.
    """
    return {"xla_cpu_multi_thread_eigen": False} if jax.default_backend() == "cpu" else {}


def parameters(params):
    """The parameters themselves, as `metrics` of a training: one object, so that programs are compiled once."""
    return params


def finished(run: training.Run, what: str, folder=None) -> training.Run:
    """The run; an error with its step, and where the last good state is, if it diverged."""
    if run.status != "finished":
        # The state before the first update is that of the start, which needs no keeping.
        kept = f"the state after {run.steps} is in {folder}" if folder and run.steps else "nothing of it is kept"
        raise RuntimeError(
            f"{what} diverged: update {run.steps + 1} would have led to numbers that are not finite; {kept}. "
            "Lower the learning rate"
        )
    return run


def room() -> int | None:
    """Bytes that a training may take: trainings on one device run side by side."""
    free = free_bytes()
    return free if free is None or len(jax.devices()) > 1 else free // WORKERS


def checkpoints(label: str, updates: int) -> dict:
    """Arguments of `training.train` by which a run of many updates resumes after a kill; none for a short one."""
    folder = results.folder(label) if updates >= LONG else None
    return {} if folder is None else {"checkpoint": folder, "checkpoint_every": EVERY}
