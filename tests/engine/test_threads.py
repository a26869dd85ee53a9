"""The number of compute threads: what the system allows, and no more than the user set."""

import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest
import torch

from airllm_nb import LayeredModel, plan
from airllm_nb.engine import cgroups, threads

V1, V2 = "4:cpu,cpuacct:/user\n7:memory:/\n", "0::/user\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that stands for a machine: its cores, PyTorch's setting, and the files of its control groups."""
    before = torch.get_num_threads()

    def make(cores=8, own=8, groups="", **files):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
        monkeypatch.delenv("CPU_LIMIT", raising=False)
        monkeypatch.setattr(cgroups, "CGROUP", tmp_path)
        monkeypatch.setattr(cgroups, "OWN_CGROUPS", tmp_path / "own")
        (tmp_path / "own").write_text(groups)
        for folder in ("cpu/user", "user"):
            (tmp_path / folder).mkdir(parents=True)
        for name, text in files.items():
            (tmp_path / name.replace("__", "/").replace("cpu_", "cpu.")).write_text(text)
        torch.set_num_threads(own)

    yield make
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "own", "count", "reason"),
    [(4, 8, 4, "4 cores"), (8, 3, 3, "PyTorch's setting; 8 cores"), (1, 1, 1, "1 core")],
)
def test_without_a_quota(machine, cores, own, count, reason):
    machine(cores, own)
    assert threads.cpu_quota() is None
    assert threads.compute_threads() == (count, reason)


@pytest.mark.parametrize(
    ("quota", "count", "reason"),
    [("100000", 1, "the container may use 1 core"), ("150000", 1, "the container may use 1.5 cores"),
     ("50000", 1, "the container may use 0.5 cores"), ("399000", 3, "the container may use 3.99 cores"),
     ("-1", 8, "8 cores"), ("9900000", 8, "8 cores")],
)  # fmt: skip
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("level", ["own", "above"])
def test_quotas(machine, version, level, quota, count, reason):
    """Files as the kernel writes them; the tightest of all levels counts."""
    folder = "user__" if level == "own" else ""
    other = "" if level == "own" else "user__"
    if version == 1:
        files = {f"cpu__{folder}cpu_cfs_quota_us": quota + "\n", f"cpu__{other}cpu_cfs_quota_us": "-1\n"}
        files |= {f"cpu__{name}cpu_cfs_period_us": "100000\n" for name in (folder, other)}
    else:
        files = {f"{folder}cpu_max": f"{'max' if quota == '-1' else quota} 100000\n"}
        files |= {f"{other}cpu_max": "max 100000\n"} if level == "above" else {}  # the root has no such file
    machine(groups=V1 if version == 1 else V2, **files)
    assert threads.compute_threads() == (count, reason)


@pytest.mark.parametrize(
    ("limit", "quota", "count", "reason"),
    [("2.0", "max", 2, "JupyterHub's CPU_LIMIT is 2 cores"), ("1.0", "max", 1, "JupyterHub's CPU_LIMIT is 1 core"),
     ("0.5", "max", 1, "JupyterHub's CPU_LIMIT is 0.5 cores"), ("3.5", "max", 3, "JupyterHub's CPU_LIMIT is 3.5 cores"),
     ("2.0", "150000", 1, "the container may use 1.5 cores"), ("2.0", "300000", 2, "JupyterHub's CPU_LIMIT is 2 cores"),
     ("64", "max", 8, "8 cores"), *((text, "max", 8, "8 cores") for text in ("", "0.0", "-1", "inf", "nan", "lots"))],
)  # fmt: skip
def test_jupyterhubs_limit(machine, monkeypatch, limit, quota, count, reason):
    """As a spawner writes it into the environment; the tighter of it and a container's quota counts."""
    machine(groups=V2, user__cpu_max=f"{quota} 100000\n")
    monkeypatch.setenv("CPU_LIMIT", limit)
    assert threads.compute_threads() == (count, reason)


def test_never_more_than_the_user_set(machine):
    machine(8, 2, V2, user__cpu_max="300000 100000\n")
    assert threads.apply() == (2, "PyTorch's setting; 8 cores")
    assert torch.get_num_threads() == 2


def test_loading_applies_it_and_planning_does_not(machine, checkpoint):
    folder = checkpoint()
    machine(8, 3, V2, user__cpu_max="200000 100000\n")
    line = "threads   2  (the container may use 2 cores)"
    assert line in str(plan(folder, device="cpu", dtype="auto"))
    assert torch.get_num_threads() == 3
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        assert torch.get_num_threads() == 2
        assert line in str(model.plan)
    elsewhere = []
    other = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert elsewhere == [2]


def test_a_measurement_puts_the_number_back(machine):
    machine(8, 3, V2, user__cpu_max="100000 100000\n")
    with threads.applied() as (count, _):
        assert count == torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_omp_num_threads_and_affinity():
    """The user's own setting counts, and so does the affinity that this process was started with."""
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" if hasattr(os, "sched_setaffinity") else ""
    ask = "from airllm_nb.engine.threads import compute_threads; print(compute_threads().number)"
    for text, setting, most in ((ask, "1", 1), (code + ask, "8", 1 if code else 8)):
        run = subprocess.run(
            [sys.executable, "-c", text],
            env=os.environ | {"OMP_NUM_THREADS": setting},
            capture_output=True,
            text=True,
            check=False,
        )
        assert 1 <= int(run.stdout or 0) <= most, run.stderr


def test_a_real_quota():
    """A control group as a container has it."""
    root = Path("/sys/fs/cgroup")
    name = f"airllm_nb-{uuid.uuid4().hex[:8]}"
    group = root / "cpu" / name if (root / "cpu").is_dir() else root / name
    try:
        group.mkdir()
        if (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_quota_us").write_text("100000")
            (group / "cpu.cfs_period_us").write_text("100000")
        else:
            (group / "cpu.max").write_text("100000 100000")
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"control groups cannot be made here: {error}")
    code = (
        f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\nimport torch; torch.set_num_threads(2)\n"
        "from airllm_nb.engine import threads; print(*threads.apply(), torch.get_num_threads(), sep='; ')"
    )
    try:
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    finally:
        group.rmdir()
    assert run.stdout == "1; the container may use 1 core; 1\n", run.stderr


def test_one_thread_for_a_while():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt), threads.one():
            assert torch.get_num_threads() == 1
            raise KeyboardInterrupt
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


SPINNING = """
import os, threading, time, torch
from airllm_nb.engine import threads

numbers = torch.ones(1 << 20)

def seconds_of_cores():
    begin = time.process_time()
    for _ in range(30):
        numbers.add_(1)
        time.sleep(0.02)  # in place of a disk
    return time.process_time() - begin

def rest():
    threads.rest_sooner()
    ready.set()
    over.wait()

ready, over = threading.Event(), threading.Event()
resting = threading.Thread(target=rest)
print(len(os.listdir("/proc/self/task")), seconds_of_cores())
resting.start()
ready.wait()
print(len(os.listdir("/proc/self/task")), seconds_of_cores())
over.set()
resting.join()
time.sleep(0.1)
print(len(os.listdir("/proc/self/task")), seconds_of_cores())
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs /proc, and GNU's OpenMP")
@pytest.mark.parametrize("alone", [False, True])
def test_what_waits_for_the_disk_does_not_spin(alone):
    """Counts the processor's seconds of the same work; while a thread lives that has asked for it."""
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        pytest.skip("one core has one thread, which does not wait for others")
    environment = os.environ | {"OMP_NUM_THREADS": "1" if alone else str(cores)}
    printed = subprocess.run([sys.executable, "-c", SPINNING], env=environment, check=True, capture_output=True, text=True)
    (before, spinning), (meanwhile, resting), (afterwards, again) = (
        (int(count), float(seconds)) for count, seconds in map(str.split, printed.stdout.splitlines())
    )
    if alone:
        assert meanwhile == before + 1
        return
    assert meanwhile >= before + 2
    assert afterwards < meanwhile
    assert resting < spinning / 2
    assert resting < again / 2
