"""Work on threads: the last request wins, and Colab gets none."""

import sys
import threading
import types

import pytest
from waiting import wait_for

from airllm_nb.notebook import background
from airllm_nb.notebook.background import Latest


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setattr(background, "RESTS", 0.02)


def test_work_runs_elsewhere():
    found = []
    background.run(lambda: found.append(threading.current_thread()))
    wait_for(lambda: found)
    assert found[0] is not threading.current_thread()


def test_on_colab_it_runs_here(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    found = []
    background.run(lambda: found.append(threading.current_thread()))
    Latest(lambda is_latest: found.append((threading.current_thread(), is_latest()))).ask()
    assert found == [threading.current_thread(), (threading.current_thread(), True)]


@pytest.mark.usefixtures("_quick")
def test_of_many_requests_the_last_one_is_worked_on():
    begun = []
    latest = Latest(lambda is_latest: begun.append(is_latest()))
    for _ in range(20):
        latest.ask()
    wait_for(lambda: begun)
    latest.close()
    assert begun == [True]


@pytest.mark.usefixtures("_quick")
def test_work_learns_that_it_is_out_of_date():
    begun, go, found = threading.Event(), threading.Event(), []

    def work(is_latest):
        begun.set()
        assert go.wait(20)
        found.append(is_latest())

    latest = Latest(work)
    latest.ask()
    assert begun.wait(20)
    latest.ask()
    go.set()
    wait_for(lambda: len(found) == 2)
    assert found == [False, True]


@pytest.mark.usefixtures("_quick")
def test_nothing_begins_after_close():
    begun = []
    latest = Latest(begun.append)
    latest.ask()
    latest.close()
    threading.Event().wait(0.1)
    assert not begun
