"""What every picture shares whatever its subject: palette, pose, backdrop, clutter, light, JPEG.

A subject is drawn on a transparent layer; `photograph` puts it between a backdrop and some clutter,
lights it, and develops it:

    backdrop -> clutter -> shadow -> subject -> clutter -> light -> 64x64 -> tones -> JPEG

Nothing here knows the class, so colour, contrast, noise and file size say nothing about it. Only
exactly rounded arithmetic touches pixels (integers, + - * /, sqrt): no float sums, no numpy sin or
exp, whose last bits depend on the processor. The subjects are in outdoors.py and indoors.py.
"""

import colorsys
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

IMAGE_PX = 64
OVERSAMPLE = 3
CANVAS_PX = IMAGE_PX * OVERSAMPLE
TONE_ROUNDS = 4
MAX_GAIN = 3.0  # a nearly flat channel is not stretched into a noise picture
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601

Colour = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Pose:
    """Affine map from a subject's own coordinates (about -1..1, y down) to canvas pixels."""

    scale_px: float
    turn_rad: float
    centre_x_px: float
    centre_y_px: float
    stretch: float = 1.0  # width over height
    is_mirrored: bool = False

    def __call__(self, points: list[Point]) -> list[Point]:
        """Return the points on the canvas."""
        cos, sin = math.cos(self.turn_rad), math.sin(self.turn_rad)
        width = self.scale_px * self.stretch * (-1.0 if self.is_mirrored else 1.0)
        out = []
        for x, y in points:
            u, v = x * width, y * self.scale_px
            out.append((self.centre_x_px + u * cos - v * sin, self.centre_y_px + u * sin + v * cos))
        return out


@dataclass(frozen=True)
class Palette:
    """Colours of one picture: backdrop pair, then three that can be told from it and each other."""

    back: tuple[Colour, Colour]
    main: Colour
    second: Colour
    accent: Colour


def luma(colour: Colour) -> float:
    """Return brightness in 0..255."""
    return sum(weight * value for weight, value in zip(LUMA, colour, strict=True))


def shade(colour: Colour, gain: float) -> Colour:
    """Return the colour scaled by `gain`, clipped to 0..255."""
    red, green, blue = (min(255, max(0, int(value * gain))) for value in colour)
    return red, green, blue


def blend(first: Colour, other: Colour, *, frac: float) -> Colour:
    """Return `first` moved the fraction `frac` of the way to `other`."""
    red, green, blue = (int(a + (b - a) * frac) for a, b in zip(first, other, strict=True))
    return red, green, blue


def new_layer() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return a transparent canvas and its pen."""
    layer = Image.new("RGBA", (CANVAS_PX, CANVAS_PX), (0, 0, 0, 0))
    return layer, ImageDraw.Draw(layer)


def draw_colour(rng: np.random.Generator, *, low: float, high: float) -> Colour:
    """Draw any hue and saturation with a luma in [low, high]."""
    hue, saturation = rng.random(), rng.uniform(0.05, 0.7)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, 1.0)
    base = (int(red * 255), int(green * 255), int(blue * 255))
    wanted = rng.uniform(low, high)
    if luma(base) >= wanted:
        return shade(base, wanted / luma(base))
    return blend(base, (255, 255, 255), frac=(wanted - luma(base)) / (255.0 - luma(base)))


def draw_palette(rng: np.random.Generator) -> Palette:
    """Draw a palette; backdrop and subject take the bright and the dark side with equal chance."""
    sides = [(25.0, 95.0), (160.0, 235.0)]
    is_back_dark = rng.random() < 0.5
    (back_low, back_high), (low, high) = sides if is_back_dark else sides[::-1]
    back = draw_colour(rng, low=back_low, high=back_high)
    other = blend(back, draw_colour(rng, low=back_low, high=back_high), frac=rng.uniform(0.3, 1.0))
    second_low = rng.uniform(20.0, 215.0)
    main = draw_colour(rng, low=low, high=high)
    second = draw_colour(rng, low=second_low, high=second_low + 30.0)
    if abs(luma(second) - luma(main)) < 60.0:
        second = shade(main, 0.45) if luma(main) > 127.0 else blend(main, (255,) * 3, frac=0.5)
    return Palette((back, other), main, second, draw_colour(rng, low=40.0, high=220.0))


def draw_pose(
    rng: np.random.Generator,
    *,
    scale_px: tuple[float, float],
    turn_deg: float,
    shift_px: float,
    stretch: tuple[float, float] = (0.85, 1.15),
) -> Pose:
    """Draw a pose; scale and shift are in canvas pixels, OVERSAMPLE to a picture pixel."""
    middle = CANVAS_PX / 2
    return Pose(
        scale_px=rng.uniform(*scale_px),
        turn_rad=math.radians(rng.uniform(-turn_deg, turn_deg)),
        centre_x_px=middle + rng.uniform(-shift_px, shift_px),
        centre_y_px=middle + rng.uniform(-shift_px, shift_px),
        stretch=rng.uniform(*stretch),
        is_mirrored=bool(rng.random() < 0.5),
    )


def smooth_field(rng: np.random.Generator, *, cells: int, low: int, high: int) -> Image.Image:
    """Return a smooth random grey canvas with `cells` x `cells` bumps, values about low..high."""
    grid = rng.integers(low, high + 1, size=(cells, cells), dtype=np.uint8)
    return Image.fromarray(grid).resize((CANVAS_PX, CANVAS_PX), Image.Resampling.BICUBIC)


def draw_tiles(rng: np.random.Generator, mask: Image.Image) -> None:
    """Draw the joints of a brick or tile wall into the mask."""
    draw = ImageDraw.Draw(mask)
    height, width = int(rng.integers(16, 40)), int(rng.integers(30, 70))
    level, offset = int(rng.integers(60, 180)), int(rng.integers(0, 30))
    for row, top in enumerate(range(-offset, CANVAS_PX, height)):
        draw.line([(0, top), (CANVAS_PX, top)], fill=level, width=2)
        start = -offset - (width // 2) * (row % 2)
        for left in range(start, CANVAS_PX, width):
            draw.line([(left, top), (left, top + height)], fill=level, width=2)


def draw_bokeh(rng: np.random.Generator, mask: Image.Image) -> None:
    """Draw out-of-focus discs into the mask."""
    draw = ImageDraw.Draw(mask)
    for _ in range(int(rng.integers(5, 12))):
        x, y = rng.uniform(0, CANVAS_PX, size=2)
        radius = rng.uniform(8, 28)
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=int(rng.integers(40, 180)))


def draw_ground(rng: np.random.Generator, mask: Image.Image) -> None:
    """Draw a floor with a far edge and a few streaks into the mask."""
    draw = ImageDraw.Draw(mask)
    edge = rng.uniform(0.45, 0.9) * CANVAS_PX
    draw.rectangle((0, edge, CANVAS_PX, CANVAS_PX), fill=int(rng.integers(120, 200)))
    for _ in range(int(rng.integers(0, 12))):
        y, x = rng.uniform(edge, CANVAS_PX), rng.uniform(-40, CANVAS_PX)
        end = (x + rng.uniform(10, 60), y)
        draw.line([(x, y), end], fill=int(rng.integers(60, 200)), width=2)


def draw_backdrop(rng: np.random.Generator, palette: Palette) -> Image.Image:
    """Return an RGB canvas between the two backdrop colours: one of five kinds of place."""
    kind = int(rng.integers(5))
    cells = 2 if kind in (0, 2) else int(rng.integers(3, 7))
    mask = smooth_field(rng, cells=cells, low=0, high=130)
    if kind >= 2:
        (draw_ground, draw_tiles, draw_bokeh)[kind - 2](rng, mask)
    mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 4.0)))
    first, other = (Image.new("RGB", mask.size, colour) for colour in palette.back)
    return Image.composite(other, first, mask)


def draw_clutter(
    rng: np.random.Generator, canvas: Image.Image, *, palette: Palette, num: int, size_px: float
) -> None:
    """Scatter `num` small leaves, discs, blocks and twigs over the canvas."""
    draw = ImageDraw.Draw(canvas)
    colours = (*palette.back, palette.main, palette.second, palette.accent)
    for _ in range(num):
        colour = shade(colours[int(rng.integers(5))], rng.uniform(0.6, 1.3))
        x, y = rng.uniform(0, CANVAS_PX, size=2)
        pose = Pose(rng.uniform(0.4, 1.0) * size_px, rng.uniform(0, 2 * math.pi), x, y)
        kind = int(rng.integers(4))
        if kind == 0:
            draw.polygon(pose([(-1, 0), (-0.3, -0.45), (1, 0), (-0.3, 0.45)]), fill=colour)
        elif kind == 1:
            draw.polygon(pose(circle(0.0, 0.0, radius=0.6, num=14)), fill=colour)
        elif kind == 2:
            draw.polygon(pose([(-0.7, -0.4), (0.7, -0.5), (0.6, 0.5), (-0.6, 0.4)]), fill=colour)
        else:
            draw.line(pose([(-1, 0), (0.1, 0.15), (1, -0.2)]), fill=colour, width=4)


def circle(x: float, y: float, *, radius: float, num: int) -> list[Point]:
    """Return `num` points on a circle."""
    angles = [2 * math.pi * i / num for i in range(num)]
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


def cast_shadow(rng: np.random.Generator, canvas: Image.Image, subject: Image.Image) -> Image.Image:
    """Darken the canvas where the shifted, blurred outline of the subject falls."""
    gain = int(rng.uniform(0.0, 0.45) * 256)
    outline = subject.getchannel("A").filter(ImageFilter.GaussianBlur(rng.uniform(2, 6)))
    dx, dy = (int(value) for value in rng.integers(-10, 11, size=2))
    mask = ImageChops.offset(outline, dx, dy).point([value * gain // 256 for value in range(256)])
    return Image.composite(Image.new("RGB", canvas.size), canvas, mask)


def match_tones(image_HWC: np.ndarray, *, mean_C: np.ndarray, std_C: np.ndarray) -> np.ndarray:
    """Return the uint8 picture with about the wanted mean and spread in each channel.

    Clipping undoes part of it, the more the smaller the subject, hence the rounds. Sums are over
    integers, so the result does not depend on the order of addition.
    """
    for _ in range(TONE_ROUNDS):
        pixels_NC = image_HWC.reshape(-1, 3).astype(np.int64)
        num = pixels_NC.shape[0]
        sum_C, square_C = pixels_NC.sum(axis=0), (pixels_NC * pixels_NC).sum(axis=0)
        spread_C = np.sqrt((num * square_C - sum_C * sum_C).astype(np.float64)) / num
        gain_C = np.minimum(MAX_GAIN, std_C / np.maximum(spread_C, 1.0))
        toned_HWC = (image_HWC - sum_C / num) * gain_C + mean_C
        image_HWC = np.clip(np.rint(toned_HWC), 0, 255).astype(np.uint8)
    return image_HWC


def develop(rng: np.random.Generator, canvas: Image.Image) -> Image.Image:
    """Light the canvas from one side, shrink it, set exposure and contrast, add sensor noise."""
    cells, low = int(rng.integers(2, 4)), int(rng.integers(150, 235))
    light = smooth_field(rng, cells=cells, low=low, high=255)
    lit = ImageChops.multiply(canvas, Image.merge("RGB", (light,) * 3))
    small = lit.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS)
    small = small.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.35)))
    mean_C = rng.uniform(95, 160) + rng.uniform(-22, 22, size=3)
    std_C = rng.uniform(46, 60) * rng.uniform(0.8, 1.2, size=3)
    toned_HWC = match_tones(np.asarray(small), mean_C=mean_C, std_C=std_C)
    grain = rng.uniform(1.0, 4.0)
    noise_HWC = rng.uniform(-grain, grain, size=toned_HWC.shape)
    developed_HWC = np.clip(np.rint(toned_HWC + noise_HWC), 0, 255).astype(np.uint8)
    return Image.fromarray(developed_HWC)


def photograph(
    rng: np.random.Generator, subject: Image.Image, palette: Palette
) -> tuple[Image.Image, Box]:
    """Return the 64x64 picture of the RGBA subject and its box (x0, y0, x1, y1), ends included."""
    canvas = draw_backdrop(rng, palette)
    draw_clutter(rng, canvas, palette=palette, num=int(rng.integers(0, 4)), size_px=20)
    canvas = cast_shadow(rng, canvas, subject)
    canvas.paste(subject, mask=subject.getchannel("A"))
    draw_clutter(rng, canvas, palette=palette, num=int(rng.integers(0, 3)), size_px=14)
    box = subject.getbbox()
    assert box is not None, "the subject left the canvas"
    left, top, right, bottom = box
    ends = (left, top, right - 1, bottom - 1)
    x0, y0, x1, y1 = (value // OVERSAMPLE for value in ends)
    return develop(rng, canvas), (x0, y0, x1, y1)


def jpeg_bytes(image: Image.Image, *, quality: int) -> bytes:
    """Return baseline JPEG bytes: 4:2:0 chroma, the standard Huffman tables."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=2, optimize=False, progressive=False)
    return buffer.getvalue()


def encode(image: Image.Image, *, limit_bytes: int) -> bytes:
    """Return the best JPEG of at most `limit_bytes` (or the smallest we allow, quality 20).

    The limit is drawn without looking at the class: busy pictures get coarser, not larger files.
    """
    low, high = 20, 97
    best = jpeg_bytes(image, quality=low)
    while low < high:
        middle = (low + high + 1) // 2
        candidate = jpeg_bytes(image, quality=middle)
        if len(candidate) <= limit_bytes:
            low, best = middle, candidate
        else:
            high = middle - 1
    return best
