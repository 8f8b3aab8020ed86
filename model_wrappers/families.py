"""What differs between the families: checkpoints, prompts, limits. Names no host."""

from __future__ import annotations

from sparsemm_lmms.model_wrappers.arguments import Family

# lmms-eval's `llava_hf`: no system prompt, 1024 new tokens, answers as they come
LLAVA_NEXT = Family(
    name="llava_next",
    model_type="llava_next",
    architecture="LlavaNextForConditionalGeneration",
    pretrained="llava-hf/llava-v1.6-vicuna-7b-hf",
    max_new_tokens=1024,
)
# lmms-eval's `qwen2_vl`: its system prompt and pixel limits (at most 768 tokens an image)
QWEN2_VL = Family(
    name="qwen2_vl",
    model_type="qwen2_vl",
    architecture="Qwen2VLForConditionalGeneration",
    pretrained="Qwen/Qwen2-VL-7B-Instruct",
    max_new_tokens=128,
    strip_answers=True,
    system_prompt="You are a helpful assistant.",
    pixel_limits=(3136, 602112),
    reads_video=True,
)
