"""Servers of cases, and whether this system has what they need."""

import sys

import guards
import pytest

guards.disable_as_asked()


@pytest.fixture(scope="module")
def cases(request, tmp_path_factory):
    """The server of the module of cases that a test module names as CASES."""
    if not sys.platform.startswith("linux"):
        pytest.skip("counts what is read, and limits memory, as only Linux can")
    from fork_server import Server

    server = Server(request.module.CASES, tmp_path_factory.mktemp("cases"))
    yield server
    server.close()
