"""Story folders of ViStoryBench (CVPR 2026) as they are: `story.json`, and pictures of the characters in `image/`."""

from pathlib import Path
from typing import Any, Final

from storyadapter.method.errors import Field, InputError, Text
from storyadapter.method.story_files.document import MAX_BYTES, StoryFile, at, excerpt, kind
from storyadapter.method.story_files.mappings import read_json

STORY_NAME: Final = "story.json"
_PLOT: Final = ("Shot Perspective Design", "Plot Correspondence", "Static Shot Description")
_SCENE: Final = "Setting Description"
_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
MAX_PICTURES: Final = 32  # of a frame
_ON_STAGE: Final = "Characters Appearing"


def read_vistorybench(folder: Path, data: bytes, language: str) -> StoryFile:
    """A story of the benchmark. A frame's prompt is put together as the benchmark's own code does it for this method:
    camera; plot; what is seen; who is on stage, each with a description; scene. Pictures of who is on stage are its
    references.

    Args:
        data: of its `story.json`.
        language: of the texts: "en" or "ch" in the published stories.

    Raises:
        InputError: it isn't such a story, or has no texts in that language.
    """
    name = str(folder / STORY_NAME)
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} is longer than {MAX_BYTES >> 20} MiB", expected="a story of ViStoryBench")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{name} isn't UTF-8", expected="a story of ViStoryBench") from None
    file = read_json(name, text)
    if not isinstance(file.fields, dict) or not isinstance(file.fields.get("Shots"), list):
        found = kind(file.fields) if not isinstance(file.fields, dict) else f"the keys {excerpt([*file.fields][:6])}"
        advice = ("a run's folder is gone on with by ", Field("out"), " and ", Field("resume"))
        raise InputError(f"{name}: found {found},", expected="a story of ViStoryBench, with 'Shots'", advice=advice)
    characters = file.fields.get("Characters")
    prompts, unknown, pictures = list[Any](), dict[str, None](), dict[str, list[str]]()
    for index, shot in enumerate(file.fields["Shots"]):
        where, people = at(name, file.lines["Shots", index]), []
        keys = _names(where, shot, "en")
        for key, named in zip(keys, _names(where, shot, language), strict=False):
            pictures.setdefault(key, _pictures(folder / "image", key))
            character = characters.get(key) if isinstance(characters, dict) else None
            words = character.get(f"prompt_{language}") if isinstance(character, dict) else None
            if isinstance(words, str):
                people.append(f"{named} is {words.strip()}")
            else:
                unknown[key] = None
        parts = [_words(where, shot, key, language) for key in _PLOT]
        parts += [";".join(people), _words(where, shot, _SCENE, language)]
        prompt = "".join(f"{part};" for part in parts if part)
        references = [path for key in keys for path in pictures.get(key, ())][:MAX_PICTURES]
        prompts.append({"prompt": prompt, "references": references} if references else prompt)
    lines = {("prompts", index): file.lines["Shots", index] for index in range(len(prompts))}
    notices: list[Text] = []
    if unknown:
        names = ", ".join(excerpt(key, 30) for key in [*unknown][:10])
        notices.append(f"{name}: on stage without a description in {language!r}, and left out: {names}")
    return StoryFile(name, {"prompts": prompts}, lines, tuple(notices))


def _pictures(folder: Path, name: str) -> list[str]:
    """Of a character, in the order of their names; none where they have no folder."""
    if Path(name).name != name or name == "..":
        return []
    try:
        files = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in _SUFFIXES)
    except (OSError, ValueError):  # a zero byte
        return []
    return [str(path.absolute()) for path in files[:MAX_PICTURES]]


def _value(where: str, holder: Any, key: str, language: str) -> Any:
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(value, dict) or language not in value:
        found = f"no text in {language!r}" if isinstance(value, dict) else "nothing"
        there = f"{', '.join(map(repr, value))}" if isinstance(value, dict) and value else "a text per language"
        raise InputError(f"{where}{found} under {key!r},", expected=there, field="language")
    return value[language]


def _words(where: str, shot: Any, key: str, language: str) -> str:
    value = _value(where, shot, key, language)
    if not isinstance(value, str):
        raise InputError(f"{where}{key!r} is {kind(value)},", expected="text")
    return value.strip()


def _names(where: str, shot: Any, language: str) -> list[str]:
    value = _value(where, shot, _ON_STAGE, language)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(f"{where}{_ON_STAGE!r} is {kind(value)},", expected="a list of names")
    return [item.strip() for item in value]
