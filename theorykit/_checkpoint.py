"""Checkpoints of one training run in one folder, by orbax. Imported only when a run asks for checkpoints.

Orbax writes each checkpoint to a temporary folder and renames it when it is complete; the older one is deleted only
after that. So a process killed at any moment leaves the newest complete checkpoint, and temporary folders that the next
call removes.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree


def shapes(tree: PyTree) -> str:
    """The paths, dtypes and shapes of the leaves of `tree`, as one line of text."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return "; ".join(f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves)


def digest(tree: PyTree) -> str:
    """A SHA-256 digest of the values of the leaves of `tree`."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.ascontiguousarray(_plain(leaf)).tobytes())
    return total.hexdigest()


class Checkpoints:
    """The checkpoints of one run, a context manager.

    Parameters
    ----------
    folder
        Where the checkpoints are kept; made if absent.
    setting
        Name of an argument -> its value as text. A checkpoint made under another setting is refused.

    Raises
    ------
    ValueError
        If the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, setting: dict[str, str]):
        self.folder = Path(folder).absolute()
        self.setting = setting
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ValueError(
                f"The checkpoint folder {self.folder} cannot be written ({error}). Pass a folder that can."
            ) from error
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(1),
            cleanup_tmp_directories=True,
            # The loop goes on only when the checkpoint is committed.
            enable_async_checkpointing=False,
            # The metadata of an older checkpoint, whose deletion may have been interrupted, are not wanted.
            lightweight_initialize=True,
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.manager.close()

    def save(self, step: int, metric_steps: list[int], tree: PyTree) -> None:
        """Write `tree` as the checkpoint after `step` updates; return when it is committed."""
        # Orbax cannot store an array without elements; such a leaf holds nothing that restore could not make.
        leaves = {str(i): _plain(leaf) for i, leaf in enumerate(jax.tree.leaves(tree)) if leaf.size > 0}
        about = {"setting": self.setting, "metric_steps": metric_steps}
        self.manager.save(
            step,
            args=ocp.args.Composite(arrays=ocp.args.StandardSave(leaves), about=ocp.args.JsonSave(about)),
        )

    def newest(self, steps: int, metric_steps: list[int]) -> int | None:
        """The step of the newest checkpoint, or None where there is none.

        Parameters
        ----------
        steps, metric_steps
            Those of the run that is to be continued.

        Raises
        ------
        ValueError
            If the newest checkpoint belongs to another setting, lies beyond `steps`, or cannot be read.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        about = self._read(step, about=ocp.args.JsonRestore())["about"]
        remedy = "Pass the arguments of the run that wrote it, or another folder, or delete this one to start afresh."
        before = about["setting"]
        names = [*self.setting, *(before.keys() - self.setting.keys())]
        changed = [
            f"{name} was {before.get(name)}, now is {self.setting.get(name)}"
            for name in names
            if before.get(name) != self.setting.get(name)
        ]
        if changed:
            raise ValueError(f"The checkpoint in {self.folder} belongs to another run: {'; '.join(changed)}. {remedy}")
        if step > steps:
            raise ValueError(
                f"The checkpoint in {self.folder} holds {step} updates, more than steps={steps}. "
                f"Pass steps >= {step}, or another folder, or delete this one to start afresh."
            )
        reached = [m for m in metric_steps if m <= step]
        if about["metric_steps"] != reached:
            raise ValueError(
                f"The checkpoint in {self.folder} holds metrics at steps {about['metric_steps']}, but up to its step "
                f"{step} this run asks for them at {reached}. {remedy}"
            )
        return step

    def restore(self, step: int, like: PyTree) -> PyTree:
        """The tree saved at `step`, with the structure, shapes, dtypes and shardings of `like`.

        Raises
        ------
        ValueError
            If it cannot be read.
        """
        leaves, structure = jax.tree.flatten(like)
        stored = {str(i): _abstract(leaf) for i, leaf in enumerate(leaves) if leaf.size > 0}
        arrays = self._read(step, arrays=ocp.args.StandardRestore(stored))["arrays"]
        return jax.tree.unflatten(structure, [_typed(arrays.get(str(i)), leaf) for i, leaf in enumerate(leaves)])

    def _read(self, step: int, **items):
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # a damaged file shows as one of many types: of orbax, of tensorstore, of json
            raise ValueError(
                f"The checkpoint in {self.folder / str(step)} cannot be read ({type(error).__name__}: {error}). "
                "Delete that folder to start afresh."
            ) from error


def _is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf):
    """Random keys as integers, which files can hold."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    plain = _plain(leaf)
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=getattr(plain, "sharding", None))


def _typed(value, leaf):
    """The stored value as an array of the kind of `leaf`."""
    if value is None:
        return leaf
    return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else value
