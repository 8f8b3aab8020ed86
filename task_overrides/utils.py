"""Hooks of the demo tasks: the image of a document, and character accuracy, which the host lacks."""

import io
import random
import string

from PIL import Image

from sparsemm_lmms.demo import metrics


def doc_to_visual(doc: dict) -> list[Image.Image]:
    """The document's image as RGB."""
    image = doc["image"]
    if isinstance(image, dict):  # as stored: the host decodes images only where it knows the column's type
        image = Image.open(io.BytesIO(image["bytes"]))
    return [image.convert("RGB")]


def near_misses(doc: dict) -> list[str]:
    """The answer among three strings that differ from it in one letter or digit each, in an order of the document's."""
    dice, answer = random.Random(doc["id"]), doc["answer"]
    places = [i for i, letter in enumerate(answer) if letter in string.ascii_uppercase + string.digits]
    choices = {answer}
    while len(choices) < 4:
        place = dice.choice(places)
        alike = string.digits if answer[place] in string.digits else string.ascii_uppercase
        choices.add(answer[:place] + dice.choice(alike) + answer[place + 1 :])
    return dice.sample(sorted(choices), 4)


def right_choice(doc: dict) -> int:
    """Where the answer stands in `near_misses`."""
    return near_misses(doc).index(doc["answer"])


def character_accuracy(references: list[str], predictions: list[str]) -> float:
    """1 - edit distance / length of the longer string, for one document."""
    return metrics.character_accuracy(references[0], predictions[0])
