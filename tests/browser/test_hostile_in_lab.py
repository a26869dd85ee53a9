"""A model whose name, tokens and errors are HTML that acts, in a real JupyterLab: it is shown as text, and nothing acts."""

import json
import shutil
from pathlib import Path

from frontends import write_notebook

IMAGE = "<img src=x onerror=window.hacked=1>"
SCRIPT = "<script>window.hacked=2</script>"
LINK = "<a href=javascript:window.hacked=3>press</a>"
THEIRS = """() => [...document.querySelectorAll('img[src=x], [onerror], a[href^="javascript:window"], .jp-OutputArea script')]
    .map(element => element.outerHTML)"""
CELLS = [
    """%load_ext airllm_nb
import json
folder, bad, image, script = json.load(open('names.json'))
%airllm load {folder} --device cpu --dtype float32""",
    f"%%airllm --max-new-tokens 6 --lens -o answer\n{SCRIPT} {IMAGE}",
    "%airllm status\n%airllm plan {folder}\nprint(answer.text)\nanswer",
    "prompts = [image, script]\n%airllm map prompts --max-new-tokens 4 --system {image}",
    """session = get_ipython().magics_manager.registry['AirLLMMagics'].session
session.model.trace(image + script, max_new_tokens=3, heads=[(0, 0)])""",
    "%airllm load {bad}",
    "%airllm load {folder} --memory {image}",
    "%airllm map {image}.txt",
    "%airllm",
    "panel.chooser.model.value = bad\nsaid = session.chat(script + image, max_new_tokens=6, system=image)",
]


def hostile(folder, tokens):
    """Make a model's tokens, and its folder's name, hostile."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    content["model"]["vocab"] = {
        word if number < 128 or number > 255 else tokens[number % 3].replace("hacked=", f"hacked={number}"): number
        for word, number in words.items()
    }
    path.write_text(json.dumps(content))


def test_hostile_strings_stay_text(lab, checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint("llama", tokenizer=True, max_position_embeddings=4096), tmp_path / IMAGE))
    hostile(folder, [IMAGE, SCRIPT, LINK])
    bad = Path(shutil.copytree(folder, tmp_path / f"bad {SCRIPT.replace('/', '')}"))
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {"model_type": IMAGE, "architectures": [SCRIPT]}))
    names = tmp_path / "names.json"
    names.write_text(json.dumps([str(folder), str(bad), IMAGE, SCRIPT]))
    cells = [cell.replace("'names.json'", repr(str(names))) for cell in CELLS]
    notebook = lab(write_notebook(tmp_path / "hostile.ipynb", *cells))
    page, dialogs = notebook.page, []

    def answer(dialog):
        if dialog.type != "beforeunload":  # Lab's own
            dialogs.append(dialog.message)
        dialog.accept()

    page.on("dialog", answer)
    shown = [notebook.run(index) for index in range(len(cells))]
    page.locator(".airllm-panel .airllm-assistant").first.wait_for()

    def nothing_acts():
        page.wait_for_timeout(500)  # for what would be fetched first
        assert page.evaluate(THEIRS) == []
        assert page.evaluate("window.hacked") is None
        assert not dialogs
        assert not notebook.strangers

    nothing_acts()
    assert any(f"hacked={number}" in shown[2] for number in range(128, 256)), shown[2]  # the text is hostile
    for index, expected in ((0, IMAGE), (2, IMAGE), (3, SCRIPT), (5, IMAGE), (6, IMAGE), (7, IMAGE[:12])):  # shortened
        assert expected in shown[index], (index, shown[index])
    assert SCRIPT in page.locator(".airllm-panel .airllm-user").first.inner_text()
    notebook.screenshot("hostile", 8)
    notebook.save()
    notebook.reopen()
    nothing_acts()
