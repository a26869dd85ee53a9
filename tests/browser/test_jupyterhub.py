"""A real JupyterHub: its proxy, two users at once, limits of memory and cores, no GPU."""

import json
import math
import os
import re
import shutil
import sys

import frontends
import pages
import pytest

from airllm_nb.demo import demo_path

PROXY = shutil.which("configurable-http-proxy")
LIMIT = 850_000_000  # PyTorch takes some 400 MB of it, the engine keeps 247 MB free, and the demo has 269 MB: some of it streams
CONFIG = """
c.JupyterHub.bind_url = {url!r}
c.JupyterHub.hub_bind_url = "http://127.0.0.1:{hub}"
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{api}"
c.ConfigurableHTTPProxy.command = [{proxy!r}]
c.JupyterHub.authenticator_class = "dummy"
c.DummyAuthenticator.password = {password!r}
c.Authenticator.allowed_users = {users!r}
c.JupyterHub.spawner_class = "jupyterhub.spawner.SimpleLocalProcessSpawner"
c.SimpleLocalProcessSpawner.home_dir_template = {homes!r}
c.Spawner.cmd = [{python!r}, "-m", "jupyterhub.singleuser"]
c.Spawner.args = ["--allow-root"]
c.Spawner.mem_limit = {limit}
c.Spawner.cpu_limit = 1
c.Spawner.environment = {environ!r}
"""
CELLS = (
    "%load_ext airllm_nb",
    "%airllm load demo --device cpu",
    "%airllm status",
    "%%airllm --max-new-tokens 12 -o answer\nWhat is the capital of France?",
    "import resource, torch\nprint(torch.get_num_threads(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)",
    "%airllm plan {huge} --device cpu",
    "%airllm load {huge} --device cpu",
)


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """A checkpoint whose two layers are 1.6 GB each: headers as published, and holes in place of the weights."""
    import torch
    from tiny import CONFIGS, make_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("checkpoints") / "huge"
    folder.mkdir()
    shape = {"hidden_size": 4096, "intermediate_size": 1 << 16, "num_hidden_layers": 2}
    config = CONFIGS["llama"] | shape | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    header, end = {}, 0
    for name, weight in model.state_dict().items():
        begin, end = end, end + 2 * math.prod(weight.shape)
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    make_tokenizer(folder)
    return folder


@pytest.fixture
def hub(tmp_path, serve):
    """Return a function that starts a JupyterHub for some users, and gives its address; their homes are folders here."""
    if PROXY is None and not os.environ.get("AIRLLM_NB_REQUIRE_BROWSER"):
        pytest.skip("no JupyterHub's proxy on this machine (npm install configurable-http-proxy)")
    assert PROXY, "AIRLLM_NB_REQUIRE_BROWSER is set, and there is no configurable-http-proxy on this machine"

    def start(*users):
        port, hub_port, api_port = (frontends.free_port() for _ in range(3))
        environ = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "PYTHONPATH") if name in os.environ}
        settings = CONFIG.format(
            url=f"http://127.0.0.1:{port}", hub=hub_port, api=api_port, proxy=PROXY, password=frontends.TOKEN, users=set(users),
            homes=str(tmp_path / "{username}"), python=sys.executable, limit=LIMIT,
            environ=environ | {"AIRLLM_NB_HOME": str(demo_path().parent)},
        )  # fmt: skip
        (tmp_path / "jupyterhub_config.py").write_text(settings)
        return serve(frontends.Server(tmp_path, [sys.executable, "-m", "jupyterhub"], port, "/hub/api")).url

    return start


def sign_in(page, url, user):
    """Open the hub, and let it start the user's server."""
    page.goto(f"{url}/hub/login?next=/hub/spawn/{user}")
    page.fill("#username_input", user)
    page.fill("#password_input", frontends.TOKEN)
    page.click("#login_submit")
    return page


def run_together(labs, index):
    """Run a cell of all users at once; returns the pictures that each one's strip showed."""
    for lab in labs:
        lab.record(index)
        lab.start(index)
    for lab in labs:
        lab.wait(index)
    return [lab.pictures(index) for lab in labs]


def test_two_users_at_once(hub, window, huge, tmp_path):
    users = {"ada": "Light", "grace": "Dark"}
    for user, theme in users.items():
        home = tmp_path / user
        home.mkdir()
        frontends.write_settings(home / ".jupyter" / "lab" / "user-settings", theme)
        frontends.write_notebook(home / "hub.ipynb", *(cell.format(huge=huge) for cell in CELLS))
    url = hub(*users)
    windows = {user: sign_in(window(), url, user) for user in users}
    for user, page in windows.items():
        page.wait_for_url(f"**/user/{user}/**", timeout=pages.BUSY)
    labs = [pages.Lab(page, f"{url}/user/{user}", "hub.ipynb") for user, page in windows.items()]

    for index in range(3):
        run_together(labs, index)
    assert all(len(pictures) > 2 for pictures in run_together(labs, 3)), "a strip does not move"
    for user, lab in zip(users, labs, strict=True):
        assert re.search(r"30 layers, \d+ resident, \d+ streamed", lab.output(1))
        assert "auto: JupyterHub's MEM_LIMIT less" in lab.output(2)
        assert "threads   1  (JupyterHub's CPU_LIMIT is 1 core)" in lab.output(2)
        assert "The capital of France is Paris." in lab.output(3)
        lab.screenshot(f"hub-{user}", 3)
        threads, most = map(int, lab.run(4).split())
        assert threads == 1
        assert most < LIMIT, f"{user}'s kernel has used {most / 1e6:.0f} MB"
        for index in (5, 6):
            assert ". JupyterHub's MEM_LIMIT leaves" in lab.run(index)
            assert "Traceback" not in lab.output(index)
        lab.screenshot(f"hub-{user}-refused", 6)
        assert not lab.strangers
