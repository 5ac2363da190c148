"""Canny's edges, as ControlNets for them were trained on: those of OpenCV's `Canny(grey, 100, 200)`.

Source: J. Canny, A Computational Approach to Edge Detection (1986); gradients by Sobel's 3x3 operator, their size as
|gx| + |gy|, no smoothing before.
"""

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from PIL import Image

LOW: Final = 100
HIGH: Final = 200
_TAN_22: Final = 13573  # of 22.5°, times 2^15


def canny(picture: "Image.Image") -> "Image.Image":
    """White edges on black, of the same size, as RGB."""
    import numpy as np
    from PIL import Image

    grey = np.pad(np.asarray(picture.convert("L"), dtype=np.int32), 1, mode="edge")
    rows = grey[:-2] + 2 * grey[1:-1] + grey[2:]
    columns = grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]
    gx, gy = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]
    size = np.abs(gx) + np.abs(gy)
    edges = _connected(np.where(_is_ridge(gx, gy, size), size, 0))
    return Image.fromarray(np.where(edges, 255, 0).astype(np.uint8)).convert("RGB")


def _is_ridge(gx: Any, gy: Any, size: Any) -> Any:
    """Where a gradient is the largest across the edge: compared with both neighbours in its own direction."""
    import numpy as np

    around = np.pad(size, 1)

    def shifted(down: int, right: int) -> Any:
        height, width = size.shape
        return around[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    x, y = np.abs(gx), np.abs(gy)
    flat, steep = (y << 15) < x * _TAN_22, (y << 15) > x * (_TAN_22 + (2 << 15))
    falling = (gx ^ gy) < 0  # a diagonal from below left to above right
    horizontal = (size > shifted(0, -1)) & (size >= shifted(0, 1))
    vertical = (size > shifted(-1, 0)) & (size >= shifted(1, 0))
    diagonal = np.where(
        falling,
        (size > shifted(-1, 1)) & (size > shifted(1, -1)),
        (size > shifted(-1, -1)) & (size > shifted(1, 1)),
    )
    return np.where(flat, horizontal, np.where(steep, vertical, diagonal))


def _connected(size: Any) -> Any:
    """Ridges above the lower threshold that hang together with one above the higher."""
    import numpy as np

    width = size.shape[1] + 2
    weak, edges = np.pad(size > LOW, 1).ravel(), np.zeros((size.shape[0] + 2) * width, dtype=bool)
    steps = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    found = np.flatnonzero(np.pad(size > HIGH, 1).ravel())
    while len(found):
        edges[found] = True
        around = np.unique((found[:, None] + steps).ravel())
        found = around[weak[around] & ~edges[around]]
    return edges.reshape(-1, width)[1:-1, 1:-1]
