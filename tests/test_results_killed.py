"""A run killed at any moment leaves no half-written result, and the next run goes on with what is missing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from theorykit._experiment import find

pytest_plugins = ("toy_experiment",)

REPOSITORY = Path(__file__).parent.parent

DRIVER = '''
"""Kill a run at its n-th event on the file system, for every n, and look at what it leaves."""
import json, os, signal, sys, traceback, zipfile
from pathlib import Path
from theorykit import _fingerprint, results
from theorykit._experiment import find

# No JAX backend is started, so that the process may fork; the children then need not import JAX again.
_fingerprint.environment = lambda: {"jax": "fixed"}
results._environment = lambda seconds, store, sha256: {"parts": store.found, "sha256": sha256}
folder = Path(sys.argv[1])
log = folder / "toyexperiments/computed.txt"
EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "fsync", "member")

def child(work):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)

def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def killed_at(n, root):
    left = [n]
    def hook(event, arguments):
        if event not in EVENTS or (event == "open" and str(folder) not in str(arguments[0])):
            return
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    fsync = os.fsync
    def audited(handle):
        hook("fsync", (handle,))
        fsync(handle)
    os.fsync = audited
    member = zipfile.ZipFile.open
    def halfway(*arguments, **options):  # the file is there, and not all of it is written
        hook("member", arguments)
        return member(*arguments, **options)
    zipfile.ZipFile.open = halfway
    sys.addaudithook(hook)
    results.run("toy", "smoke", root=root, package="toyexperiments")

def look(root, complete):
    """What a reader sees: nothing, or the whole result."""
    try:
        result = results.load("toy", "smoke", root=root, package="toyexperiments")
    except results.MissingResult:
        assert not complete
        return
    assert result.arrays["values"].tolist() == [0.0, 1.0, 2.0]
    assert len(result.verdicts) == 2

def again(root, complete, missing):
    """What a reader sees, and what the next run does: compute the missing parts, and leave nothing but the result."""
    look(root, complete)
    log.write_text("")
    results.run("toy", "smoke", root=root, package="toyexperiments")
    assert log.read_text().split() == missing, (log.read_text(), missing)
    left = [path.name for path in root.iterdir()]
    assert len(left) == 1 and not left[0].startswith("."), left

try:  # the children find the toy loaded and read
    results.load("toy", "smoke", root=folder, package="toyexperiments")
except results.MissingResult:
    pass
n, seen = 0, set()
while True:
    n += 1
    root = folder / f"store{n}"
    code = status(child(lambda: killed_at(n, root)))
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    done = {path.stem.removeprefix("part=") for path in root.glob(".partial-*/part=*.npz")}
    complete = any(root.glob("toy-smoke-*"))
    missing = [] if complete else [i for i in "012" if i not in done]
    seen.add((complete, len(missing)))
    assert status(child(lambda: again(root, complete, missing))) == 0, n
print("moments", n - 1, "states", sorted(seen))

def race(root):
    results.run("toy", "smoke", root=root, package="toyexperiments")
for round in range(8):
    root = folder / f"race{round}"
    pids = [child(lambda: race(root)) for _ in range(4)]
    assert [status(pid) for pid in pids] == [0] * 4
    assert status(child(lambda: look(root, True))) == 0
    assert len(list(root.glob("toy-smoke-*"))) == 1
print("races end well")
print("ingredients", json.dumps(find("toy", "smoke", folder, "toyexperiments").fingerprint.ingredients))
'''


@pytest.mark.slow
def test_a_run_killed_at_any_moment_leaves_no_half_result_and_goes_on_with_what_is_missing(toy):
    toy.write("driver.py", DRIVER)
    path = os.pathsep.join([str(toy.folder), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-B", "-W", "ignore", str(toy.folder / "driver.py"), str(toy.folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    moments, states = re.search(r"moments (\d+) states (.*)", done.stdout).groups()
    # 3 parts, 3 files and 1 rename, each with an open, a write and an fsync: with fewer moments the kills would miss
    # the writing.
    assert int(moments) > 30
    # Killed with none, one, two, all parts saved, and with the result in place.
    assert states == "[(False, 0), (False, 1), (False, 2), (False, 3), (True, 0)]"
    assert "races end well" in done.stdout
    # Another process, with another seed of Python's string hash, finds the same digests.
    there = json.loads(re.search("ingredients (.*)", done.stdout)[1])
    here = find("toy", "smoke", toy.root, "toyexperiments").fingerprint.ingredients
    assert {key: here[key] for key in ("config", "run")} == {key: there[key] for key in ("config", "run")}
