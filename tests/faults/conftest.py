"""Servers of cases, and whether this system has what they need; the soak, which begins when the tests do."""

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


def pytest_collection_finish(session):
    """Start the soak, once, if its test was chosen: it takes the time that other tests leave, and its test waits for its end."""
    chosen = [item for item in session.items if item.name == "test_soak" and not item.get_closest_marker("skip")]
    if chosen and getattr(session.config, "workerinput", {}).get("workerid", "gw0") == "gw0":
        import test_soak

        if test_soak.SECONDS and sys.platform.startswith("linux") and not session.config.option.collectonly:
            path = test_soak.output(session.config)
            path.touch()
            test_soak.start(path)
