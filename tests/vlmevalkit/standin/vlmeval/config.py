from functools import partial

from . import vlm

PIXELS = {"min_pixels": 1280 * 28 * 28, "max_pixels": 16384 * 28 * 28}

QWEN3 = {"use_custom_prompt": False, "use_vllm": True, "temperature": 0.7, "top_k": 20, "presence_penalty": 1.5}

supported_VLM = {
    "llava_v1.5_7b": partial(vlm.LLaVA, model_path="liuhaotian/llava-v1.5-7b"),
    "llava_next_vicuna_7b": partial(vlm.LLaVA_Next, model_path="llava-hf/llava-v1.6-vicuna-7b-hf"),
    "llava_next_yi_34b": partial(vlm.LLaVA_Next, model_path="llava-hf/llava-v1.6-34b-hf"),
    "llava-onevision-qwen2-7b-ov-hf": partial(
        vlm.LLaVA_OneVision_HF, model_path="llava-hf/llava-onevision-qwen2-7b-ov-hf"
    ),
    "Qwen2-VL-7B-Instruct": partial(vlm.Qwen2VLChat, model_path="Qwen/Qwen2-VL-7B-Instruct", **PIXELS),
    "Qwen2.5-VL-7B-Instruct": partial(vlm.Qwen2VLChat, model_path="Qwen/Qwen2.5-VL-7B-Instruct", **PIXELS),
    "Qwen3-VL-4B-Instruct": partial(
        vlm.Qwen3VLChat, model_path="Qwen/Qwen3-VL-4B-Instruct", max_new_tokens=16384, **QWEN3
    ),
    "InternVL3_5-8B": partial(vlm.InternVLChat, model_path="OpenGVLab/InternVL3_5-8B", version="V2.0"),
    "Gemma3-4B": partial(vlm.Gemma3, model_path="google/gemma-3-4b-it"),
    "Idefics3-8B-Llama3": partial(vlm.IDEFICS2, model_path="HuggingFaceM4/Idefics3-8B-Llama3"),
    "SmolVLM-256M": partial(vlm.SmolVLM, model_path="HuggingFaceTB/SmolVLM-256M-Instruct"),
    "SmolVLM2": partial(vlm.SmolVLM2, model_path="HuggingFaceTB/SmolVLM2-2.2B-Instruct"),
    "GLM4_1VThinking-9b": partial(vlm.GLMThinking, model_path="THUDM/GLM-4.1V-9B-Thinking"),
    "Gemma4-31B-it": partial(vlm.Gemma4, model_path="google/gemma-4-31B-it"),
    "Qwen3.5-27B": partial(vlm.Qwen3VLChat, model_path="Qwen/Qwen3.5-27B", max_new_tokens=32768, **QWEN3),
}
