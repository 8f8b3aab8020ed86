"""Tiny random checkpoints of the built-in families, in the ordinary Hugging Face layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor
from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor
from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor
from transformers.models.glm4v.image_processing_glm4v import Glm4vImageProcessor
from transformers.models.glm46v.image_processing_glm46v import Glm46VImageProcessor
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.idefics3.image_processing_idefics3 import Idefics3ImageProcessor
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.pixtral.image_processing_pixtral import PixtralImageProcessor
from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor

from sparsemm_lmms.model_wrappers.matrix import tiny

TOWER = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=14)
CLIP = dict(model_type="clip_vision_model", image_size=56, projection_dim=16, **TOWER)
SIGLIP = dict(model_type="siglip_vision_model", image_size=56, vision_use_head=False, **TOWER)
MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]})
SQUARE = {"height": 56, "width": 56}
EXPERTS = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
GLM = {
    "image_start": "<|begin_of_image|>",
    "image_end": "<|end_of_image|>",
    "video_start": "<|begin_of_video|>",
    "video_end": "<|end_of_video|>",
    "image": "<|image|>",
    "video": "<|video|>",
}
QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": tiny.LAYERS,
        "num_attention_heads": tiny.Q_HEADS,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.4,
        **tiny.ends(tokenizer),
        **more,
    }


def save(name: str, config: Any, processor: Any, folder: Path, mark: str = "<image>", video: str = "") -> Path:
    torch.manual_seed(0)
    processor.chat_template = tiny.TURNS.replace("IMAGE", mark).replace("VIDEO", video)
    return tiny.save(getattr(transformers, f"{name}ForConditionalGeneration")(config), processor, folder)


def tokens(*special: str, **named: str) -> tuple[Any, dict[str, int]]:
    """A tokenizer with the special tokens, some as its attributes, and their ids."""
    tokenizer = tiny.tokenizer(["<image>", *special])
    ids = dict(zip(("<image>", *special), tokenizer.convert_tokens_to_ids(["<image>", *special]), strict=True))
    for name, token in named.items():
        tokenizer.init_kwargs.setdefault("extra_special_tokens", {})
        tokenizer._set_model_specific_special_tokens({name: token})
    return tokenizer, ids


def llava_next(folder: Path, seed: int = 0) -> Path:
    """MHA, CLIP tower of 28 px images with patches of 14, any-resolution tiles."""
    torch.manual_seed(seed)
    tokenizer = tiny.tokenizer(["<image>"])
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=tiny.LAYERS,
        num_attention_heads=tiny.Q_HEADS,
        num_key_value_heads=tiny.Q_HEADS,
        initializer_range=0.4,
        **tiny.ends(tokenizer),
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    pinpoints = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]
    config = transformers.LlavaNextConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    processor = transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny.TURNS.replace("IMAGE", "<image>").replace("VIDEO", ""),
    )
    return tiny.save(transformers.LlavaNextForConditionalGeneration(config), processor, folder)


def qwen2_vl(folder: Path, seed: int = 0) -> Path:
    """GQA with groups of 2, 2x2 merge, M-RoPE."""
    torch.manual_seed(seed)
    tokenizer = tiny.tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": tiny.LAYERS,
        "num_attention_heads": tiny.Q_HEADS,
        "num_key_value_heads": 2,
        "initializer_range": 0.4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        **tiny.ends(tokenizer),
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    tokens = ("vision_start", "vision_end", "image", "video")  # as transformers' config names them
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        **{f"{t}_token_id": tokenizer.convert_tokens_to_ids(n) for t, n in zip(tokens, names, strict=True)},
    )
    processor = transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=tiny.TURNS.replace("IMAGE", seen("image")).replace("VIDEO", seen("video")),
    )
    return tiny.save(transformers.Qwen2VLForConditionalGeneration(config), processor, folder)


def seen(kind: str) -> str:
    return f"<|vision_start|><|{kind}_pad|><|vision_end|>"


def qwen(name: str, vision: dict[str, Any], patch: int, folder: Path, **more: Any) -> Path:
    tokenizer = tiny.tokenizer(list(QWEN))
    named = dict(
        zip(("vision_start", "vision_end", "image", "video"), tokenizer.convert_tokens_to_ids(QWEN), strict=True)
    )
    config = getattr(transformers, f"{name}Config")(
        text_config=text(tokenizer, **(MROPE | more)),
        vision_config=dict(hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, **vision),
        **{f"{word}_token_id": token for word, token in named.items()},
    )
    video = transformers.Qwen3VLVideoProcessor if patch == 16 else transformers.Qwen2VLVideoProcessor
    image_processor = transformers.Qwen2VLImageProcessor(patch_size=patch)
    processor = getattr(transformers, "Qwen3VLProcessor" if patch == 16 else f"{name}Processor")(
        image_processor, tokenizer, video()
    )
    return save(name, config, processor, folder, seen("image"), seen("video"))


def qwen2_5_vl(folder: Path) -> Path:
    return qwen("Qwen2_5_VL", dict(depth=2, fullatt_block_indexes=[1]), 14, folder)


def qwen3_vl(folder: Path) -> Path:
    return qwen("Qwen3VL", dict(depth=2, num_position_embeddings=64, deepstack_visual_indexes=[0]), 16, folder)


def qwen3_vl_moe(folder: Path) -> Path:
    vision = dict(depth=2, num_position_embeddings=64, deepstack_visual_indexes=[0])
    return qwen("Qwen3VLMoe", vision, 16, folder, **EXPERTS)


def qwen3_5(folder: Path, name: str = "Qwen3_5", **more: Any) -> Path:
    """One full layer between two of linear attention."""
    linear = dict(
        linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    rope = dict(MROPE["rope_parameters"], mrope_section=[1, 1, 0], partial_rotary_factor=0.5)
    vision = dict(depth=2, num_position_embeddings=64)
    return qwen(name, vision, 16, folder, rope_parameters=rope, **linear, **more)


def qwen3_5_moe(folder: Path) -> Path:
    return qwen3_5(folder, "Qwen3_5Moe", shared_expert_intermediate_size=16, **EXPERTS)


def glm(name: str, folder: Path, **more: Any) -> Path:
    tokenizer = tiny.tokenizer(list(GLM.values()))
    ids = dict(zip(GLM, tokenizer.convert_tokens_to_ids(list(GLM.values())), strict=True))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
    config = getattr(transformers, f"{name}Config")(
        text_config=text(tokenizer, rope_parameters=rope, **more),
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=24, num_heads=2, image_size=56, patch_size=14, out_hidden_size=32
        ),
        **{f"{word}_token_id": token for word, token in ids.items()},
    )
    size = {"shortest_edge": 56**2, "longest_edge": 30 * 28**2}
    kind, image_processor = ("Glm4v", Glm4vImageProcessor) if "Glm4v" in name else ("Glm46V", Glm46VImageProcessor)
    images = image_processor(size=size)
    video = getattr(transformers, f"{kind}VideoProcessor")()
    processor = getattr(transformers, f"{kind}Processor")(images, tokenizer, video)
    return save(name, config, processor, folder, "<|begin_of_image|><|image|><|end_of_image|>")


def glm4v(folder: Path) -> Path:
    return glm("Glm4v", folder)


def glm46v(folder: Path) -> Path:
    return glm("Glm46V", folder, model_type="glm4v_text")


def glm4v_moe(folder: Path) -> Path:
    experts = dict(moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2)
    return glm("Glm4vMoe", folder, **experts)


def llava(folder: Path) -> Path:
    tokenizer, ids = tokens()
    config = transformers.LlavaConfig(
        text_config=text(tokenizer, model_type="llama"),
        vision_config=CLIP,
        image_token_index=ids["<image>"],
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    images = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=SQUARE)
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return save("Llava", config, processor, folder)


def llava_onevision(folder: Path) -> Path:
    tokenizer, ids = tokens("<video>")
    pinpoints = [[56 * rows, 56 * columns] for rows in (1, 2) for columns in (1, 2)]
    config = transformers.LlavaOnevisionConfig(
        text_config=text(tokenizer, model_type="qwen2"),
        vision_config=SIGLIP,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=pinpoints,
    )
    processor = transformers.LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=pinpoints),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    return save("LlavaOnevision", config, processor, folder)


def internvl(folder: Path) -> Path:
    marks = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<image>", video_token="<v>")
    tokenizer, ids = tokens("<img>", "</img>", "<v>", **marks)
    config = transformers.InternVLConfig(
        text_config=text(tokenizer, model_type="qwen2"),
        vision_config=dict(TOWER, patch_size=[14, 14], image_size=[56, 56]),
        image_token_id=ids["<image>"],
        image_seq_length=4,
    )
    processor = transformers.InternVLProcessor(
        GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4),
        tokenizer,
        transformers.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
    )
    return save("InternVL", config, processor, folder)


def _pixtral_processor(tokenizer: Any, merge: int) -> Any:
    return transformers.PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}),
        tokenizer,
        patch_size=14,
        spatial_merge_size=merge,
        image_token="<image>",
    )


def mistral3(folder: Path, **more: Any) -> Path:
    tokenizer, ids = tokens("[IMG_BREAK]", "[IMG_END]")
    config = transformers.Mistral3Config(
        text_config=text(tokenizer, **(dict(model_type="mistral", sliding_window=None) | more)),
        vision_config=dict(TOWER, model_type="pixtral", image_size=112, head_dim=8),
        image_token_index=ids["<image>"],
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return save("Mistral3", config, _pixtral_processor(tokenizer, 2), folder)


def ministral3(folder: Path) -> Path:
    """Queries scaled with their position, as of a long context."""
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    return mistral3(folder, model_type="ministral3", rope_parameters=rope)


def pixtral(folder: Path) -> Path:
    """LLaVA's class around Pixtral's tower."""
    tokenizer, ids = tokens("[IMG_BREAK]", "[IMG_END]")
    config = transformers.LlavaConfig(
        text_config=text(tokenizer, model_type="mistral", sliding_window=None),
        vision_config=dict(TOWER, model_type="pixtral", image_size=112, head_dim=8),
        image_token_index=ids["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return save("Llava", config, _pixtral_processor(tokenizer, 1), folder)


def idefics3(folder: Path, name: str = "Idefics3") -> Path:
    tokenizer, ids = tokens("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<video>")
    config = getattr(transformers, f"{name}Config")(
        text_config=text(tokenizer, model_type="llama"),
        vision_config=dict(TOWER, image_size=56),
        image_token_id=ids["<image>"],
        scale_factor=2,
    )
    sizes = dict(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    if name == "Idefics3":
        processor = transformers.Idefics3Processor(Idefics3ImageProcessor(**sizes), tokenizer, image_seq_len=4)
    else:
        video = transformers.SmolVLMVideoProcessor(**sizes)
        processor = transformers.SmolVLMProcessor(SmolVLMImageProcessor(**sizes), tokenizer, video, image_seq_len=4)
    return save(name, config, processor, folder)


def smolvlm(folder: Path) -> Path:
    return idefics3(folder, "SmolVLM")


def gemma3(folder: Path) -> Path:
    """One full layer in three; the window of the others is shorter than a prompt."""
    marks = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image>")
    tokenizer, ids = tokens("<start_of_image>", "<end_of_image>", **marks)
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    config = transformers.Gemma3Config(
        text_config=text(tokenizer, sliding_window=16, layer_types=kinds),
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image>"],
    )
    processor = transformers.Gemma3Processor(Gemma3ImageProcessor(size=SQUARE), tokenizer, image_seq_length=4)
    return save("Gemma3", config, processor, folder, "<start_of_image>")


def gemma4(folder: Path) -> Path:
    """One full layer in three; the window of the others is shorter than a prompt."""
    marks = dict(
        boi_token="<|image>", eoi_token="<image|>", image_token="<image>", boa_token="<|audio>", eoa_token="<audio|>",
        audio_token="<|audio|>",
    )  # fmt: skip
    tokenizer, ids = tokens(*(mark for mark in marks.values() if mark != "<image>"), "<|video|>", **marks)
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    config = transformers.Gemma4Config(
        text_config=text(
            tokenizer, sliding_window=16, layer_types=kinds, global_head_dim=16, hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=len(tokenizer),
        ),
        vision_config=dict(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            head_dim=8, pooling_kernel_size=3, patch_size=4, position_embedding_size=128, default_output_length=70,
        ),
        audio_config=None,
        image_token_id=ids["<image>"],
        video_token_id=ids["<|video|>"],
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
        audio_token_id=ids["<|audio|>"],
    )  # fmt: skip
    sizes = dict(patch_size=4, max_soft_tokens=70, pooling_kernel_size=3)
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(**sizes),
        tokenizer,
        Gemma4VideoProcessor(**sizes),
        image_seq_length=70,
    )
    return save("Gemma4", config, processor, folder)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "gemma3": gemma3,
    "gemma4": gemma4,
    "glm46v": glm46v,
    "glm4v": glm4v,
    "glm4v_moe": glm4v_moe,
    "idefics3": idefics3,
    "internvl": internvl,
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "mistral3": mistral3,
    "mistral3, ministral3": ministral3,
    "llava, pixtral": pixtral,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_vl": qwen2_vl,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "smolvlm": smolvlm,
}
"""`model_type` (and that of the text or the vision, where there are several) -> maker."""
