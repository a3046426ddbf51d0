"""eps, the attacker's budget: everywhere a fraction of [0, 1], written as 2/255 or 0.0078."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

__all__ = ["LARGEST", "Eps", "eps_name", "eps_text", "with_eps"]

# A larger change is plain to see, so a larger number was probably meant as grey levels.
LARGEST = 64 / 255


def _number(value: object) -> object:
    if isinstance(value, str) and "/" in value:
        above, below = value.split("/", 1)
        try:
            return float(above) / float(below)
        except (ValueError, ZeroDivisionError):
            return value
    return value


def _small(eps: float) -> float:
    if 0 <= eps <= LARGEST:
        return eps
    levels = eps if 0 < eps <= 64 else 2
    raise ValueError(
        f"the budget is a fraction of [0, 1], at most 64/255, so it cannot be {eps:g}; write "
        f"grey levels of 255 as {levels:g}/255."
    )


# The largest change of a pixel in [0, 1]. "2/255" is two grey levels of an 8-bit image.
Eps = Annotated[float, BeforeValidator(_number), AfterValidator(_small)]


def eps_text(eps: float) -> str:
    """Return ``eps`` as people read and write it: 0, 2/255, 0.5/255, or else a decimal number."""
    levels = round(255 * eps, 2)
    if levels / 255 != eps:
        return repr(float(eps))
    return f"{levels:g}/255" if levels else "0"


def eps_name(eps: float) -> str:
    """Return ``eps`` as part of an MLflow metric name: eps_2_255."""
    return f"eps_{eps_text(eps)}".replace("/", "_")


def with_eps(document: Any) -> Any:
    """Return a result document in which every budget is called ``eps``.

    Earlier versions of medspark wrote it in grey levels of 255, as ``eps_255``.
    """
    if isinstance(document, list):
        return [with_eps(entry) for entry in document]
    if not isinstance(document, dict):
        return document
    return {
        "eps" if key == "eps_255" else key: value / 255 if key == "eps_255" else with_eps(value)
        for key, value in document.items()
    }
