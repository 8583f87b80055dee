"""Shared fixtures: shapes checked at run time, strict promotion, float64 on request."""

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

# Every annotation of the library is checked by beartype while the tests run. The hook must be in place before the
# first import of a submodule.
hook = install_import_hook("theorykit", "beartype.beartype")
hook.__enter__()


@pytest.fixture(autouse=True)
def strict_numerics():
    """No silent broadcasting between ranks, no silent promotion between dtypes."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def no_programs_kept():
    """Compiled programs go with the file that needed them: those of all files held seven gigabytes a process."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Run the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def as_users_run():
    """Switch off the shape checks of the tests, so that the library's own checks answer."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
