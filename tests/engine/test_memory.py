import pytest
import torch

from airllm_nb.engine import cgroups, memory
from airllm_nb.errors import MemoryBudgetError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4GB", 4_000_000_000), ("4 gb", 4_000_000_000), ("1.5GiB", 1_610_612_736), ("800M", 800_000_000),
        ("12k", 12_000), (7, 7), ("7B", 7), (2e9, 2_000_000_000),
    ],
)  # fmt: skip
def test_sizes_as_people_write_them(text, nbytes):
    assert memory.parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["lots", "", "-1GB", "0", "GB", "1 PB", "1IB", "nan", "inf"])
def test_what_is_no_size(text):
    with pytest.raises(MemoryBudgetError, match="is not a size"):
        memory.parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (538_000_000, "538 MB"), (2_199_999_999, "2.20 GB"), (999.9e6, "1.00 GB")],
)  # fmt: skip
def test_sizes_for_people(nbytes, text):
    assert memory.format_size(nbytes) == text


def test_the_host_limits():
    assert 0 < memory.limits()["available memory"] < 1 << 50


def test_jupyterhub_limits(monkeypatch):
    monkeypatch.setenv("MEM_LIMIT", str(3_000_000_000))
    assert 0 < memory.limits()["JupyterHub's MEM_LIMIT"] < 3_000_000_000
    monkeypatch.setenv("MEM_LIMIT", "1")
    assert memory.available(torch.device("cpu")) == (0, "JupyterHub's MEM_LIMIT")


@pytest.mark.parametrize("version", [1, 2])
def test_cgroup_limits(tmp_path, monkeypatch, version):
    """Files as the kernel writes them, for a group inside a limited one."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    cache, mapped = ("inactive_file", "file_mapped") if version == 2 else ("total_inactive_file", "total_mapped_file")
    (tmp_path / names[0]).parent.mkdir(exist_ok=True)
    (tmp_path / names[0]).write_text("1000000000\n")
    (tmp_path / names[1]).write_text("700000000\n")
    (tmp_path / names[0]).with_name("memory.stat").write_text(
        f"anon 1\n{cache} 200000000\n{cache.replace('inactive', 'active')} 50000000\n{mapped} 20000000\n"
    )
    inner = (tmp_path / names[0]).parent / "user"
    inner.mkdir()
    (inner / names[0].rpartition("/")[2]).write_text("max\n" if version == 2 else "9223372036854771712\n")
    monkeypatch.setattr(cgroups, "CGROUP", tmp_path)
    lines = tmp_path / "cgroup"
    lines.write_text("0::/user\n" if version == 2 else "4:cpu,cpuacct:/\n7:memory:/user\n")
    monkeypatch.setattr(cgroups, "OWN_CGROUPS", lines)
    assert memory.limits()["container limit"] == 530_000_000
    assert memory.limits(mapped=True)["container limit"] == 550_000_000


@pytest.mark.parametrize("empty", ["memory.max", "memory.current", "memory.stat"])
def test_an_empty_cgroup_file_says_nothing(tmp_path, monkeypatch, empty):
    for name, text in {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "inactive_file 200\n"}.items():
        (tmp_path / name).write_text("" if name == empty else text)
    monkeypatch.setattr(cgroups, "CGROUP", tmp_path)
    monkeypatch.setattr(cgroups, "OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("0::/\n")
    expected = {"memory.max": None, "memory.current": 1000, "memory.stat": 300}
    assert memory.limits().get("container limit") == expected[empty]
