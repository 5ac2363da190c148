"""What a client may ask for, checked: requests become stories and plans."""

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, StringConstraints

from storyadapter.method import constants
from storyadapter.method.control import ControlSettings
from storyadapter.method.control_pictures import read_controls
from storyadapter.method.errors import InputError
from storyadapter.method.plan import RunPlan
from storyadapter.method.presets import PRESETS, check_preset, with_preset
from storyadapter.method.story import Story
from storyadapter.method.story_parts import MAX_REFERENCES
from storyadapter.runtime.pipeline import Pipeline
from storyadapter.serve.limits import Limits
from storyadapter.serve.queue import Priority
from storyadapter.serve.uploads import ID

_MOST_IMAGES: Final = 10
_Size = Annotated[str, StringConstraints(pattern=r"^(auto|\d{2,5}x\d{2,5})$")]


def _settings() -> dict[str, Any]:
    """Those of a plan, each of which may be left out, and `iterations` beside `scales`."""
    found: dict[str, Any] = {
        "iterations": (int | None, pydantic.Field(None, ge=0, description="after the text-only one; or give scales"))
    }
    for setting in fields(RunPlan):
        choices = setting.metadata.get("choices")
        kind: Any = Literal[choices] if choices else list[float] if setting.name == "scales" else setting.type
        if setting.metadata.get("typed", True):
            found[setting.name] = (kind | None, pydantic.Field(None, description=setting.metadata["help"]))
    found["controls"] = (
        list[ControlSettings] | None,
        pydantic.Field(None, description="how each ControlNet of the model is used"),
    )
    found["preset"] = (
        Literal[tuple(PRESETS)] | None,
        pydantic.Field(None, description="settings by one word; what is said beside it wins"),
    )
    del found["max_frames"]  # the server's own business
    return found


if TYPE_CHECKING:
    Settings = BaseModel
else:
    Settings = pydantic.create_model("Settings", __config__=ConfigDict(extra="forbid"), **_settings())


class _Request(BaseModel):
    """A body whose texts can be written again."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _no_surrogates(cls, body: Any) -> Any:
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a text holds U+{ord(error.object[error.start]):04X}, which is no character") from None
        return body


def _plan(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> RunPlan:
    """`defaults`: of the server, its preset among them. Raises InputError."""
    own = {name: value for name, value in defaults.items() if name != "preset"}
    asked = {name: value for name, value in given.items() if name != "preset"}
    return RunPlan(**{**own, **with_preset(given.get("preset", defaults.get("preset")), asked)})


_Upload = Annotated[str, StringConstraints(pattern=ID)]
_References = Annotated[
    list[_Upload],
    pydantic.Field(default_factory=list, description="ids of uploads that it attends to", max_length=MAX_REFERENCES),
]
_Control = Annotated[
    _Upload | list[_Upload | None] | None,
    pydantic.Field(description="the id of an upload for the ControlNet, or a list with one for each, null for none"),
]


class FrameRequest(BaseModel):
    """A frame with what is its own."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    negative: str | None = pydantic.Field(None, description="what it must not show")
    seed: int | None = None
    control: _Control = None
    references: _References


class CharacterRequest(BaseModel):
    """A character: what takes the place of its name, pictures of it, or both."""

    model_config = ConfigDict(extra="forbid")

    definition: str | None = None
    references: _References


class StoryRequest(_Request):
    """A story as in a story file, its settings, and how urgent it is."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[str | FrameRequest] = pydantic.Field(min_length=1, description="one per frame")
    title: str | None = None
    style: str | None = pydantic.Field(None, description=f"one of {', '.join(constants.STYLES)}")
    characters: dict[str, str | CharacterRequest] = pydantic.Field(
        default_factory=dict, description="name: definition, or a definition and references"
    )
    settings: Settings = pydantic.Field(default_factory=Settings)
    priority: Priority = pydantic.Field("interactive", description="interactive stories come before those of a batch")

    def story(self) -> Story:
        """Raises InputError."""
        named = self.model_dump(include={"prompts", "title", "style", "characters"}, exclude_none=True)
        return pydantic.TypeAdapter(Story).validate_python(named)

    def plan(self, defaults: Mapping[str, Any]) -> RunPlan:
        """`defaults`: of the server. Raises InputError."""
        given = self.settings.model_dump(exclude_none=True)
        iterations, scales = given.pop("iterations", None), given.get("scales")
        if scales is None and iterations is not None:
            given["scales"] = constants.reference_scales(iterations)
        elif scales is not None and iterations not in (None, len(scales)):
            found = f"iterations: {iterations} beside {len(scales)} scales"
            raise InputError(found, expected="one of them", field="settings.iterations")
        return _plan(given | ({"scales": tuple(given["scales"])} if "scales" in given else {}), defaults)

    def digest(self) -> str:
        """Of equal requests equal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class FrameChange(BaseModel):
    """What is new of a frame; null takes away what is its own, and what isn't named stays."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = pydantic.Field(default_factory=str)
    negative: str | None = None
    seed: int | None = None
    control: _Control = None


class EditRequest(_Request):
    """Frames of a finished story that are drawn again, in every iteration, beside all others as they are."""

    model_config = ConfigDict(extra="forbid")

    frames: dict[Annotated[int, pydantic.Field(ge=0, le=2**31)], FrameChange] = pydantic.Field(
        min_length=1, description="number, counted from 0: what is new of it"
    )
    follow: bool = pydantic.Field(
        False, description="whether the other frames follow: every iteration after the first is drawn again whole"
    )
    priority: Priority = "interactive"

    def changes(self) -> dict[int, dict[str, Any]]:
        """As `Story.edited` takes them."""
        return {number: change.model_dump(exclude_unset=True) for number, change in self.frames.items()}


class ImagesRequest(_Request):
    """As OpenAI's images API; what it has besides is taken and means nothing here."""

    model_config = ConfigDict(extra="ignore")

    prompt: str
    n: int = pydantic.Field(1, ge=1, le=_MOST_IMAGES)
    size: _Size | None = pydantic.Field(None, description="such as 1024x1024, or auto")
    response_format: Literal["b64_json"] | None = None
    seed: int | None = pydantic.Field(None, ge=0, le=2**32, description="of the first picture; the others follow")
    preset: Literal[tuple(PRESETS)] | None = None  # type: ignore[valid-type]
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    prompt_chunks: Literal["auto", "1"] | None = None

    def stories(self, defaults: Mapping[str, Any]) -> list[tuple[Story, RunPlan]]:
        """One of a single frame for each picture; `defaults`: of the server. Raises InputError."""
        story = Story.from_prompts([self.prompt])
        asked: dict[str, Any] = {}
        if self.size and self.size != "auto":
            asked["width"], asked["height"] = map(int, self.size.split("x"))
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        settings = ("preset", "steps", "guidance", "negative_prompt", "prompt_chunks")
        more = {name: value for name in settings if (value := getattr(self, name)) is not None}
        return [
            (story, _plan({**asked, **more, "scales": (), "seed": seed + number}, defaults)) for number in range(self.n)
        ]


def check(story: Story, plan: RunPlan, pipeline: Pipeline, limits: Limits, preset: str | None = None) -> None:
    """Whether a story can be drawn; reads its pictures.

    Raises:
        InputError: more than this server allows, or than its engine can; a preset for another kind of UNet; or pictures
            that don't fit the model's ControlNets.
    """
    check_preset(preset, pipeline.sampling.embeds_guidance)
    height, width = plan.size
    for name, asked, allowed in (
        ("prompts", len(story.frames), limits.limit_frames),
        ("iterations", len(plan.scales), limits.limit_iterations),
        ("steps", max(map(plan.steps_in, range(plan.iterations))), limits.limit_steps),
        ("height", height, limits.limit_pixels),
        ("width", width, limits.limit_pixels),
    ):
        if asked > allowed:
            raise InputError(f"{name}: {asked}", expected=f"{allowed} at most on this server", field=name)
    pipeline.check(story, plan)
    if any(frame.control for frame in story.frames):
        read_controls(story, plan)
