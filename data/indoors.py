"""The subjects found indoors: comic book, fur coat.

Each drawing function takes a generator and a palette and returns a transparent RGBA canvas with the
subject on it. Shapes are in the subject's own coordinates (about -1..1, y down) and reach the
canvas through a `Pose`. Backdrop, clutter, light and JPEG are in scene.py.
"""

from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw
from scene import (
    Colour,
    Palette,
    Point,
    Pose,
    circle,
    draw_pose,
    new_layer,
    shade,
)


def draw_figure(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, *, pose: Pose, box: tuple[float, ...]
) -> None:
    """Draw a head and shoulders, or a burst, in the middle of a panel."""
    x0, y0, x1, y1 = box
    x, size = x0 + (x1 - x0) * rng.uniform(0.3, 0.7), min(x1 - x0, y1 - y0)
    fill, other = (draw_panel_colour(rng) for _ in range(2))
    if rng.random() < 0.3:
        spikes = circle(x, (y0 + y1) / 2, radius=0.42 * size, num=18)
        inner = circle(x, (y0 + y1) / 2, radius=0.22 * size, num=18)
        star = [spikes[i] if i % 2 else inner[i] for i in range(18)]
        draw.polygon(pose(star), fill=fill, outline=(0, 0, 0))
        return
    head = y1 - 0.5 * size
    body = [(x - 0.3 * size, y1), (x - 0.2 * size, y1 - 0.27 * size)]
    body += [(x + 0.2 * size, y1 - 0.27 * size), (x + 0.3 * size, y1)]
    draw.polygon(pose(body), fill=other, outline=(0, 0, 0))
    draw.polygon(pose(circle(x, head, radius=0.2 * size, num=14)), fill=fill, outline=(0, 0, 0))


def draw_panel_colour(rng: np.random.Generator) -> Colour:
    """Draw a flat printer's colour."""
    red, green, blue = (int(value) for value in rng.choice([30, 90, 160, 235], size=3))
    return red, green, blue


def draw_bubble(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, *, pose: Pose, box: tuple[float, ...]
) -> None:
    """Draw a speech bubble with its tail and a few lines of lettering near the top of a panel."""
    x0, y0, x1, y1 = box
    half, tall = 0.36 * (x1 - x0), 0.2 * (y1 - y0)
    x, y = x0 + (x1 - x0) * rng.uniform(0.42, 0.58), y0 + 1.25 * tall
    tail = [(x - 0.2 * half, y), (x + 0.25 * half, y), (x + 0.1 * half, y + 2.1 * tall)]
    oval = [(x + (u - x) * half, y + (v - y) * tall) for u, v in circle(x, y, radius=1, num=20)]
    draw.polygon(pose(tail), fill=(250, 250, 250), outline=(0, 0, 0))
    draw.polygon(pose(oval), fill=(250, 250, 250), outline=(0, 0, 0))
    for k in (-0.4, 0.0, 0.4):
        row, end = y + k * tall, x + half * rng.uniform(0.2, 0.65)
        draw.line(pose([(x - 0.6 * half, row), (end, row)]), fill=(0, 0, 0), width=2)


def draw_panel(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, *, pose: Pose, box: tuple[float, ...]
) -> None:
    """Draw one framed panel: flat colour, halftone dots or a figure, and often a bubble."""
    x0, y0, x1, y1 = box
    frame = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    ground = draw_panel_colour(rng)
    draw.polygon(pose(frame), fill=ground)
    if rng.random() < 0.35:
        dot = shade(ground, 0.5)
        for i in range(int((x1 - x0) / 0.1)):
            for j in range(int((y1 - y0) / 0.1)):
                ((x, y),) = pose([(x0 + 0.1 * i + 0.05, y0 + 0.1 * j + 0.05)])
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=dot)
    draw_figure(rng, draw, pose=pose, box=box)
    if rng.random() < 0.6:
        draw_bubble(rng, draw, pose=pose, box=box)
    draw.line(pose([*frame, frame[0], frame[1]]), fill=(10, 10, 10), width=4, joint="curve")


def draw_comic_book(rng: np.random.Generator, palette: Palette) -> Image.Image:
    """Draw a page of two to four rows of panels, turned and cropped."""
    layer, draw = new_layer()
    pose = draw_pose(rng, scale_px=(78, 110), turn_deg=15, shift_px=16)
    half = rng.uniform(0.66, 0.85)
    page = [(-half, -1.0), (half, -1.0), (half, 1.0), (-half, 1.0)]
    draw.polygon(pose(page), fill=palette.main, outline=shade(palette.main, 0.5))
    num_rows, gap = int(rng.integers(2, 5)), rng.uniform(0.04, 0.07)
    cuts = [-0.95 + 1.9 * k / num_rows for k in range(num_rows + 1)]
    cuts[1:-1] = [cut + rng.uniform(-0.08, 0.08) for cut in cuts[1:-1]]
    for top, bottom in pairwise(cuts):
        num = int(rng.integers(1, 4))
        sides = [-half + 0.05 + 2 * (half - 0.05) * k / num for k in range(num + 1)]
        sides[1:-1] = [side + rng.uniform(-0.08, 0.08) for side in sides[1:-1]]
        for left, right in pairwise(sides):
            box = (left + gap / 2, top + gap / 2, right - gap / 2, bottom - gap / 2)
            draw_panel(rng, draw, pose=pose, box=box)
    return layer


def coat_outline(rng: np.random.Generator, *, hem: float) -> list[Point]:
    """Return the outline of a coat: shoulders, sleeves that hang or stand off, a flared skirt."""
    shoulder, flare = rng.uniform(0.34, 0.46), rng.uniform(0.4, 0.62)
    reach, cuff = rng.uniform(0.5, 0.85), rng.uniform(0.1, 0.4)
    wide = rng.uniform(0.17, 0.24)
    right = [
        (0.14, -0.9),
        (shoulder, -0.8),
        (reach + wide / 2, cuff),
        (reach - wide / 2, cuff + 0.06),
    ]
    right += [(shoulder - 0.06, -0.25), (flare, hem), (0.0, hem + 0.03)]
    return right + [(-x, y) for x, y in right[::-1]]


def draw_hair(
    rng: np.random.Generator,
    layer: Image.Image,
    *,
    mask: Image.Image,
    colours: tuple[Colour, Colour],
) -> None:
    """Cover the masked area with short hairs, in clumps of `colours`, and let them stick out."""
    draw = ImageDraw.Draw(layer)
    patch = np.asarray(
        Image.fromarray(
            rng.integers(0, 256, size=(int(rng.integers(2, 12)),) * 2, dtype=np.uint8)
        ).resize(mask.size, Image.Resampling.BICUBIC)
    )
    inside = np.argwhere(np.asarray(mask) > 0)
    picks = rng.integers(0, len(inside), size=len(inside) // 8)
    length, lean = rng.uniform(8, 15), rng.uniform(-0.5, 0.5)
    jitter = rng.uniform(-0.7, 0.7, size=len(picks))
    gains = rng.uniform(0.3, 1.7, size=len(picks))
    rows = inside[np.sort(picks)]
    for (y, x), swing, gain in zip(rows.tolist(), jitter.tolist(), gains.tolist(), strict=True):
        colour = shade(colours[int(patch[y, x] > 150)], gain)
        end = (x + length * (lean + swing), y + length * (1 - 0.3 * abs(swing)))
        draw.line([(x, y), end], fill=colour, width=2)


def fill_fur(
    rng: np.random.Generator,
    layer: Image.Image,
    *,
    outline: list[Point],
    colours: tuple[Colour, Colour],
) -> None:
    """Fill an outline, given on the canvas, with fur."""
    mask = Image.new("L", layer.size)
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    ImageDraw.Draw(layer).polygon(outline, fill=shade(colours[0], 0.7))
    draw_hair(rng, layer, mask=mask, colours=colours)


def draw_wearer(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, *, pose: Pose, hem: float, palette: Palette
) -> None:
    """Draw what is seen of a person (head, legs) or a clothes hanger."""
    if rng.random() < 0.35:
        hook = [(0.0, -0.85), (0.0, -1.02), (0.08, -1.08), (0.06, -1.16), (-0.02, -1.16)]
        draw.line(pose(hook), fill=palette.second, width=5, joint="curve")
        return
    draw.polygon(pose(circle(0.0, -1.02, radius=0.18, num=16)), fill=palette.second)
    for x in (-0.14, 0.14):
        leg = [(x - 0.08, hem - 0.1), (x + 0.08, hem - 0.1), (x + 0.07, 1.6), (x - 0.07, 1.6)]
        draw.polygon(pose(leg), fill=palette.accent)


def draw_fur_coat(rng: np.random.Generator, palette: Palette) -> Image.Image:
    """Draw a coat of plain, spotted or patched fur, with a collar, on a person or a hanger."""
    layer, draw = new_layer()
    pose = draw_pose(rng, scale_px=(82, 110), turn_deg=10, shift_px=12)
    hem = rng.uniform(0.4, 0.95)
    draw_wearer(rng, draw, pose=pose, hem=hem, palette=palette)
    is_plain = rng.random() < 0.5
    second = shade(palette.main, 0.75) if is_plain else palette.second
    outline = pose(coat_outline(rng, hem=hem))
    fill_fur(rng, layer, outline=outline, colours=(palette.main, second))
    end = rng.uniform(-0.45, -0.1)
    draw.polygon(pose([(-0.1, -0.9), (0.1, -0.9), (0.0, end)]), fill=palette.accent)
    draw.line(pose([(0.0, end), (0.0, hem)]), fill=shade(palette.main, 0.3), width=3)
    trim = shade(palette.main, 0.8) if is_plain else palette.second
    for side in (-1, 1):
        lapel = [(side * 0.08, -0.97), (side * 0.26, -0.85), (side * 0.2, -0.5), (0.0, end + 0.1)]
        fill_fur(rng, layer, outline=pose(lapel), colours=(trim, shade(trim, 0.8)))
    return layer
