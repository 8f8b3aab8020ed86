import csv
import io
from pathlib import Path


def DATASET_TYPE(dataset, *, default="MCQ"):
    kinds = {"HallusionBench": "Y/N", "DocVQA_VAL": "VQA", "OCRBench": "VQA"}
    return kinds.get(dataset, "VQA" if "openended" in dataset.lower() else default)


class Dataset:
    """Rows of `NAME.tsv` with the columns index, image (base64), question, answer and, for multiple choice, A-D."""

    def __init__(self, name, folder):
        self.dataset_name, self.folder = name, Path(folder)
        csv.field_size_limit(1 << 30)
        with open(self.folder / f"{name}.tsv", newline="") as file:
            self.rows = list(csv.DictReader(file, delimiter="\t"))

    def dump_image(self, line):
        import base64

        from PIL import Image

        path = self.folder / f"{self.dataset_name}_{line['index']}.png"
        Image.open(io.BytesIO(base64.b64decode(line["image"]))).save(path)
        return [str(path)]

    def build_prompt(self, line):
        images = [{"type": "image", "value": path} for path in self.dump_image(line)]
        return [*images, {"type": "text", "value": line["question"]}]
