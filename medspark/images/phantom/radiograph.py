"""Generate a synthetic chest radiograph: anatomy, texture, a faint opacity, detector, noise."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from medspark.images.phantom.plan import PhantomConfig, Study, generator

Image2D = npt.NDArray[np.float32]

_ANATOMY_GRID = 128  # pixels; anatomy is smooth, so larger images are enlarged from this grid


def radiograph(study: Study, config: PhantomConfig) -> Image2D:
    """Return the image of ``study``: float32 (size, size), black 0 to white 1."""
    patient = study.patient
    body = generator(config.seed, "anatomy", patient.number)
    rng = generator(config.seed, "image", study.number)
    grid = min(config.size, _ANATOMY_GRID)
    # Images of a patient differ in position and zoom, not in anatomy.
    y, x = _coordinates(grid, rng)
    image, lungs = _anatomy(x, y, body)
    image += _texture(grid, rng, cells=6) * 0.035 + _texture(grid, rng, cells=14) * 0.02
    if patient.label:
        image += _opacity(x, y, rng) * lungs * np.float32(config.contrast)
    if grid < config.size:
        image = _enlarged(image, config.size)
    image = _at_site(image, patient.site)
    if config.style == "portable":
        image = _at_the_bed(image, generator(config.seed, "bedside", study.number))
    # Quantum noise grows with the root of the intensity, and has no spatial correlation.
    dose = np.float32(0.02 * (config.size / 64) ** 0.5)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image += noise * dose * np.sqrt(np.clip(1.1 - image, 0.1, 1))
    return np.clip(image, 0, 1)


def _coordinates(grid: int, rng: np.random.Generator) -> tuple[Image2D, Image2D]:
    line = np.linspace(-1, 1, grid, dtype=np.float32)
    shift = rng.normal(0, 0.03, 2).astype(np.float32)
    zoom = np.float32(rng.normal(1, 0.03))
    tilt = np.float32(rng.normal(0, 0.03))
    x, y = (line * zoom + shift[0])[None, :], (line * zoom + shift[1])[:, None]
    return y + tilt * x, x - tilt * y


def _ellipse(
    x: Image2D, y: Image2D, centre: tuple[float, float], radii: tuple[float, float], soft: float
) -> Image2D:
    """Return 1 inside the ellipse and 0 outside, with an edge of relative width ``soft``."""
    distance = np.sqrt(((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2)
    return np.asarray(np.clip((1 - distance) / soft + 0.5, 0, 1), np.float32)


def _anatomy(x: Image2D, y: Image2D, body: np.random.Generator) -> tuple[Image2D, Image2D]:
    """Return the healthy image and the lung mask of one patient's anatomy."""

    def vary(mean: float, spread: float) -> float:
        return float(body.normal(mean, spread))

    width, height, base = vary(0.29, 0.02), vary(0.56, 0.03), vary(0.52, 0.03)
    right = _ellipse(x, y, (vary(-0.40, 0.02), -0.08), (width, height), 0.25)
    left = _ellipse(x, y, (vary(0.40, 0.02), -0.08), (width * 0.92, height), 0.25)
    # The diaphragm bounds the lungs from below.
    dome = np.clip((base - 0.25 * (np.abs(x) - 0.4) ** 2 - y) / 0.08, 0, 1)
    lungs = np.maximum(right, left) * dome
    trunk = _ellipse(x, y, (0, 0.15), (vary(0.92, 0.03), 1.35), 0.2)
    heart = _ellipse(x, y, (vary(0.12, 0.03), vary(0.28, 0.03)), (vary(0.30, 0.03), 0.28), 0.35)
    spine = np.exp(-((x / 0.13) ** 2))
    hila = np.exp(-(((np.abs(x) - 0.2) / 0.1) ** 2) - ((y - 0.02) / 0.16) ** 2)
    ribs = np.square(np.square(np.cos((y + 0.35 * x * x) * vary(24, 1) + vary(0, 1))))
    image = 0.62 * trunk - vary(0.36, 0.03) * lungs + vary(0.16, 0.03) * heart
    image += 0.13 * spine * trunk + vary(0.08, 0.03) * hila + vary(0.05, 0.012) * ribs * trunk
    return np.asarray(image, np.float32), np.asarray(lungs * (1 - 0.6 * heart), np.float32)


def _texture(grid: int, rng: np.random.Generator, *, cells: int) -> Image2D:
    """Return smooth noise of about unit variance, with ``cells`` random values per side."""
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    return _enlarged(coarse, grid)


def _enlarged(image: Image2D, size: int) -> Image2D:
    large = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return np.array(large, np.float32)


def _opacity(x: Image2D, y: Image2D, rng: np.random.Generator) -> Image2D:
    """Return a consolidation or ground-glass opacity in one lung, at most about 1 high."""
    side = rng.choice((-0.4, 0.4))
    centre = side + rng.normal(0, 0.07), rng.uniform(-0.35, 0.35)
    # From invisible to obvious: invisible opacities keep the best possible AUROC below 1, obvious
    # ones let a network learn within minutes.
    strength = rng.uniform(0.15, 1.0)
    if rng.random() < 0.5:  # consolidation: one compact blob
        return np.asarray(strength * _blot(x, y, centre, rng.uniform(0.12, 0.18)), np.float32)
    spread = rng.uniform(0.20, 0.30)  # ground glass: wide, patchy, fainter
    grain = 0.75 + 0.25 * _texture(len(y), rng, cells=20)
    return np.asarray(0.8 * strength * grain * _blot(x, y, centre, spread), np.float32)


def _blot(x: Image2D, y: Image2D, centre: tuple[float, float], spread: float) -> Image2D:
    square = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * spread**2)
    return np.asarray(np.exp(-square), np.float32)


def _at_site(image: Image2D, site: str) -> Image2D:
    """Return the image after the site's detector gain, offset and gamma."""
    gain, offset, gamma = {"a": (1.0, 0.0, 1.0), "b": (0.9, 0.07, 1.0), "c": (1.0, 0.0, 0.85)}[site]
    shown = np.clip(image, 0.001, 1) ** np.float32(gamma)
    return np.asarray(shown * np.float32(gain) + np.float32(offset), np.float32)


def _at_the_bed(image: Image2D, rng: np.random.Generator) -> Image2D:
    """Return the image as a portable unit shows it: flat, within a tilted field, and marked."""
    line = np.linspace(-1, 1, len(image), dtype=np.float32)
    angle, half = rng.uniform(0.06, 0.14) * rng.choice((-1, 1)), rng.uniform(0.86, 0.92)
    x, y = line[None, :] - angle * line[:, None], line[:, None] + angle * line[None, :]
    field = (np.abs(x) < half) & (np.abs(y) < half)
    # A lead marker, a square with a bar below, stands in the upper corner of the patient's left.
    right, top = 0.62 + rng.uniform(-0.04, 0.04), -0.68 + rng.uniform(-0.04, 0.04)
    square = (np.abs(x - right) < 0.12) & (np.abs(y - top) < 0.12)
    bar = (np.abs(x - right) < 0.12) & (np.abs(y - top - 0.2) < 0.04)
    flat = 0.14 + 0.75 * image
    shown = np.where(square | bar, 0.98, np.where(field, flat, 0.03))
    return np.asarray(shown, np.float32)
