"""The settings as `corpusprep settings` prints them."""

from __future__ import annotations

from click.testing import CliRunner

from corpusprep.cli import cli
from corpusprep.commands.settings import describe_settings
from corpusprep.commands.stage import STAGES
from corpusprep.errors import SettingsError


def test_settings_are_described() -> None:
    text = describe_settings(None)
    for name in STAGES:
        assert f"[{name}]" in text
    assert "max_distance = 3" in describe_settings("dedup")
    for name, setting in (("source", "path ="), ("stage", "function ="), ("rejects", "text ="), ("train", "model =")):
        assert setting in describe_settings(name)
        assert CliRunner().invoke(cli, ["settings", name]).output.strip() == describe_settings(name)
    assert "seed = 1" in text.split("[[source]]")[0]
    refused = CliRunner().invoke(cli, ["settings", "cleen"])
    assert refused.exit_code != 0
    assert isinstance(refused.exception, SettingsError)
    assert "clean" in str(refused.exception)
    for line, following in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        if " = " in line and line.startswith("  ") and not line.startswith("      "):
            assert following.strip(), line
