"""A user's pictures: any of the usual formats, opened within bounds, upright, as RGB."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Final

from storyadapter.method.errors import InputError, Text, said

if TYPE_CHECKING:
    from PIL import Image

MAX_SIDE: Final = 10_000  # pixels
MAX_PIXELS: Final = 80_000_000
# whose decoders are kept and start no other programs
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def read_picture_file(file: Path | bytes, what: Text, background: str) -> "Image.Image":
    """A picture as RGB: turned as its EXIF says, what is transparent over a background, 16 bits to 8.

    Args:
        file: its path, or what it holds.
        what: the start of an error's text: what the picture is.
        background: a colour's name.

    Raises:
        InputError: it isn't there, isn't a picture, isn't whole, or is too large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    expected = f"a picture ({', '.join(_FORMATS)})"
    path = file if isinstance(file, Path) else None
    name = f" {path}" if path else ""
    try:
        if path and not (path.is_file() or path.is_dir()) and path.exists():  # reading a pipe or a device may never end
            raise InputError(what, f"{name} is no regular file", expected=expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large ones are refused below
            opened = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS)
        with opened as image:
            width, height = image.size
            if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
                limits = f"at most {MAX_SIDE:,} a side and {MAX_PIXELS // 10**6} million in all"
                raise InputError(what, f"{name} has {width:,}x{height:,} pixels", expected=limits)
            image.load()
            upright = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError:
        expected = f"at most {MAX_PIXELS // 10**6} million"
        raise InputError(what, f"{name} has far too many pixels", expected=expected) from None
    except FileNotFoundError:
        raise InputError(what, f"{name}: there is no such file", expected=expected) from None
    except UnidentifiedImageError:
        raise InputError(what, f"{name} is no picture that can be read", expected=expected) from None
    except InputError:
        raise
    except Exception as error:  # whatever damaged bytes lead a decoder to
        raise InputError(what, f"{name} can't be read: {said(error)}", expected=expected) from error
    return as_seen(upright, background)


def as_seen(image: "Image.Image", background: str) -> "Image.Image":
    """A picture as RGB with 8 bits, what is transparent over a background."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits, as depth maps have; Pillow would cut them off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        over = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(over, image.convert("RGBA"))
    return image.convert("RGB")
