"""The trained demo model and its story, which ship with the package and are used when none is named."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
STORY = Path(__file__).parent / "story.yaml"
LCM_LORA = Path(__file__).parent / "lcm-lora.safetensors"  # of the demo model
LORAS = {"demo-lcm": LCM_LORA}  # by the name that is typed in place of a path
