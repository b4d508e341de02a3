"""Prompt templates: the built-in set, checks of templates, and the two halves of a template around the text."""

from __future__ import annotations

import re

# Each template states the task in full, so that a model sees many wordings of one request. The text is on separate
# lines: its token boundaries do not change, and no control token can form between the text and the template.
DEFAULT_TEMPLATES: tuple[str, ...] = (
    "Translate the following text from {source_language} to {target_language}.\n\n{text}",
    "Translate this {source_language} text into {target_language}:\n{text}",
    "Please translate the text below from {source_language} into {target_language}.\n{text}",
    "Give the {target_language} translation of this {source_language} text.\n\n{text}",
    "How would you say the following in {target_language}?\n\n{text}",
    "{text}\n\nTranslate the {source_language} text above into {target_language}.",
    "Write this in {target_language}:\n{text}",
    "Source language: {source_language}\nTarget language: {target_language}\nText:\n{text}",
    "You are a translator from {source_language} to {target_language}. Reply with the translation only.\n\n{text}",
    "I need the {target_language} version of this {source_language} passage.\n\n{text}",
    "What does this {source_language} text say? Answer in {target_language} with a faithful translation.\n\n{text}",
    "{source_language} to {target_language} translation.\n{text}",
    "{text}\n\nRender the text above in {target_language}.",
    "Read the {source_language} below and express the same meaning in natural {target_language}.\n\n{text}",
    "Convert the following {source_language} into {target_language}, keeping names and numbers as they are.\n{text}",
    "Translate from {source_language} to {target_language}.\n\n{source_language}:\n{text}\n\n{target_language}:",
)

_SLOT = re.compile(r"\{([A-Za-z_]\w*)\}")
_LANGUAGE_SLOTS = ("source_language", "target_language")


def check_template(template: str) -> None:
    """Rejects a template that cannot be rendered and inverted.

    Raises:
        ValueError: `{text}` does not occur exactly once, `{target_language}` is missing, or a slot is unknown.
    """
    slots = _SLOT.findall(template)
    if slots.count("text") != 1:
        raise ValueError(f"the template {template!r} must contain {{text}} exactly once")
    if "target_language" not in slots:
        raise ValueError(f"the template {template!r} must contain {{target_language}}")
    check_slots(template, ("text", *_LANGUAGE_SLOTS))


def check_slots(text: str, allowed: tuple[str, ...] = _LANGUAGE_SLOTS) -> None:
    """Rejects a text that contains `{name}` for a name that is not a slot.

    Raises:
        ValueError: a slot is unknown.
    """
    for slot in _SLOT.findall(text):
        if slot not in allowed:
            names = ", ".join("{" + name + "}" for name in allowed)
            raise ValueError(f"{{{slot}}} in {text!r} is not a slot: use {names}")


def halves(template: str) -> tuple[str, str]:
    """The parts of the template before and after `{text}`. The text itself is never searched for slots."""
    before, _, after = template.partition("{text}")
    return before, after


def fill(text: str, source_language: str, target_language: str) -> str:
    """Fills the language slots of a text in one pass, so that a name is never read as a slot."""
    names = {"source_language": source_language, "target_language": target_language}
    return _SLOT.sub(lambda match: names.get(match[1], match[0]), text)
