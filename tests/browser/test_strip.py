"""The layer strip in JupyterLab: legible in both themes, wide, narrow and zoomed; screenshots for a person to look at."""

import nbformat
import pytest

CELL = """
import ipywidgets
from airllm_nb.events import *
from airllm_nb.notebook import strip
from airllm_nb.notebook.run_state import RunState

def layers(number, stay):
    return tuple(LayerInfo(i, f"model.layers.{i}", 436_000_000, i % number < stay) for i in range(number))

def passes(state, begun, number, waited, at=0.0):
    for index in range(begun):
        state.apply(PassBegin(index, 9 if index == 0 else 1, "decode", at=at))
        for layer in state.layers[: number if index == begun - 1 else None]:
            info = layer.info
            if not info.resident:
                state.apply(LayerRead(info.index, info.name, info.nbytes, at=at))
                state.apply(LayerReady(info.index, info.name, info.nbytes, 0.22, "disk", at=at))
            state.apply(ComputeBegin(info.index, info.name, info.nbytes, "disk", 0.0 if info.resident else waited, at=at))
            at += 0.03 if info.resident else 0.03 + waited
            state.apply(ComputeEnd(info.index, info.name, info.nbytes, 0.03, "disk", at=at))
        if index < begun - 1:
            state.apply(PassEnd(index, 1, 1.0, completed=True, at=at))
            at += 0.02
    return state

def run(number, stay, begun, wanted=64, left=10**11):
    state = passes(RunState("Meta-Llama-3.1", layers(number, stay), wanted, left), begun, number // 2, 0.2)
    if not all(layer.info.resident for layer in state.layers):
        for index in range(number // 2 + 1, number // 2 + 4):
            info = state.layers[index].info
            if not info.resident:
                event = LayerReady(index, info.name, info.nbytes, 0.22, "disk", at=state.now)
                state.apply(LayerRead(index, info.name, info.nbytes, at=state.now) if index == number // 2 + 3 else event)
    info = state.layers[number // 2].info
    state.apply(ComputeBegin(info.index, info.name, info.nbytes, "disk", 0.0, at=state.now))
    return state

loading = RunState("Meta-Llama-3.1")
loading.apply(LoadBegin("Meta-Llama-3.1", "cpu", "bfloat16", layers(32, 20), at=0.0))
for index in range(7):
    loading.apply(LayerReady(index, "", 436_000_000, 0.2, "disk", at=index + 1.0))
loading.apply(LayerRead(7, "", 436_000_000, at=8.0))
fetching = RunState("meta-llama/Meta-Llama-3.1-8B")
for seconds in (0.0, 30.0):
    for index, part in enumerate((1, 1, 0.4, 0)):
        name = f"model-0000{index + 1}-of-00004.safetensors"
        fetching.apply(Fetching(f"Downloading {name}", name, int(part * 4_976_698_672), 4_976_698_672, at=seconds))
ended = run(32, 20, 6)
ended.end("interrupted")
ended.note = "Memory is short: 3 layers that stayed stream from now on."
pictures = [strip.render(state) for state in (
    fetching, loading, run(32, 20, 1), run(32, 20, 6), run(48, 48, 6), run(80, 30, 6, left=2 * 10**9), run(126, 0, 1), ended,
)] + [strip.render_layers(layers(32, 20))]
ipywidgets.VBox([ipywidgets.HTML(strip.STYLE), *map(ipywidgets.HTML, pictures)])
"""

CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = element => element ? over(rgba(getComputedStyle(element).backgroundColor), ground(element.parentElement))
    : [255, 255, 255, 1];
  const found = [];
  for (const element of document.querySelectorAll('.jp-OutputArea .airllm *')) {
    const text = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('').trim();
    if (!text || element.tagName === 'PROGRESS') continue;
    const style = getComputedStyle(element), under = ground(element), colour = rgba(style.color);
    colour[3] *= parseFloat(style.opacity);
    const [a, b] = [light(over(colour, under)), light(under)];
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), element.className || element.tagName, text]);
  }
  return found;
}"""


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_the_strip_is_legible(lab, tmp_path, theme):
    path = tmp_path / "strip.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)]), path)
    notebook = lab(path, theme)
    notebook.start(0)
    notebook.wait(0)
    notebook.page.wait_for_function("document.querySelectorAll('.jp-OutputArea .airllm').length == 9")
    notebook.page.evaluate("document.querySelector('.jp-InputArea').style.display = 'none'")
    ratios = notebook.page.evaluate(CONTRAST)
    assert len(ratios) > 300
    assert not [found for found in ratios if found[0] < 4.5]
    for name, width, height in (("wide", 1000, 2000), ("narrow", 800, 2100), ("zoom", 500, 2700)):
        notebook.page.set_viewport_size({"width": width, "height": height})
        notebook.page.wait_for_timeout(500)
        sideways = (
            "Array.from(document.querySelectorAll('.jp-OutputArea .airllm')).filter(e => e.scrollWidth > e.clientWidth).length"
        )
        assert notebook.page.evaluate(sideways) == 0
        notebook.screenshot(f"strip-{name}-{theme.lower()}", 0)
