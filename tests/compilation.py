"""Quick compilation for tests of values: compiling takes nearly all their time, and how good it is matters not."""

from functools import cache

import jax


def quickly(function, *arrays):
    """What the jitted function returns, compiled without optimisation."""
    return jax.jit(function, compiler_options=_options())(*arrays)


@cache
def _options():
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:  # another version may have other options
        return {}
    return options
