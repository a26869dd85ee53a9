"""What the README says of versions is what the guards do, and it leads to every notebook."""

import json
import re

import pytest
from refresh_readme import BETWEEN, README, READMES, table

from airllm_nb.compat import versions

NOTEBOOKS = sorted(README.parent.glob("notebooks/*.ipynb"))
COLAB = "https://colab.research.google.com/github/airllm-nb/airllm_nb/blob/main/notebooks"


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_the_table_of_versions_is_the_one_that_the_guards_use(path):
    (shown,) = BETWEEN.findall(path.read_text(encoding="utf-8"))
    assert shown == table(READMES[path]), "run: python tests/refresh_readme.py"


def test_the_least_and_the_newest_version_are_said():
    text = README.read_text(encoding="utf-8")
    assert f"transformers {versions.dotted(versions.FLOOR)} or newer" in text
    assert all(version in text for version in versions.TESTED)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_notebook_is_reached_from_the_readme_and_opens_in_colab(notebook):
    (row,) = re.findall(rf"^\| \[{notebook.stem}\].*$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert f"(notebooks/{notebook.name})" in row
    assert f"({COLAB}/{notebook.name})" in row
    first = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
    assert f"({COLAB}/{notebook.name})" in first
