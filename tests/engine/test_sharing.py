"""When weights may be shared: the decision itself, and real files, users and mounts."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from airllm_nb import LayeredModel, plan
from airllm_nb.engine.checkpoint import Checkpoint
from airllm_nb.engine.sharing import Access, require_shareable
from airllm_nb.errors import AirLLMError, DeviceError, SharingError

ROOT, NOBODY, STUDENT = 0, 65534, 1000
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == ROOT


@pytest.mark.parametrize(
    ("owner", "writable", "read_only", "user", "danger"),
    [
        (ROOT, False, False, STUDENT, ""),
        (ROOT, True, False, STUDENT, "you may write to it"),
        (STUDENT, False, False, STUDENT, "your own file"),
        (STUDENT, True, False, STUDENT, "your own file"),
        (STUDENT, False, False, ROOT, "root"),
        (ROOT, True, False, ROOT, "root"),
        (STUDENT, False, True, STUDENT, ""),
        (ROOT, False, True, ROOT, ""),
    ],
)
def test_who_could_change_a_file(owner, writable, read_only, user, danger):
    found = Access(owner, writable, read_only).danger(user)
    assert danger in found
    assert bool(danger) == bool(found)


def test_what_is_seen_of_a_file_goes_through_links(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to(file)
    assert Access.of(link) == Access.of(file) == Access(os.geteuid(), writable=True, read_only=False)
    file.chmod(0o444)
    assert Access.of(link).writable == IS_ROOT


def test_own_files_are_refused(checkpoint):
    folder = checkpoint()
    for ask in (LayeredModel.from_pretrained, plan):
        with pytest.raises(SharingError) as refusal:
            ask(folder, device="cpu", shared=True)
        assert "model-00001-of-00004.safetensors cannot be shared" in refusal.value.cause
        assert ("root can write" if IS_ROOT else "your own file") in refusal.value.cause
        assert 'shared="insist"' in refusal.value.remedy
    assert plan(folder, device="cpu", shared="insist").shared_nbytes > 0


@pytest.mark.parametrize("wrong", ["yes", "true", None, 2])
def test_what_shared_cannot_be(checkpoint, wrong):
    with pytest.raises(AirLLMError, match='shared=True, shared=False or shared="insist"'):
        LayeredModel.from_pretrained(checkpoint(), device="cpu", shared=wrong)


def test_what_merely_equals_true_is_no_way_around(checkpoint):
    with pytest.raises(SharingError):
        LayeredModel.from_pretrained(checkpoint(), device="cpu", shared=1)


@pytest.mark.parametrize("shared", [True, "insist"])
def test_only_on_the_cpu(checkpoint, shared):
    with pytest.raises(DeviceError, match="cannot share weights"):
        require_shareable(Checkpoint(checkpoint()), torch.device("cuda:0"), shared)


LOAD = """
import functools, os, sys
import torch
from airllm_nb import LayeredModel
from airllm_nb.compat import versions
versions.version_of = functools.cache(versions.version_of)  # the folders of the interpreter may be closed to another user
folder, user = sys.argv[1], int(sys.argv[2])
ids = torch.arange(9)[None]
with LayeredModel.from_pretrained(folder, device="cpu", shared="insist") as model:  # imports all that there is
    expected = model(ids).logits
if user:
    os.setgroups([]), os.setgid(user), os.setuid(user)
with LayeredModel.from_pretrained(folder, device="cpu", shared=True) as model:
    assert torch.equal(model(ids).logits, expected)
    print("shared", model.plan.shared_nbytes)
"""


@pytest.fixture
def public(checkpoint):
    """Return a copy of a checkpoint that every user can reach; the temporary folders of pytest are private."""
    parent = Path(tempfile.mkdtemp())
    parent.chmod(0o755)
    folder = Path(shutil.copytree(checkpoint(), parent / "model"))
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
    yield folder
    shutil.rmtree(parent)


def load(model, user, *before, **environment):
    done = subprocess.run(
        [*before, sys.executable, "-c", LOAD, str(model), str(user)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if f"Permission denied: '{sys.prefix}" in done.stderr:
        pytest.skip("another user may not read the packages of this interpreter")
    return done


def weights(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.skipif(not IS_ROOT, reason="only root can become another user")
@pytest.mark.parametrize(
    ("mode", "owner", "danger"),
    [(0o644, ROOT, ""), (0o666, ROOT, "you may write to it"), (0o444, NOBODY, "it is your own file")],
)
def test_another_user(public, mode, owner, danger):
    file = weights(public)[-1]
    file.chmod(mode)
    os.chown(file, owner, owner)
    done = load(public, NOBODY)
    if danger:
        assert f"SharingError: {file.name} cannot be shared: {danger}" in done.stderr
    else:
        assert done.stdout.startswith("shared "), done.stderr


@pytest.mark.skipif(not IS_ROOT, reason="only root can become another user")
def test_another_user_of_one_cache_of_the_hub(public):
    cache = public.parent / "models--org--name"
    for folder in ("blobs", "refs", "snapshots/c0ffee"):
        (cache / folder).mkdir(parents=True)
    (cache / "refs" / "main").write_text("c0ffee")
    for file in list(public.iterdir()):
        file.rename(cache / "blobs" / file.name)
        (cache / "snapshots" / "c0ffee" / file.name).symlink_to(Path("../../blobs") / file.name)
    environment = {"HF_HUB_CACHE": str(public.parent), "HF_HUB_OFFLINE": "1"}
    done = load("org/name", NOBODY, **environment)
    assert done.stdout.startswith("shared "), done.stderr
    blob = weights(cache / "blobs")[0]
    os.chown(blob, NOBODY, NOBODY)
    assert f"{blob.name} cannot be shared: it is your own file" in load("org/name", NOBODY, **environment).stderr


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs mount namespaces")
def test_a_read_only_mount_is_safe_even_for_root(public):
    own = "" if IS_ROOT else "--map-root-user "
    script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
    mount = ["unshare", *own.split(), "--mount", "sh", "-c", script, "sh", str(public)]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    assert "cannot be shared" in load(public, 0).stderr
    done = load(public, 0, *mount)
    assert done.stdout.startswith("shared "), done.stderr
