"""The device selector: what cannot be used cannot be chosen, and says why."""

import pytest

from airllm_nb.engine.devices import DeviceInfo
from airllm_nb.errors import DeviceError
from airllm_nb.notebook import device_selector
from airllm_nb.notebook.device_selector import DeviceSelector

CPU = DeviceInfo("cpu", "CPU (2 threads)", usable=True, reason="always there")
NO_CUDA = DeviceInfo("cuda", "CUDA", usable=False, reason="no NVIDIA driver <found>")
GPUS = tuple(DeviceInfo(f"cuda:{n}", f"GPU {n}", usable=True, reason="ready") for n in range(2))


@pytest.fixture
def there(monkeypatch):
    """Set which devices there are; select_device goes on asking this machine."""
    found = [CPU, NO_CUDA]
    monkeypatch.setattr(device_selector, "devices", lambda: tuple(found))
    return found


def test_this_machine():
    selector = DeviceSelector()
    assert selector.value == "cpu"
    assert selector.buttons["cpu"].value is True
    assert not selector.buttons["cpu"].disabled
    for info in device_selector.devices():
        name = info.name
        assert selector.buttons[name].disabled is not info.usable
        if not info.usable:
            assert f"{info.label}: {info.reason}" in selector.children[1].value
            with pytest.raises(DeviceError, match=info.reason):
                selector.value = name
            assert selector.value == "cpu"


@pytest.mark.usefixtures("there")
def test_what_cannot_be_used_is_disabled_with_its_reason_escaped():
    selector = DeviceSelector()
    assert selector.buttons["cuda"].disabled
    assert "CUDA: no NVIDIA driver &lt;found&gt;" in selector.children[1].value
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        selector.value = "cuda"
    with pytest.raises(DeviceError, match="There is no device 'tpu' here. Choose one of: cpu."):
        selector.value = "tpu"
    assert [name for name, button in selector.buttons.items() if button.value] == ["cpu"]


def test_one_is_pressed_at_a_time(there):
    there[1:] = GPUS
    selector = DeviceSelector()
    selector.buttons["cuda:1"].value = True
    assert selector.value == "cuda:1"
    assert [name for name, button in selector.buttons.items() if button.value] == ["cuda:1"]
    assert [button.description for button in selector.buttons.values()] == ["CPU (2 threads)", "GPU 0", "● GPU 1"]
    selector.buttons["cuda:1"].value = False  # a click on the pressed one
    assert selector.value == "cuda:1"
    assert selector.buttons["cuda:1"].value is True
    selector.value = "cuda:0"
    assert [name for name, button in selector.buttons.items() if button.value] == ["cuda:0"]


def test_refresh_finds_what_came_and_says_what_went(there):
    selector = DeviceSelector()
    there[1:] = GPUS
    selector.refresh()
    assert list(selector.buttons) == ["cpu", "cuda:0", "cuda:1"]
    assert selector.value == "cpu"
    selector.value = "cuda:0"
    there[1:] = [NO_CUDA]
    selector.refresh()
    assert selector.value == "cpu"
    assert "cuda:0 can no longer be used: cpu is chosen now" in selector.children[1].value


def test_nothing_can_be_pressed_while_disabled(there):
    there[1:] = GPUS
    selector = DeviceSelector()
    selector.disabled = True
    assert all(button.disabled for button in selector.buttons.values())
    selector.disabled = False
    assert not any(button.disabled for button in selector.buttons.values())
