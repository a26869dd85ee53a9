"""Run the tests that depend on what is installed in real environments: ``python tests/matrix.py [NAME ...]``.

A name is a version of transformers, ``older`` (all that the README promises but the newest), ``floor`` (one below them) or
``colab`` (the newest, with the notebook packages of Google Colab). Without one, all are run.

With ``--measure``, write how wrong plain transformers is in each version, for the notebook about it.

Each environment is a virtual environment of its own that has one version of transformers and what that needs; everything else,
PyTorch among it, it borrows from the environment that runs this script, which has the newest version and says what is right.
As many are run at once as there are cores, each in one process; what it says comes when it has ended.
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from airllm_nb.compat import versions

TESTS = Path(__file__).parent
BELOW_THE_FLOOR = "4.40.2"
COLAB = ("ipywidgets==7.7.1", "ipython==7.34.0", "ipykernel==6.17.1")
# Without VIRTUAL_ENV, by which IPython puts the packages of the environment that runs this script before all others.
ENVIRON = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | {
    "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS / "compat"))), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}  # fmt: skip
CHECKS = ["compat", "notebook/test_doctor.py"]
ENGINE = [
    f"engine/test_{name}.py"
    for name in ("parity", "experts", "packed_experts", "many", "results", "quantize", "published", "published_bitsandbytes")
]
"""What depends on how a version builds and calls a model: on the ends of versions 4 and on the first 5."""
WITH_ENGINE = ("4.43.4", "4.57.6", "5.0.0")
CACHES = ["engine/test_taps.py", "engine/test_trace.py", "notebook/test_conversation.py", "notebook/test_continue.py"]
"""What depends on how layers are called and KV caches kept: on the oldest and the last of version 4, which differ in it."""
WITH_CACHES = ("4.43.4", "4.57.6")
OLDER = sorted(versions.TESTED[:-1], key=(*WITH_CACHES, *WITH_ENGINE, *versions.TESTED).index)  # those that take longest first
ALL = ["floor", "colab", "older"]
SKIPPED = ["-k", "not test_at_random_moments"]  # between which bytecodes an interrupt hits is not a matter of the version
NOTEBOOK = TESTS.parent / "notebooks" / "03_version_compat.ipynb"
QUICKSTART = TESTS.parent / "notebooks" / "01_quickstart.ipynb"
ON_COLAB = [
    "background",
    "complete",
    "device_selector",
    "kernel",
    "magics",
    "map",
    "model_chooser",
    "panel",
    "progress",
    "result",
    "stop_button",
]
# What takes long beside the quickstart, and what needs nbconvert's templates, which are not lent.
LEFT_OUT = "not nbval_strict and not test_bench and not test_nbconvert"


def main(wanted: list[str]) -> int:
    """Build each environment and run its tests; returns the number of those that fail."""
    folder = Path(os.environ.get("AIRLLM_NB_MATRIX") or tempfile.mkdtemp())
    answers = folder / "answers"
    names = [name for word in wanted or ALL for name in (OLDER if word == "older" else [word])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if not answers.exists() and set(names) - {"floor", "colab"}:
            print(f"Making checkpoints of every family and type with transformers {versions.TESTED[-1]}", flush=True)
            scripts = {"families": "compat/families.py", "types": "walk.py"}
            commands = ([sys.executable, str(TESTS / script), str(answers / name)] for name, script in scripts.items())
            [done.result() for done in [pool.submit(run, command) for command in commands]]
        if names == ["--measure"]:
            found = {version: measure(version, folder, answers) for version in versions.TESTED}
            versions.MEASURED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            return 0
        passed = pool.map(lambda name: check_colab(folder) if name == "colab" else check(name, folder, answers), names)
        failed = [name for name, good in zip(names, passed, strict=True) if not good]
    print(f"{'Failed: ' + ', '.join(failed) if failed else 'All environments passed.'}", flush=True)
    return len(failed)


def measure(version: str, folder: Path, answers: Path) -> object:
    """Return what `compat/measured.py` finds in the environment of one version."""
    python = Path(sys.executable) if version == versions.TESTED[-1] else environment(folder / version, f"transformers=={version}")
    output = subprocess.check_output([python, TESTS / "compat" / "measured.py", answers / "families"], env=ENVIRON)
    return json.loads(output.splitlines()[-1])


def check(name: str, folder: Path, answers: Path) -> bool:
    """Make the environment of one version and run the tests in it."""
    begin = time.monotonic()
    version = BELOW_THE_FLOOR if name == "floor" else name
    python = environment(folder / version, f"transformers=={version}")
    built = time.monotonic()
    checks = CHECKS + ENGINE * (version in WITH_ENGINE) + CACHES * (version in WITH_CACHES)
    tests = [str(TESTS / test) for test in (["compat/test_floor.py"] if version == BELOW_THE_FLOOR else checks)]
    if version == versions.TESTED[0] and NOTEBOOK.exists():
        tests.append(str(NOTEBOOK))
    passed, said = run_tests(python, *tests, AIRLLM_NB_ANSWERS=str(answers))
    times = f"built in {built - begin:.0f} s, tested in {time.monotonic() - built:.0f} s"
    print(f"{said}transformers {version}: {times}", flush=True)
    return passed


def check_colab(folder: Path) -> bool:
    """Make the environment with Colab's notebook packages, and run what a notebook shows in it."""
    python = environment(folder / "colab", *COLAB)
    seen = "import IPython, ipykernel, ipywidgets as w; print(w.__version__, IPython.__version__, ipykernel.__version__)"
    found = subprocess.check_output([python, "-c", seen], env=ENVIRON, text=True).split()
    if found != [package.partition("==")[2] for package in COLAB]:
        raise RuntimeError(f"The environment has other packages than Colab: {found}")
    begin = time.monotonic()
    tests = (str(TESTS / "notebook" / f"test_{name}.py") for name in ON_COLAB)
    passed, said = run_tests(python, *tests, str(QUICKSTART), "-k", LEFT_OUT)
    print(f"{said}Colab's packages: tested in {time.monotonic() - begin:.0f} s", flush=True)
    return passed


def run_tests(python: Path, *arguments: str, **environ: str) -> tuple[bool, str]:
    """Run pytest in an environment, in one process; returns whether it succeeded, and what it said."""
    command = [str(python), "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *SKIPPED, *arguments]
    done = subprocess.run(
        command, env=ENVIRON | environ, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode == 0, done.stdout


def environment(folder: Path, *packages: str) -> Path:
    """Return the interpreter of an environment that has some packages of its own, made if it is not there yet."""
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if python.exists():
        return python
    venv.create(folder, with_pip=False)
    own = Path(subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip())
    borrowed = "; ".join(f"site.addsitedir({path!r})" for path in site.getsitepackages())
    (own / "borrowed.pth").write_text(f"import site; {borrowed}\n")  # after its own packages
    install = ["install", "-q", "--no-warn-conflicts", "--disable-pip-version-check", *packages]
    run([sys.executable, "-m", "pip", "--python", str(python), *install])
    return python


def run(command: list[str]) -> None:
    """Run a command that must succeed, with the variables that the tests need."""
    subprocess.run(command, check=True, env=ENVIRON, cwd=TESTS.parent)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
