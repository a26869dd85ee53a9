"""The read-ahead window on its own, with reads that the test controls."""

import gc
import threading
import time

import pytest

from airllm_nb.engine import threads
from airllm_nb.engine.slots import Slot
from airllm_nb.engine.stream import WeightStream
from airllm_nb.errors import AirLLMError


class Disk:
    """Writes the layer's number into the slot; may be told to fail, to wait or to be slow."""

    def __init__(self):
        self.reads = []
        self.fail = set()
        self.gate = {}
        self.seconds = 0.0

    def __call__(self, index, slot):
        self.reads.append(index)
        time.sleep(self.seconds)
        if index in self.gate:
            assert self.gate[index].wait(20)
        if index in self.fail:
            raise OSError(f"layer {index}")
        slot.host[:] = index


@pytest.fixture
def make():
    streams = []

    def make(disk, layers=4, sizes=(8, 8)):
        stream = WeightStream(
            dict.fromkeys(range(layers), 8) if isinstance(layers, int) else layers,
            [Slot(size) for size in sizes],
            disk,
            lambda: 0.0,
        )
        streams.append(stream)
        stream.start()
        return stream

    yield make
    for stream in streams:
        stream.close()


def use(stream, index):
    value = int(stream.take(index).buffer[0])
    stream.give_back(index)
    return value


def wait_for(condition):
    event = threading.Event()
    for _ in range(2000):
        if condition():
            return
        event.wait(0.005)
    raise AssertionError("it never came true")


def test_reads_ahead_and_around(make):
    disk = Disk()
    stream = make(disk)
    wait_for(lambda: disk.reads == [0, 1])  # before anything is asked for, and not more than fits
    for index in [0, 1, 2, 3] * 3:
        assert use(stream, index) == index
    wait_for(lambda: len(disk.reads) == 14)
    assert disk.reads == ([0, 1, 2, 3] * 4)[:14]  # each layer once a pass, and the first two of the next


def test_computing_that_waits_for_the_disk_leaves_it_a_core(make, monkeypatch):
    told = []
    monkeypatch.setattr(threads, "rest_sooner", lambda: told.append(threading.current_thread().name))
    disk = Disk()
    stream = make(disk)
    for index in [0, 1, 2, 3] * 5:  # computes longer than it reads
        wait_for(lambda: stream._slot_of("ready", index) is not None)  # noqa: B023  # called at once
        use(stream, index)
    assert not told
    disk.seconds = 0.01
    for index in [0, 1, 2, 3] * 5:
        use(stream, index)
    assert told == ["airllm_nb-read-ahead"]  # once, on the thread whose life it lasts


def test_the_order_is_learned(make):
    disk = Disk()
    stream = make(disk, layers=6)
    for index in [2, 5, 3] * 2:
        assert use(stream, index) == index
    wait_for(lambda: stream._slot_of("ready", 2) is not None and stream._slot_of("ready", 5) is not None)
    disk.reads.clear()
    for index in [2, 5, 3] * 2:
        assert use(stream, index) == index
    wait_for(lambda: len(disk.reads) == 6)
    assert disk.reads == [3, 2, 5] * 2  # nothing in vain


@pytest.mark.parametrize("order", [[3, 1], [0, 0, 2], [2, 1, 0, 3], [1, 1, 1], [3, 2, 1, 0] * 3, [0, 1, 0, 1, 2, 3] * 3])
def test_any_order(make, order):
    stream = make(Disk())
    assert [use(stream, index) for index in order] == order


def test_slots_of_different_sizes(make):
    stream = make(Disk(), layers={0: 8, 1: 24, 2: 8, 3: 16}, sizes=(16, 24))
    assert [use(stream, index) for index in [0, 1, 2, 3] * 5] == [0, 1, 2, 3] * 5


def test_a_failure_is_raised_where_the_layer_is_taken_and_tried_again(make):
    disk = Disk()
    disk.fail = {2}
    stream = make(disk)
    assert [use(stream, index) for index in (0, 1)] == [0, 1]
    for _ in range(3):
        with pytest.raises(OSError, match="layer 2"):
            stream.take(2)
    disk.fail = set()
    assert [use(stream, index) for index in (2, 3, 0)] == [2, 3, 0]


def test_a_late_failure_of_another_layer_does_not_stop_the_one_that_is_waited_for(make):
    """A read hangs, the user stops and asks for something else, and only then does the read fail."""
    disk = Disk()
    disk.gate[1] = threading.Event()
    disk.fail = {1}
    stream = make(disk)
    use(stream, 0)
    wait_for(lambda: 1 in disk.reads)
    taken = []
    taker = threading.Thread(target=lambda: taken.append(use(stream, 3)), daemon=True)
    taker.start()
    disk.gate[1].set()
    taker.join(20)
    assert taken == [3]


def test_a_thread_that_python_takes_for_ended_goes_on(make, monkeypatch):
    """Before Python 3.13, an interrupt within `is_alive` has that effect."""
    stream = make(Disk())
    monkeypatch.setattr(stream._thread, "is_alive", lambda: False)
    assert [use(stream, index) for index in (0, 1, 2, 3)] == [0, 1, 2, 3]
    monkeypatch.undo()


def test_close_wakes_whoever_waits(make):
    disk = Disk()
    disk.gate[2] = threading.Event()
    stream = make(disk)
    raised = []

    def take():
        try:
            stream.take(2)
        except AirLLMError as error:
            raised.append(str(error))

    taker = threading.Thread(target=take)
    taker.start()
    wait_for(lambda: 2 in disk.reads)
    closer = threading.Thread(target=stream.close)
    closer.start()
    wait_for(lambda: stream._closed)
    disk.gate[2].set()
    taker.join(20)
    closer.join(20)
    assert "unloaded" in raised[0]
    assert not stream._thread.is_alive()


def test_closed_by_its_own_thread():
    """A listener may do it: it is told there of what is read."""
    stream = None

    def read(index, _slot):
        gc.collect()
        if index == 1:
            stream.close()

    failures = []
    before, threading.excepthook = threading.excepthook, failures.append
    try:
        stream = WeightStream({0: 8, 1: 8}, [Slot(8), Slot(8)], read, lambda: 0.0)
        stream.start()
        stream._thread.join(20)
    finally:
        threading.excepthook = before
    assert not failures
    assert not stream._thread.is_alive()


def test_reset_gives_every_slot_back(make):
    stream = make(Disk())
    stream.take(0)
    stream.take(1)
    assert stream.in_use
    stream.reset()
    assert not stream.in_use
    assert [use(stream, index) for index in range(4)] == [0, 1, 2, 3]
