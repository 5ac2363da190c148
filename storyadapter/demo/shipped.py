"""The model that is used when none is named: the trained demo model that ships with the package."""

from pathlib import Path

from storyadapter.engine.user_cache import user_cache

MODEL = Path(__file__).parent / "model"
STORY = Path(__file__).parent / "story.yaml"


def demo_model() -> tuple[Path, str]:
    """The model's folder, and how it is called in the output.

    Until a trained one is shipped: a seeded tiny SDXL of random weights, made on the spot.
    """
    if (MODEL / "model_index.json").exists():
        return MODEL, "the demo model"
    folder = user_cache() / "random-demo-model"
    if not (folder / "model_index.json").exists():
        from storyadapter.demo.networks import write_random_model

        write_random_model(folder, seed=0)
    return folder, "a tiny SDXL of random weights (it draws noise)"
