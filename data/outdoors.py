"""The subjects found outdoors: umbrella, alp, pole.

Each drawing function takes a generator and a palette and returns a transparent RGBA canvas with the
subject on it. Shapes are in the subject's own coordinates (about -1..1, y down) and reach the
canvas through a `Pose`. Backdrop, clutter, light and JPEG are in scene.py.
"""

import math
from itertools import pairwise

import numpy as np
from PIL import Image, ImageChops, ImageDraw
from scene import (
    CANVAS_PX,
    Colour,
    Palette,
    Point,
    Pose,
    blend,
    circle,
    draw_pose,
    luma,
    new_layer,
    shade,
)


def meridian(x: float, height: float) -> list[Point]:
    """Return the seam of a dome from its top (0, -height) to (x, 0) on the rim."""
    angles = [math.pi / 2 * i / 8 for i in range(9)]
    return [(x * math.sin(angle), -height * math.cos(angle)) for angle in angles]


def scallop(left: float, right: float, sag: float) -> list[Point]:
    """Return the rim between two ribs: an arc that rises by `sag` of its width."""
    width = right - left
    steps = [i / 6 for i in range(7)]
    return [(left + width * s, -sag * width * 4 * s * (1 - s)) for s in steps]


def draw_stick(draw: ImageDraw.ImageDraw, pose: Pose, *, colour: Colour, width: int) -> None:
    """Draw the shaft of an umbrella with a hook at its end."""
    hook = [math.pi * i / 8 for i in range(9)]
    points = [(0.0, -0.2), (0.0, 0.85)]
    points += [(0.15 - 0.15 * math.cos(t), 0.85 + 0.15 * math.sin(t)) for t in hook]
    draw.line(pose(points), fill=colour, width=width, joint="curve")


def draw_umbrella(rng: np.random.Generator, palette: Palette) -> Image.Image:
    """Draw an open umbrella: gores in one or two colours, ribs, ferrule, hooked handle."""
    layer, draw = new_layer()
    pose = draw_pose(rng, scale_px=(76, 98), turn_deg=22, shift_px=14)
    height, num = rng.uniform(0.55, 0.85), int(rng.integers(4, 8))
    is_plain = rng.random() < 0.4
    pair = (palette.main, shade(palette.main, 0.85) if is_plain else palette.second)
    ink = shade(palette.main, 0.35) if luma(palette.main) > 110 else shade(palette.main, 2.2)
    draw_stick(draw, pose, colour=palette.main, width=int(rng.integers(4, 7)))
    draw.line(pose([(0, -height - 0.16), (0, -height + 0.1)]), fill=palette.main, width=6)
    ribs = [-math.cos(math.pi * k / num) for k in range(num + 1)]
    sag = rng.uniform(0.15, 0.35)
    for k in range(num):
        left, right = ribs[k], ribs[k + 1]
        outline = meridian(left, height) + scallop(left, right, sag) + meridian(right, height)[::-1]
        gain = 1.08 - 0.3 * k / num
        draw.polygon(pose(outline), fill=shade(pair[k % 2], gain))
    for rib in ribs:
        draw.line(pose(meridian(rib, height)), fill=ink, width=2)
    return layer


def roughen(rng: np.random.Generator, points: list[Point], *, amount: float) -> list[Point]:
    """Return the line with each segment halved four times and the new points moved up or down."""
    for _ in range(4):
        finer = [points[0]]
        for (x0, y0), (x1, y1) in pairwise(points):
            step = rng.uniform(-amount, amount) * (x1 - x0)
            finer += [((x0 + x1) / 2, (y0 + y1) / 2 + step), (x1, y1)]
        points = finer
    return points


def draw_peaks(rng: np.random.Generator, *, num: int, top: tuple[float, float]) -> list[Point]:
    """Return valley, peak, valley, ... from beyond the left edge to beyond the right one."""
    points = [(-1.6, rng.uniform(0.3, 0.8))]
    for k in range(num):
        middle = -1.1 + 2.2 * (k + rng.uniform(0.25, 0.75)) / num
        right = -1.1 + 2.2 * (k + 1) / num
        points += [(middle, rng.uniform(*top)), (right, rng.uniform(0.1, 0.6))]
    return [*points[:-1], (1.6, rng.uniform(0.3, 0.8))]


def shaded_sides(rng: np.random.Generator, peaks: list[Point]) -> list[list[Point]]:
    """Return, for every peak, the side that turns away from the sun: right of a jagged spine."""
    sides = []
    for (x, y), (x_end, y_end) in zip(peaks[1::2], peaks[2::2], strict=True):
        lean = rng.uniform(-0.15, 0.25)
        steps = [i / 12 for i in range(1, 13)]
        spine = [(x + lean * s + rng.uniform(-0.07, 0.07), y + (1.8 - y) * s) for s in steps]
        sides.append([(x, y), (x_end, y_end), (x_end, 1.8), *spine[::-1]])
    return sides


def snow_mask(
    rng: np.random.Generator, ridge: Image.Image, *, pose: Pose, line: float
) -> Image.Image:
    """Return the part of the ridge mask above a zigzag snow line."""
    xs = np.sort(rng.uniform(-1.6, 1.6, size=24)).tolist()
    zigzag = [(x, line + rng.uniform(-0.16, 0.2)) for x in xs]
    mask = Image.new("L", ridge.size)
    ImageDraw.Draw(mask).polygon(pose([(-1.6, -3.0), *zigzag, (1.6, -3.0)]), fill=255)
    return ImageChops.darker(mask, ridge)


def draw_pines(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, *, pose: Pose, fill: Colour
) -> None:
    """Draw a row of fir trees along the bottom."""
    base = rng.uniform(0.75, 1.0)
    draw.polygon(pose([(-1.6, base), (1.6, base), (1.6, 2.0), (-1.6, 2.0)]), fill=fill)
    for _ in range(int(rng.integers(4, 14))):
        x, tall = rng.uniform(-1.3, 1.3), rng.uniform(0.15, 0.4)
        tree = [(x, base - tall), (x + 0.09, base + 0.05), (x - 0.09, base + 0.05)]
        draw.polygon(pose(tree), fill=fill)


def draw_alp(rng: np.random.Generator, palette: Palette) -> Image.Image:
    """Draw a snow-capped range with a lit and a shaded side, a far ridge and sometimes firs."""
    layer, draw = new_layer()
    pose = draw_pose(rng, scale_px=(84, 110), turn_deg=5, shift_px=14)
    rock, snow = sorted((palette.main, palette.second), key=luma)
    if rng.random() < 0.6:
        far = draw_peaks(rng, num=int(rng.integers(2, 5)), top=(-0.5, 0.1))
        far_line = [*roughen(rng, far, amount=0.15), (1.6, 2.0), (-1.6, 2.0)]
        draw.polygon(pose(far_line), fill=blend(rock, palette.back[0], frac=0.55))
    peaks = draw_peaks(rng, num=int(rng.integers(1, 4)), top=(-0.85, -0.25))
    outline = pose([*roughen(rng, peaks, amount=0.22), (1.6, 2.0), (-1.6, 2.0)])
    ridge = Image.new("L", layer.size)
    ImageDraw.Draw(ridge).polygon(outline, fill=255)
    stone, ice = (Image.new("RGB", layer.size, colour) for colour in (rock, snow))
    for side in shaded_sides(rng, peaks):
        ImageDraw.Draw(stone).polygon(pose(side), fill=shade(rock, 0.6))
        ImageDraw.Draw(ice).polygon(pose(side), fill=shade(snow, 0.65))
    stone.paste(ice, mask=snow_mask(rng, ridge, pose=pose, line=rng.uniform(-0.25, 0.3)))
    layer.paste(stone, mask=ridge)
    if rng.random() < 0.5:
        draw_pines(rng, draw, pose=pose, fill=shade(rock, 0.5))
    return layer


def draw_shaft(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, *, pose: Pose, top: float, palette: Palette
) -> None:
    """Draw the pole itself, round by its light and dark edge, or with barber's stripes."""
    half = rng.uniform(0.045, 0.1)
    for left, right, gain in ((-1.0, -0.35, 0.75), (-0.35, 0.3, 1.15), (0.3, 1.0, 0.55)):
        x0, x1 = left * half, right * half
        strip = [(x0, top), (x1, top), (x1, 1.9), (x0, 1.9)]
        draw.polygon(pose(strip), fill=shade(palette.main, gain))
    if rng.random() < 0.25:
        for k in range(12):
            y = top + 0.05 + k * 0.24
            band = [(-half, y), (half, y - 0.06), (half, y + 0.06), (-half, y + 0.12)]
            draw.polygon(pose(band), fill=palette.second)


def draw_crossarms(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, *, pose: Pose, top: float, palette: Palette
) -> None:
    """Draw the arms, insulators and wires of a telegraph pole."""
    half = rng.uniform(0.35, 0.6)
    sag, slope = rng.uniform(0.0, 0.2), rng.uniform(-0.25, 0.25)
    for k in range(int(rng.integers(1, 4))):
        y = top + 0.12 + 0.24 * k
        arm = [(-half, y), (half, y), (half, y + 0.07), (-half, y + 0.07)]
        for u in (-0.9, -0.5, 0.5, 0.9):
            x = u * half
            steps = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
            wire = [(x + s, y - 0.07 + slope * s + sag * s * s) for s in steps]
            draw.line(pose(wire), fill=palette.main, width=1)
            draw.line(pose([(x, y - 0.08), (x, y)]), fill=palette.second, width=6)
        draw.polygon(pose(arm), fill=shade(palette.main, 0.85))


def draw_lamp(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, *, pose: Pose, top: float, palette: Palette
) -> None:
    """Draw a curved arm with a lamp, or one on either side."""
    reach = rng.uniform(0.3, 0.6)
    for side in (-1, 1)[: int(rng.integers(1, 3))]:
        bend = [math.pi / 2 * i / 6 for i in range(7)]
        arm = [(side * reach * math.sin(t), top - 0.12 + 0.12 * math.cos(t)) for t in bend]
        draw.line(pose(arm), fill=palette.main, width=6, joint="curve")
        x, y = side * reach, top - 0.12
        head = [
            (x - 0.14, y + 0.1),
            (x - 0.08, y - 0.04),
            (x + 0.08, y - 0.04),
            (x + 0.14, y + 0.1),
        ]
        draw.polygon(pose(head), fill=palette.second, outline=palette.main)


def draw_flag(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, *, pose: Pose, top: float, palette: Palette
) -> None:
    """Draw a waving flag of two or three bands."""
    length, phase = rng.uniform(0.5, 0.9), rng.uniform(0, 2 * math.pi)
    num, tall = int(rng.integers(2, 4)), rng.uniform(0.3, 0.5)
    colours = (palette.second, palette.accent, palette.main)
    steps = [i / 10 for i in range(11)]
    wave = [(length * s, 0.07 * math.sin(phase + 5 * s)) for s in steps]
    for k in range(num):
        y = top + 0.05 + tall * k / num
        upper = [(u, y + v) for u, v in wave]
        lower = [(u, y + v + tall / num) for u, v in wave]
        draw.polygon(pose(upper + lower[::-1]), fill=colours[k])


def draw_pole(rng: np.random.Generator, palette: Palette) -> Image.Image:
    """Draw a telegraph pole, a lamp post, a flagpole or a bare post with a ball on top."""
    layer, draw = new_layer()
    pose = draw_pose(rng, scale_px=(76, 110), turn_deg=7, shift_px=0)
    x = CANVAS_PX * rng.uniform(0.28, 0.72)
    pose = Pose(pose.scale_px, pose.turn_rad, x, pose.centre_y_px, 1.0, pose.is_mirrored)
    top = rng.uniform(-0.8, -0.45)
    kind = rng.choice(4, p=[0.5, 0.2, 0.2, 0.1])
    if kind == 3:
        ball = circle(0.0, top, radius=rng.uniform(0.1, 0.16), num=16)
        draw.polygon(pose(ball), fill=palette.second, outline=palette.main)
    draw_shaft(rng, draw, pose=pose, top=top, palette=palette)
    if kind < 3:
        part = (draw_crossarms, draw_lamp, draw_flag)[kind]
        part(rng, draw, pose=pose, top=top, palette=palette)
    return layer
