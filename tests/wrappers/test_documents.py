"""A document that cannot be answered is named, alone and in a batch, and no broken image is answered."""

from __future__ import annotations

import io
from typing import Any

import pytest
from lmms_eval.api.instance import Instance
from PIL import Image, ImageFile

from sparsemm_lmms.model_wrappers.lmms_eval.model import LlavaNextSnapkv, Qwen2VLSnapkv


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, int], Any]:
    made = {}
    for cls in (LlavaNextSnapkv, Qwen2VLSnapkv):
        for size in (1, 2):
            args = f"pretrained=demo,budget=64,device=cpu,batch_size={size}"
            made[cls.family.model_type, size] = cls.create_from_arg_string(args, {"batch_size": 1})
    return made


def request(images: list[Any], doc: int, text: str = "Read the page.") -> Instance:
    def messages(document: Any) -> list[dict[str, Any]]:
        content = [*({"type": "image", "url": image() if callable(image) else image} for image in images)]
        return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]

    return Instance(
        request_type="generate_until",
        arguments=(text, messages, {"max_new_tokens": 2}, doc, "pages", "test"),
        idx=0,
        metadata={"task": "pages", "doc_id": doc, "repeats": 1},
    )


def truncated() -> Image.Image:
    data = io.BytesIO()
    Image.effect_noise((60, 60), 90).save(data, "PNG")
    return Image.open(io.BytesIO(data.getvalue()[:900])).convert("RGB")


BROKEN = {
    "zero-sized": ([Image.new("RGB", (0, 5))], "Read."),
    "none": ([None], "Read."),
    "bytes": ([b"x"], "Read."),
    "missing": (["no-such-file.png"], "Read."),
    "truncated": ([truncated], "Read."),
    "truncated, lazily": ([lambda: Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + bytes(40)))], "Read."),
}
PLACEHOLDER = {"llava_next": "<image>", "qwen2_vl": "<|image_pad|>"}


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
@pytest.mark.parametrize("kind", [*BROKEN, "placeholder", "thin line"])
def test_the_broken_document_is_named(models, family: str, batch_size: int, kind: str) -> None:
    good = Image.new("RGB", (40, 30), "white")
    if kind == "placeholder":
        images, text = [good], f"What does {PLACEHOLDER[family]} mean?"
    elif kind == "thin line" and family == "llava_next":
        pytest.skip("LLaVA-NeXT has tiles for every aspect ratio")
    elif kind == "thin line":
        images, text = [Image.new("RGB", (1, 300))], "Read."
    else:
        images, text = BROKEN[kind]
    model = models[family, batch_size]
    model.task_dict = {"pages": {"test": dict.fromkeys(range(9))}}
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True  # as lmms-eval's tasks do
    try:
        with pytest.raises(ValueError, match=r"^Document 7 of task pages \(test\) cannot be "):
            model.generate_until([request([good], 1), request(images, 7, text)])
        assert ImageFile.LOAD_TRUNCATED_IMAGES
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient
