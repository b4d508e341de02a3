"""Recipes: what they hold, what overrides them, and how mistakes are answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from corpusprep import InputError, SettingsError, load_recipe

GOOD = """\
name = "trial"
seed = 7

[[source]]
format = "opus100"
path = "data/opus"
pairs = ["en-de", "swh_Latn-eng_Latn"]

[[source]]
format = "nllb"
path = "data/nllb"

[[source]]
format = "nllb"
path = "data/more"

[dedup]
max_distance = 2
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_is_read(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert (recipe.name, recipe.seed, recipe.dedup.max_distance) == ("trial", 7, 2)
    assert [source.name for source in recipe.source] == ["opus100", "nllb", "nllb-2"]
    assert recipe.source[0].pairs == ("en-de", "swh_Latn-eng_Latn")


def test_the_keys_of_the_published_recipe_are_known(tmp_path: Path) -> None:
    recipe = load_recipe(Path(__file__).parent.parent / "examples" / "llamax2.toml")
    assert recipe.balance.budget == 800_000_000
    assert recipe.balance.tokenizer == "Qwen/Qwen3-8B"
    assert recipe.quality.scorer == "comet"
    assert recipe.quality.model == "Unbabel/wmt22-cometkiwi-da"
    assert recipe.dedup.max_distance == 3
    assert recipe.dedup.against
    codes = {code for source in recipe.source for pair in source.pairs for code in pair.split("-")}
    assert codes == set("ar bn cs de en es fr hu ja ko ru sr sw te th vi zh".split())


def test_overrides_and_sources_of_the_command_line(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, GOOD),
        overrides=[
            "dedup.max_distance=1",
            "source.1.limit=5",
            "source.3.on_error=keep",
            "balance.budget=1_000",
            "name=two",
        ],
        sources=["tsv=a=b.tsv"],
    )
    assert recipe.dedup.max_distance == 1
    assert recipe.source[1].limit == 5
    assert recipe.balance.budget == 1000
    assert recipe.name == "two"
    assert (recipe.source[3].format, recipe.source[3].path, recipe.source[3].on_error) == ("tsv", "a=b.tsv", "keep")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[clean]\nmax_char = 5", r"line 21: clean\.max_char is not a setting\. Did you mean 'max_chars'\?"),
        ("[qualty]\nscorer = 'comet'", r"line 20: qualty is not a setting\. Did you mean 'quality'\?"),
        ("[clean]\nmax_chars = -5", r"line 21: clean\.max_chars = -5: .*greater than"),
        ("[instruct]\nformat = 'mesages'", r"line 21: instruct\.format = 'mesages'.*did you mean 'messages'"),
        ("[[source]]\nformat = 'opus'\npath = 'x'", r"line 21: source\.3\.format = 'opus'"),
        ("[[source]]\nformat = 'tsv'", r"source\.3\.path is missing"),
        (
            "[[source]]\nformat = 'tsv'\npath = 'x'\npairs = ['english-german']",
            r"source\.3\.pairs.*not a language pair",
        ),
        ("[langid]\nevidence = 'much'", r"line 21: langid\.evidence = 'much'"),
        ("[balance]\nbudget = 5\nenabled = false", "balance.budget is set, but balance.enabled is false"),
        ("[[stage]]\nfunction = 'no colon'", r"stage\.0\.function = 'no colon'"),
    ],
)
def test_a_mistake_is_answered_with_its_place(tmp_path: Path, change: str, message: str) -> None:
    path = write(tmp_path, GOOD + "\n" + change + "\n")
    with pytest.raises(SettingsError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "nam = 1\n[[source]]\nformat = 'tvs'\npath = 'a'\n[dedup]\nmax_distance = 99\n")
    with pytest.raises(SettingsError) as caught:
        load_recipe(path)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("text", ["name = ", "[[source]\n", "a = 1\na = 2\n"])
def test_what_is_not_toml(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="is not TOML"):
        load_recipe(write(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_recipe(tmp_path / "missing.toml")
    with pytest.raises(InputError, match="directory"):
        load_recipe(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    with pytest.raises(InputError, match="UTF-8"):
        load_recipe(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    "override", ["dedup", "=3", "dedup.=3", "dedup.max_distance.x=1", "source.limit=1", "source.9.limit=1", "name.x=2"]
)
def test_overrides_that_lead_nowhere(tmp_path: Path, override: str) -> None:
    with pytest.raises(SettingsError):
        load_recipe(write(tmp_path, GOOD), overrides=[override])


def test_no_source_and_names_that_clash(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="has no source"):
        load_recipe(None)
    twice = "[[source]]\nformat='tsv'\npath='a'\nname='x'\n" * 2
    with pytest.raises(SettingsError, match="same name"):
        load_recipe(write(tmp_path, twice))
    with pytest.raises(SettingsError, match="format=path"):
        load_recipe(None, sources=["data/opus"])
