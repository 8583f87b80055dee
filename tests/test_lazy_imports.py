"""Imports cost what is used and no more; every public name is there."""

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

import theorykit

# What takes long to import, or must not be needed.
HEAVY = ("neural_tangents", "tensorflow", "sklearn", "matplotlib", "flax", "optax", "diffrax", "orbax", "jax", "scipy")


def loaded_after(statements, names=HEAVY):
    """Which of the packages a fresh interpreter holds after the statements."""
    program = f"import json, sys\n{statements}\nprint(json.dumps([n for n in {list(names)} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_loads_nothing():
    assert loaded_after("import theorykit, theorykit.ntk, theorykit.data") == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statements", "absent"),
    [
        ("import theorykit.ntk.empirical, theorykit.ntk.structured", (*HEAVY[:4], "optax", "diffrax", "orbax")),
        ("import theorykit as tk; tk.ntk.empirical_ntk, tk.ntk.kernel_drift", (*HEAVY[:4], "diffrax", "orbax")),
        ("import theorykit as tk; tk.losses.info_nce, tk.similarity.cosine, tk.encoders.MLP", (*HEAVY[:4], "orbax")),
        ("import theorykit as tk; tk.ntk.infinite_ntk", HEAVY[1:4]),
        ("import theorykit as tk; tk.verify, tk.results", HEAVY[:4]),
    ],
)
def test_a_submodule_loads_only_what_it_needs(statements, absent):
    assert not loaded_after(statements, absent)


@pytest.mark.slow
def test_all_packages_that_the_test_looks_for_can_be_seen():
    # The control: when asked to, the same program does load them.
    assert loaded_after("import jax, flax, sklearn", ("jax", "flax", "sklearn", "matplotlib")) >= {
        "jax",
        "flax",
        "sklearn",
    }


def public_modules():
    """The package and all packages and modules in it that do not start with an underscore."""
    found = pkgutil.walk_packages(theorykit.__path__, "theorykit.")
    return ["theorykit", *(info.name for info in found if "._" not in info.name)]


@pytest.mark.parametrize(
    "name", [name for name in public_modules() if hasattr(importlib.import_module(name), "__path__")]
)
def test_every_public_name_resolves(name):
    package = importlib.import_module(name)
    assert package.__all__
    for attribute in package.__all__:
        assert getattr(package, attribute) is not None, f"{name}.{attribute}"
    assert set(package.__all__) <= set(dir(package))


@pytest.mark.parametrize("name", [name for name in public_modules() if name.count(".") == 1])
def test_every_submodule_is_reached_from_the_package(name):
    assert getattr(theorykit, name.removeprefix("theorykit.")) is importlib.import_module(name)


def test_functions_win_over_modules_of_their_name():
    # Importing a submodule sets it as an attribute of its package, where a function of that name would be hidden.
    for name in public_modules():
        importlib.import_module(name)
    assert callable(theorykit.ntk.flow)
    assert callable(theorykit.ntk.growth)
    assert theorykit.ntk.flow.__module__ == "theorykit.ntk.gradient_flow"
    for package in (theorykit.ntk, theorykit.data):
        modules = {info.name for info in pkgutil.iter_modules(package.__path__)}
        for attribute in set(package.__all__) - modules:
            assert not hasattr(getattr(package, attribute), "__path__")


def test_names_that_do_not_exist_say_so():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = theorykit.no_such_name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = theorykit.ntk.no_such_name
