"""What a list of the engine's events says, for tests of many prompts."""

from airllm_nb.events import BatchBegin, LayerRead, LayerReady, PassBegin


def not_read(events):
    """All but what comes from the reading thread, which may still be at work for the pass before."""
    return [event for event in events if type(event) not in (LayerRead, LayerReady)]


def passes(events):
    return sum(type(event) is PassBegin for event in events)


def batches(events):
    return [event.rows for event in events if type(event) is BatchBegin]
