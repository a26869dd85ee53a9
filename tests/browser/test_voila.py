"""A notebook as an app: Voila shows what its cells show, and no cell."""

import frontends
import pages
import pytest

from airllm_nb.demo import demo_path

BESIDE = "https://cdn.jsdelivr.net/npm/@fortawesome/"  # icons that Voila's own template asks for
CELLS = (
    "%load_ext airllm_nb\n%airllm load demo --device cpu --dtype float32",
    "%%airllm --max-new-tokens 12\nWhat is the capital of France?",
    """import ipywidgets
button, place = ipywidgets.Button(description="Ask"), ipywidgets.Output()

@button.on_click
def ask(_):
    with place:
        get_ipython().run_cell_magic("airllm", "--max-new-tokens 12", "What is the capital of Japan?")

display(button, place)""",
)


@pytest.mark.parametrize("theme", pages.THEMES)
def test_app(serve, window, tmp_path, theme):
    """The page comes when its cells have run; what a click then starts moves."""
    demo_path()
    frontends.write_notebook(tmp_path / "app.ipynb", *CELLS)
    server = serve(frontends.voila(tmp_path, theme))
    app = pages.App(window(), server.url, "app.ipynb", f"?token={frontends.TOKEN}")
    app.watch("Paris")  # each piece of the text is on a line of its own, from us as from print: Voila's way
    strips, button = app.page.locator(".airllm-strip"), app.page.get_by_role("button", name="Ask")
    strips.nth(1).wait_for()
    button.click()
    pictures = app.watch("The capital of Japan is Tokyo.")
    assert len(pictures) > 2, "the strip does not move"
    assert any("computing" in picture for picture in pictures)
    app.screenshot(f"voila-{theme.lower()}")
    assert strips.count() == 3
    assert not app.page.locator(".jp-InputArea-editor").count()
    assert not [stranger for stranger in app.strangers if not stranger.startswith(BESIDE)]
