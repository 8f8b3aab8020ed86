from functools import partial

from . import vlm

PIXELS = {"min_pixels": 1280 * 28 * 28, "max_pixels": 16384 * 28 * 28}

supported_VLM = {
    "llava_next_vicuna_7b": partial(vlm.LLaVA_Next, model_path="llava-hf/llava-v1.6-vicuna-7b-hf"),
    "llava_next_yi_34b": partial(vlm.LLaVA_Next, model_path="llava-hf/llava-v1.6-34b-hf"),
    "Qwen2-VL-7B-Instruct": partial(vlm.Qwen2VLChat, model_path="Qwen/Qwen2-VL-7B-Instruct", **PIXELS),
}
