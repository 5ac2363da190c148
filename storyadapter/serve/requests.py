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
from storyadapter.method.errors import InputError
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.runtime.pipeline import Pipeline
from storyadapter.serve.limits import Limits
from storyadapter.serve.queue import Priority

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


class FrameRequest(BaseModel):
    """A frame with what is its own."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    negative: str | None = pydantic.Field(None, description="what it must not show")
    seed: int | None = None


class StoryRequest(_Request):
    """A story as in a story file, its settings, and how urgent it is."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[str | FrameRequest] = pydantic.Field(min_length=1, description="one per frame")
    title: str | None = None
    style: str | None = pydantic.Field(None, description=f"one of {', '.join(constants.STYLES)}")
    characters: dict[str, str] = pydantic.Field(default_factory=dict, description="name: definition")
    settings: Settings = pydantic.Field(default_factory=Settings)
    priority: Priority = pydantic.Field("interactive", description="interactive stories come before those of a batch")

    def story(self) -> Story:
        """Raises InputError."""
        named = self.model_dump(include={"prompts", "title", "style", "characters"}, exclude_none=True)
        return pydantic.TypeAdapter(Story).validate_python(named)

    def plan(self, defaults: Mapping[str, Any]) -> RunPlan:
        """`defaults`: of the server. Raises InputError."""
        given = self.settings.model_dump(exclude_none=True)
        iterations = given.pop("iterations", constants.ITERATIONS)
        given.setdefault("scales", constants.reference_scales(iterations))
        return RunPlan(**{**defaults, **given, "scales": tuple(given["scales"])})

    def digest(self) -> str:
        """Of equal requests equal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class ImagesRequest(_Request):
    """As OpenAI's images API; what it has besides is taken and means nothing here."""

    model_config = ConfigDict(extra="ignore")

    prompt: str
    n: int = pydantic.Field(1, ge=1, le=_MOST_IMAGES)
    size: _Size | None = pydantic.Field(None, description="such as 1024x1024, or auto")
    response_format: Literal["b64_json"] | None = None
    seed: int | None = pydantic.Field(None, ge=0, le=2**32, description="of the first picture; the others follow")
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None

    def stories(self, defaults: Mapping[str, Any]) -> list[tuple[Story, RunPlan]]:
        """One of a single frame for each picture; `defaults`: of the server. Raises InputError."""
        story = Story.from_prompts([self.prompt])
        asked: dict[str, Any] = {}
        if self.size and self.size != "auto":
            asked["width"], asked["height"] = map(int, self.size.split("x"))
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        more = {name: getattr(self, name) for name in ("steps", "guidance", "negative_prompt")}
        more = {name: value for name, value in more.items() if value is not None}
        return [
            (story, RunPlan(**{**defaults, **asked, **more, "scales": (), "seed": seed + number}))
            for number in range(self.n)
        ]


def check(story: Story, plan: RunPlan, pipeline: Pipeline, limits: Limits) -> None:
    """Raises InputError: more than this server allows, or than its engine can."""
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
