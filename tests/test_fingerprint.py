"""Which edits change the digest of a result, and which do not."""

import dataclasses
import importlib
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorykit import _fingerprint, results
from theorykit._fingerprint import fingerprint

EXPERIMENT = '''
"""An experiment."""
import dataclasses
from toylab import unused
from toylab.kernels import gram
from toylab.lazy import square
from theorykit import results, verify

SCALE = 2.0
TABLE = {}
TABLE["a"] = 1

@dataclasses.dataclass(frozen=True)
class Config:
    """The settings."""
    width: int = 4
    margin: float = results.threshold(0.1, "a reason")

    @property
    def double(self):
        return 2 * self.width

def helper(x):
    """Help."""
    slope = SCALE * x  # a local variable called like the helper of verdicts
    return slope + TABLE["a"]

def slope(arrays):
    return arrays["x"]

def run(config: Config):
    from toylab import inside
    return {"x": gram(helper(square(config.double))) + inside.one()}

def verdicts(config, arrays):
    return [slope(arrays), verify]
'''

PROJECT = {
    "toylab/__init__.py": '"""A project."""\nORDER = ("exp",)\n',
    "toylab/exp.py": EXPERIMENT,
    "toylab/kernels.py": "from . import deep\ndef gram(x):\n    return deep.product(x)\n",
    "toylab/deep.py": "def product(x):\n    return x * x\n",
    "toylab/inside.py": "def one():\n    return 1\n",
    "toylab/unused.py": "def unused():\n    return 0\n",
    "toylab/lazy/__init__.py": "def __getattr__(name):\n    from . import squares\n    return getattr(squares, name)\n",
    "toylab/lazy/squares.py": "def square(x):\n    return x**2\n",
}


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 4
    rates: tuple = (0.1, 0.2)
    margin: float = results.threshold(0.1, "a reason")


class Lab:
    """The toy project on disk."""

    def __init__(self, folder):
        self.folder = folder
        for path, text in PROJECT.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)

    def edit(self, path, old, new):
        text = (self.folder / path).read_text()
        assert old in text
        (self.folder / path).write_text(text.replace(old, new))

    def digest(self, config=None, **options):
        return fingerprint("toylab.exp", config or Config(), packages=("theorykit", "toylab"), **options).digest


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield Lab(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "toylab"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("toylab/exp.py", '"""Help."""', '"""Help with more words."""'),
        ("toylab/exp.py", "SCALE = 2.0", "# a comment\n\nSCALE  =  2.0"),
        ("toylab/exp.py", "results.threshold(0.1", "results.threshold(0.3"),
        ("toylab/exp.py", "width: int = 4", "width: int = 5"),
        ("toylab/exp.py", "return [slope(arrays), verify]", "return [2 * slope(arrays)]"),
        ("toylab/exp.py", 'return arrays["x"]', 'return -arrays["x"]'),
        ("toylab/unused.py", "return 0", "return 1"),
        ("toylab/__init__.py", '("exp",)', '("exp", "another")'),
        ("toylab/kernels.py", "def gram(x):\n", 'def gram(x):\n    """Gram."""\n'),
    ],
)
def test_an_edit_that_cannot_change_the_arrays_keeps_the_digest(lab, path, old, new):
    before = lab.digest()
    lab.edit(path, old, new)
    assert lab.digest() == before


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("toylab/exp.py", "+ inside.one()", "- inside.one()"),
        ("toylab/exp.py", "SCALE * x", "SCALE + x"),
        ("toylab/exp.py", "SCALE = 2.0", "SCALE = 3.0"),
        ("toylab/exp.py", 'TABLE["a"] = 1', 'TABLE["a"] = 2'),
        ("toylab/exp.py", "2 * self.width", "3 * self.width"),
        ("toylab/exp.py", "from toylab.kernels import gram", "from toylab.deep import product as gram"),
        ("toylab/kernels.py", "deep.product(x)", "-deep.product(x)"),
        ("toylab/deep.py", "x * x", "x + x"),
        ("toylab/inside.py", "return 1", "return 2"),
        ("toylab/lazy/squares.py", "x**2", "x**3"),
        ("toylab/lazy/__init__.py", "getattr(squares, name)", "getattr(squares, name.lower())"),
        ("toylab/__init__.py", "ORDER", "print()\nORDER"),
    ],
)
def test_an_edit_that_can_change_the_arrays_changes_the_digest(lab, path, old, new):
    before = lab.digest()
    lab.edit(path, old, new)
    assert lab.digest() != before


@pytest.mark.slow
def test_importing_a_lazy_package_depends_on_all_of_it_but_never_on_what_judges_or_stores(lab):
    lab.edit("toylab/__init__.py", "ORDER", "def __getattr__(name):\n    raise AttributeError(name)\nORDER")
    lab.edit("toylab/exp.py", "from toylab import inside", "import toylab, theorykit.verify as v, theorykit.results")
    sources = fingerprint("toylab.exp", Config(), packages=("theorykit", "toylab")).sources
    assert {"toylab", "toylab.unused", "toylab.lazy.squares"} <= sources.keys()
    assert not sources.keys() & _fingerprint.IGNORED


def test_config_values_count_and_thresholds_do_not(lab):
    before = lab.digest()
    assert lab.digest(Config(width=5)) != before
    assert lab.digest(Config(rates=(0.1, 0.3))) != before
    assert lab.digest(Config(rates=(0.1, float("inf")))) != before
    assert lab.digest(Config(margin=0.5)) == before


def test_versions_backend_and_precision_count(lab, monkeypatch):
    digests = [lab.digest()]
    with jax.enable_x64(True):
        digests.append(lab.digest())
    for module in (jax, np, sys.modules["jaxlib"]):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "0.0.1")
            digests.append(lab.digest())
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "tpu")
        digests.append(lab.digest())
    assert len(set(digests)) == len(digests)


def test_the_content_of_data_files_counts_and_their_place_does_not(lab, tmp_path):
    files = [tmp_path / "a" / "x.bin", tmp_path / "b" / "x.bin"]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(b"data")
    assert lab.digest(data=files[:1]) == lab.digest(data=files[1:]) != lab.digest()
    files[1].write_bytes(b"Data")
    assert lab.digest(data=files[:1]) != lab.digest(data=files[1:])


def test_a_config_value_without_json_form_is_named(lab):
    with pytest.raises(TypeError, match=r"rates\[1\] holds .*use numbers"):
        lab.digest(Config(rates=(1, jnp.ones(2))))
    with pytest.raises(TypeError, match="decorate Config with @dataclass"):
        lab.digest({"width": 4})


def test_a_package_that_is_not_importable_is_named(lab):
    with pytest.raises(ModuleNotFoundError, match=r"nowhere.*PYTHONPATH"):
        fingerprint("toylab.exp", Config(), packages=("nowhere",))


def test_syntax_of_any_kind_is_read(lab):
    # Reached names are found in re-printed pieces of the file, so every kind of statement must survive that.
    (lab.folder / "toylab/exp.py").write_text(
        textwrap.dedent("""
        import typing
        if typing.TYPE_CHECKING:
            from toylab import unused
        try:
            from toylab.deep import *
        except ImportError:
            pass
        for i in range(2):
            LIMIT = i
        class Base:
            size: int = 3
        class Model(Base):
            def __call__(self, x):
                return [product(y) * LIMIT for y in x]
        async def later(): ...
        def run(config):
            match config:
                case _:
                    return {"x": Model()([1])}
        if __name__ == "__main__":
            run(None)
        """)
    )
    found = fingerprint("toylab.exp", Config(), packages=("toylab",))
    assert found.sources.keys() == {"toylab.exp", "toylab.deep"}
    lab.edit("toylab/exp.py", "size: int = 3", "size: int = 4")
    assert fingerprint("toylab.exp", Config(), packages=("toylab",)).digest != found.digest


def test_code_edited_after_it_was_loaded_is_noticed_until_it_is_reloaded(lab):
    def edited(before=frozenset(sys.modules)):
        return _fingerprint.edited_since_loaded(
            fingerprint("toylab.exp", Config(), packages=("toylab",)).sources, before
        )

    deep = importlib.import_module("toylab.deep")
    assert edited() == []
    lab.edit("toylab/deep.py", "x * x", "x * x  # a comment")
    assert edited() == []
    lab.edit("toylab/deep.py", "x * x", "x + x")
    assert edited() == ["toylab.deep"]
    importlib.reload(deep)
    assert edited() == []


def test_code_edited_before_it_was_first_looked_at_is_noticed_too(lab):
    importlib.import_module("toylab.deep")
    _fingerprint._LOADED.pop("toylab.deep", None)
    lab.edit("toylab/deep.py", "x * x", "x + x")
    sources = fingerprint("toylab.exp", Config(), packages=("toylab",)).sources
    assert _fingerprint.edited_since_loaded(sources, frozenset(sys.modules)) == ["toylab.deep"]
