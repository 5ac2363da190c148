"""What is done with a story but drawing it: `story check`, `story schema`, `book`."""

import argparse
import json

from storyadapter.cli.commands import DEFAULT_STYLE
from storyadapter.cli.options import model_choice, option, run_plan
from storyadapter.cli.printing import one_line, print_result
from storyadapter.cli.reporting import count, truncation_in_words
from storyadapter.method.constants import PIXEL_MULTIPLE, TEXT_TOKENS
from storyadapter.method.errors import Text, spelled
from storyadapter.method.story import Story, story_schema
from storyadapter.method.story_notices import story_notices
from storyadapter.method.story_parts import check_style


def check(args: argparse.Namespace) -> int:
    """Print what would be drawn of a story; reads of the model no more than headers and tokenizers.

    Raises:
        InputError: the story can't be drawn as typed, or the model isn't whole.
    """
    notices: list[Text] = []
    story = Story.from_arguments(args.story, language=args.language, on_notice=notices.append)
    style = check_style(args.style or story.style or DEFAULT_STYLE)
    plan = run_plan(args, PIXEL_MULTIPLE, args.seed or 0)
    model = model_choice(args)

    from storyadapter.checkpoint import Checkpoint
    from storyadapter.runtime.conditioning import Tokenizers
    from storyadapter.runtime.given_pictures import pictures_of_frames
    from storyadapter.runtime.story_jobs import in_chunks, most_chunks, truncated

    tokenizers = Tokenizers(*Checkpoint.open(model.paths).load_tokenizers())
    final, pictures = story.final_frames(plan, style), pictures_of_frames(story)
    lines = [f"{count(len(final), 'frame')}, style {style}, tokens of {model.label}"]
    final = in_chunks(final, plan, tokenizers)
    cut = plan.prompt_chunks == "1"
    frames = zip(final, story.frames, story.characters_found(), pictures, strict=True)
    for number, (frame, given, found, of_frame) in enumerate(frames):
        tokens = tokenizers.count(frame.prompt)
        read = f" of {TEXT_TOKENS} tokens" if cut else f" tokens in {count(frame.chunks, 'chunk')}"
        about = [f"{tokens}{read}"]
        about += [f"characters {', '.join(found)}"] if found else []
        about += [] if given.seed is None else [f"seed {given.seed}"]
        about += [f"control {', '.join(path or 'none' for path in given.control)}"] if given.control else []
        about += [f"{count(len(of_frame), 'reference picture')}"] if of_frame else []
        lines += [f"frame {number}: {'; '.join(about)}", f"  {frame.prompt}"]
        if given.negative is not None and plan.guided:
            lines.append(f"  negative prompt: {given.negative or 'none'}")
    notices += [*story_notices(story), *map(truncation_in_words, truncated(final, plan, tokenizers))]
    if (chunks := most_chunks(final)) > 1:
        lines.append(f"texts of {chunks} chunks need an engine of build --max-prompt-chunks {chunks}, or backend eager")
    lines += [f"warning: {spelled(notice, option)}" for notice in notices]
    steps = " or ".join(dict.fromkeys(count(plan.steps_in(number), "step") for number in range(plan.iterations)))
    lines.append(
        f"{count(plan.iterations, 'iteration')} of {steps}, "
        f"{'guided' if plan.guided else 'unguided'}: {plan.unet_rows(len(final)):,} UNet rows"
    )
    print_result("\n".join(map(one_line, lines)))
    return 0


def schema(args: argparse.Namespace) -> int:
    """Print the JSON Schema of story files."""
    print_result(json.dumps(story_schema(), indent=2, ensure_ascii=False))
    return 0


def book(args: argparse.Namespace) -> int:
    """Make one file of a finished run.

    Raises:
        InputError: the folder holds no finished run, or the font isn't one.
        RunError: no space is left, or a picture doesn't open any more.
    """
    from storyadapter.cli.printing import tell
    from storyadapter.output.book import Book
    from storyadapter.output.lettering import Lettering

    lettering = Lettering(args.font)
    found = Book.read(args.folder)
    path = found.write(args.format, lettering)
    drawn = args.format != "html"  # there the browser has the fonts
    if drawn and (notice := lettering.notice((*found.captions, found.title or ""))):
        tell(f"warning: {spelled(notice, option)}")
    print_result(f"{path} ({count(len(found.captions), 'page')})")
    return 0
