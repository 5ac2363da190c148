"""What the image encoder reads of a picture."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from storyadapter.runtime.pictures import clip_pixels


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (256, 256), (96, 640), (1024, 1024)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_are_prepared_as_published(size: tuple[int, int], mode: str) -> None:
    shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    published = CLIPImageProcessorPil()(picture.convert("RGB").resize((256, 256)), return_tensors="pt").pixel_values[0]
    assert torch.equal(clip_pixels(picture), published)
