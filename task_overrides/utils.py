"""Hooks of the demo tasks: the image of a document, and character accuracy, which the host lacks."""

import io

from PIL import Image

from sparsemm_lmms.demo import metrics


def doc_to_visual(doc: dict) -> list[Image.Image]:
    """The document's image as RGB."""
    image = doc["image"]
    if isinstance(image, dict):  # as stored: the host decodes images only where it knows the column's type
        image = Image.open(io.BytesIO(image["bytes"]))
    return [image.convert("RGB")]


def character_accuracy(references: list[str], predictions: list[str]) -> float:
    """1 - edit distance / length of the longer string, for one document."""
    return metrics.character_accuracy(references[0], predictions[0])
