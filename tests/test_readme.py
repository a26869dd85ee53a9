"""What the README says of versions is what the guards do."""

from refresh_readme import BETWEEN, README, table

from airllm_nb.compat import versions


def test_the_table_of_versions_is_the_one_that_the_guards_use():
    (shown,) = BETWEEN.findall(README.read_text(encoding="utf-8"))
    assert shown == table(), "run: python tests/refresh_readme.py"


def test_the_least_and_the_newest_version_are_said():
    text = README.read_text(encoding="utf-8")
    assert f"transformers {versions.dotted(versions.FLOOR)} or newer" in text
    assert all(version in text for version in versions.TESTED)
