"""Draw a story and keep its pictures: `python examples/draw_story.py OUT` (the demo model, without an engine).

With your own model, open it so; `storyadapter-trt build` makes the engine that the error asks for:

    adapter = Path("models/sdxl_models")
    storyadapter.open("models/sdxl", adapter / "image_encoder", adapter / "ip-adapter_sdxl.safetensors")
"""

import argparse
from pathlib import Path

import storyadapter
from storyadapter import FrameFinished, IterationFinished, RunPlan, Story


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a story with the demo model.")
    parser.add_argument("out", type=Path, help="a folder for the pictures")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    pipeline = storyadapter.open(backend="eager")
    story = Story.from_prompts(["a red fox is reading a book in the forest", "a red fox is sleeping on the beach"])
    plan = RunPlan(seed=7, steps=arguments.steps, scales=(0.3, 0.5))  # two rounds after the first
    for event in pipeline.run(story, plan):
        match event:
            case FrameFinished():
                event.picture.save(arguments.out / f"round-{event.iteration}-frame-{event.frame}.png")
            case IterationFinished():
                print(f"round {event.iteration} is drawn")


if __name__ == "__main__":
    main()
