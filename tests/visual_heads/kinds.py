"""Tiny models of the other kinds of grid whose vision towers say where a patch lies: its feature is its mean colour."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor
from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor
from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor
from transformers.models.glm4v.image_processing_glm4v import Glm4vImageProcessor
from transformers.models.glm46v.image_processing_glm46v import Glm46VImageProcessor
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.idefics3.image_processing_idefics3 import Idefics3ImageProcessor
from transformers.models.llava.image_processing_llava import LlavaImageProcessor
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.pixtral.image_processing_pixtral import PixtralImageProcessor
from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor
from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor

from sparsemm_lmms.visual_heads.token_grid import GRIDS, GridFamily

from . import tiny

IMAGE = tiny.IDS["<image>"]
RAW = dict(do_rescale=True, do_normalize=False, image_mean=[0.0] * 3, image_std=[1.0] * 3)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14)
CLIP = dict(model_type="clip_vision_model", image_size=56, projection_dim=16, **VISION)
SIGLIP = dict(model_type="siglip_vision_model", vision_use_head=False, **VISION)
TEXT = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    vocab_size=tiny.VOCABULARY,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


class PatchMeans(nn.Module):
    """The mean colour of each patch of 14 pixels, after ``first`` class tokens."""

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.first = first

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> SimpleNamespace:
        means = nn.functional.avg_pool2d(pixel_values, 14).flatten(2).transpose(1, 2)
        tokens = torch.cat([torch.full_like(means[:, : self.first], 7.0), means], dim=1)
        return SimpleNamespace(hidden_states=[tokens], last_hidden_state=tokens, pooler_output=None)


class MeanOfFour(nn.Module):
    """What a layer behind a merge of 2 x 2 patches gets, [..., 4 * channels], to the mean of the four."""

    def __init__(self, colours_first: bool = False) -> None:
        super().__init__()
        self.colours_first = colours_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.colours_first:
            return x.unflatten(-1, (-1, 4)).mean(-1)
        return x.unflatten(-1, (4, 3)).mean(-2)


class Means(nn.Module):
    """Any function, as a part of a tower that has a dtype."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function, self.anything = function, nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self.function(x)


def colours(x: torch.Tensor) -> torch.Tensor:
    """Mean colour of each patch, [patches, 3 * times * height * width]."""
    return x.view(len(x), 3, -1).mean(-1)


@dataclass
class Kind:
    """A model, its processor, its grid, and the text that stands for an image before the processor has seen it."""

    model: Any
    processor: Any
    grid: GridFamily
    mark: str = "<image>"

    def read(self, images: list[Any], text: list[str] | None = None) -> tuple[dict[str, Any], torch.Tensor]:
        """Inputs, and the features [image tokens, 3] that the model puts at its image tokens, in prompt order."""
        inputs = dict(
            self.processor(
                text=text or [self.mark * len(images)],
                images=images,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
        )
        names = ("image_sizes", "pixel_attention_mask", "batch_num_images", "image_grid_thw", "image_position_ids")
        more = {name: inputs[name] for name in names if name in inputs}
        config = self.model.config
        for name in ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio"):
            if hasattr(config, name):
                more[name] = getattr(config, name)
        with torch.no_grad():
            features = self.model.model.get_image_features(
                inputs["pixel_values"], return_dict=True, **more
            ).pooler_output
        rows = list(features) if not isinstance(features, torch.Tensor) else [features.reshape(-1, 3)]
        return inputs, torch.cat(rows).reshape(-1, 3)


def tokenizer(**named: str) -> Any:
    tokens = tiny.tokenizer()
    for name, token in named.items():
        setattr(tokens, name, token)
        setattr(tokens, f"{name}_id", tiny.IDS[token])
    return tokens


def _kind(name: str, model: Any, processor: Any, mark: str = "<image>") -> Kind:
    return Kind(model.eval(), processor, GRIDS[name](model.config, [IMAGE]), mark)


def _llava(image_processor: Any, vision: dict[str, Any], strategy: str, first: int) -> Kind:
    config = transformers.LlavaConfig(
        text_config=dict(model_type="llama", **TEXT),
        vision_config=vision,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.multi_modal_projector = PatchMeans(first), nn.Identity()
    processor = transformers.LlavaProcessor(
        image_processor,
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=first,
    )
    return _kind("fixed", model, processor)


def llava_cropped() -> Kind:
    crop = dict(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return _llava(CLIPImageProcessor(**crop, **RAW), CLIP, "default", 1)


def llava_with_class_token() -> Kind:
    crop = dict(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return _llava(CLIPImageProcessor(**crop, **RAW), CLIP, "full", 1)


def llava_crop_beyond() -> Kind:
    """Resized to less than the crop: padded all around."""
    crop = dict(size={"shortest_edge": 42}, crop_size={"height": 71, "width": 71})
    return _llava(CLIPImageProcessor(**crop, **RAW), dict(CLIP, image_size=71), "default", 1)


def llava_padded() -> Kind:
    crop = dict(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_pad=True)
    return _llava(LlavaImageProcessor(**crop, **RAW), CLIP, "default", 1)


def llava_stretched() -> Kind:
    """A tower whose patches don't fill the picture, as SigLIP's 27 x 14 of 384 pixels."""
    return _llava(SiglipImageProcessor(size={"height": 60, "width": 60}, **RAW), dict(SIGLIP, image_size=60), "full", 0)


def paligemma() -> Kind:
    config = transformers.PaliGemmaConfig(
        text_config=dict(model_type="gemma", **TEXT),
        vision_config=dict(SIGLIP, image_size=56, projection_dim=16),
        image_token_index=IMAGE,
        projection_dim=16,
    )
    model = transformers.PaliGemmaForConditionalGeneration(config)
    model.model.vision_tower, model.model.multi_modal_projector = PatchMeans(), nn.Identity()
    image_processor = SiglipImageProcessor(size={"height": 56, "width": 56}, **RAW)
    image_processor.image_seq_length = 16
    return _kind("fixed", model, transformers.PaliGemmaProcessor(image_processor, tokenizer()))


def _pixtral_tower(tower: Any) -> None:
    """The real tower with weights that carry the mean colours through as its first three channels."""
    with torch.no_grad():
        tower.patch_conv.weight.zero_()
        tower.patch_conv.weight[range(3), range(3)] = 1 / 14**2
        for layer in tower.transformer.layers:
            layer.attention.o_proj.weight.zero_()
            layer.feed_forward.down_proj.weight.zero_()
    tower.ln_pre = nn.Identity()


class Colours(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :3]


PIXTRAL = dict(model_type="pixtral", image_size=112, head_dim=8, **VISION)


def _pixtral_processor(merge: int) -> Any:
    return transformers.PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 140}, patch_size={"height": 14, "width": 14}, **RAW),
        tokenizer(),
        patch_size=14,
        spatial_merge_size=merge,
        image_token="<image>",
        image_break_token="<|vs|>",
        image_end_token="<|ve|>",
    )


def mistral3() -> Kind:
    config = transformers.Mistral3Config(
        text_config=dict(model_type="mistral", **TEXT),
        vision_config=PIXTRAL,
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    model = transformers.Mistral3ForConditionalGeneration(config)
    _pixtral_tower(model.model.vision_tower)
    projector = model.model.multi_modal_projector
    projector.patch_merger.merging_layer = MeanOfFour(colours_first=True)
    projector.norm = projector.linear_1 = projector.act = nn.Identity()
    projector.linear_2 = Colours()
    return _kind("rows", model, _pixtral_processor(2))


def pixtral() -> Kind:
    config = transformers.LlavaConfig(
        text_config=dict(model_type="mistral", **TEXT),
        vision_config=PIXTRAL,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = transformers.LlavaForConditionalGeneration(config)
    _pixtral_tower(model.model.vision_tower)
    model.model.multi_modal_projector = Colours()
    return _kind("rows", model, _pixtral_processor(1))


def internvl(**options: Any) -> Kind:
    vision = dict(VISION, patch_size=[14, 14], image_size=[56, 56])
    config = transformers.InternVLConfig(
        text_config=dict(model_type="qwen2", **TEXT), vision_config=vision, image_token_id=IMAGE, image_seq_length=4
    )
    model = transformers.InternVLForConditionalGeneration(config)
    model.model.vision_tower, model.model.multi_modal_projector = PatchMeans(1), MeanOfFour()
    named = dict(start_image_token="<|vs|>", end_image_token="<|ve|>", context_image_token="<image>")
    processor = transformers.InternVLProcessor(
        GotOcr2ImageProcessor(size={"height": 56, "width": 56}, **(options | RAW)),
        tokenizer(**named),
        transformers.InternVLVideoProcessor(size={"height": 56, "width": 56}),
        image_seq_length=4,
        chat_template=tiny.LLAVA_TEMPLATE,
    )
    return _kind("tiles", model, processor)


def _idefics3(name: str, image_processor: Any) -> Kind:
    config = getattr(transformers, f"{name}Config")(
        text_config=dict(model_type="llama", **TEXT),
        vision_config=dict(VISION, image_size=56),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    model.model.vision_model, model.model.connector.modality_projection = PatchMeans(), MeanOfFour()
    image_processor.do_normalize, image_processor.image_mean = True, [-1e-6] * 3  # a tile of zeros counts as none
    # SmolVLM's own processor writes the same tokens, but needs num2words for its videos' prompts.
    return _kind("tiles", model, transformers.Idefics3Processor(image_processor, tokenizer(), image_seq_len=4))


def idefics3(longest: int = 224, **options: Any) -> Kind:
    sizes = dict(size={"longest_edge": longest}, max_image_size={"longest_edge": 56})
    return _idefics3("Idefics3", Idefics3ImageProcessor(**(sizes | options | RAW)))


def smolvlm() -> Kind:
    sizes = dict(size={"longest_edge": 224}, max_image_size={"longest_edge": 56})
    return _idefics3("SmolVLM", SmolVLMImageProcessor(**sizes, **RAW))


def gemma3(**pan_and_scan: Any) -> Kind:
    config = transformers.Gemma3Config(
        text_config=TEXT,
        vision_config=dict(SIGLIP, image_size=56),
        mm_tokens_per_image=4,
        boi_token_index=tiny.IDS["<|vs|>"],
        eoi_token_index=tiny.IDS["<|ve|>"],
        image_token_index=IMAGE,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.model.vision_tower = PatchMeans()
    projector = model.model.multi_modal_projector
    projector.mm_soft_emb_norm, projector.mm_input_projection_weight = nn.Identity(), nn.Parameter(torch.eye(3))
    named = tokenizer(boi_token="<|vs|>", eoi_token="<|ve|>")
    image_processor = Gemma3ImageProcessor(size={"height": 56, "width": 56}, **RAW)
    processor = transformers.Gemma3Processor(image_processor, named, image_seq_length=4)
    processor.images_kwargs = processor.images_kwargs | pan_and_scan
    return _kind("tiles", model, processor, mark="<|vs|>")


MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
AREA = {"shortest_edge": 64**2, "longest_edge": 320**2}
PATCHES = {"image_token_id": IMAGE, "video_token_id": tiny.IDS["<video>"]}


def qwen3(name: str, **text: Any) -> Kind:
    """Qwen3-VL and 3.5: patches of 16."""
    config = getattr(transformers, f"{name}Config")(
        text_config=dict(TEXT, rope_parameters=MROPE, **text),
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, num_position_embeddings=64
        ),
        vision_start_token_id=tiny.IDS["<|vs|>"],
        vision_end_token_id=tiny.IDS["<|ve|>"],
        **PATCHES,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    visual = model.model.visual
    visual.blocks, visual.patch_embed = nn.ModuleList(), Means(colours)
    visual.pos_embed = nn.Embedding.from_pretrained(torch.zeros(64, 3))
    visual.merger = Means(lambda x: x.view(-1, 4, 3).mean(1))
    images = transformers.Qwen2VLImageProcessor(patch_size=16, size=AREA, **RAW)
    processor = transformers.Qwen3VLProcessor(images, tokenizer(), transformers.Qwen3VLVideoProcessor())
    return _kind("patches", model, processor)


def qwen3_5() -> Kind:
    linear = dict(
        linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=1, linear_num_value_heads=2,
        num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    return qwen3("Qwen3_5", **linear)


def glm(name: str) -> Kind:
    text = {"model_type": "glm4v_text"} if name == "Glm46V" else {}
    config = getattr(transformers, f"{name}Config")(
        text_config=dict(TEXT, rope_parameters=MROPE, **text),
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, image_size=56, patch_size=14, out_hidden_size=16
        ),
        **PATCHES,
        **{
            f"{part}_token_id": 200 + i
            for i, part in enumerate(("image_start", "image_end", "video_start", "video_end"))
        },
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    visual = model.model.visual
    visual.blocks, visual.patch_embed, visual.embeddings = nn.ModuleList(), Means(colours), Means(lambda x: x)
    visual.post_conv_layernorm = visual.post_layernorm = visual.merger = nn.Identity()
    visual.downsample, visual.config = Means(lambda x: x.mean((-1, -2))), deepcopy(config.vision_config)
    visual.config.out_hidden_size = 3
    images = {"Glm46V": Glm46VImageProcessor, "Glm4v": Glm4vImageProcessor}[name](size=AREA, **RAW)
    video = getattr(transformers, f"{name}VideoProcessor")()
    return _kind("patches", model, getattr(transformers, f"{name}Processor")(images, tokenizer(), video))


def gemma4() -> Kind:
    """Patches of 16, three by three to a token."""
    config = transformers.Gemma4Config(
        text_config=dict(
            TEXT, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=16,
            global_head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=tiny.VOCABULARY,
        ),
        vision_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            head_dim=8, position_embedding_size=512,
        ),
        audio_config=None,
        boi_token_id=tiny.IDS["<|vs|>"],
        eoi_token_id=tiny.IDS["<|ve|>"],
        audio_token_id=tiny.VOCABULARY + 1,
        **PATCHES,
    )  # fmt: skip
    model = transformers.Gemma4ForConditionalGeneration(config)
    tower = model.model.vision_tower
    tower.patch_embedder = Means(lambda x: x.unflatten(-1, (-1, 3)).mean(-2))  # colours last in a patch
    tower.encoder = Means(lambda x: x)
    tower.encoder.forward = lambda inputs_embeds, **_: SimpleNamespace(last_hidden_state=inputs_embeds)
    tower.pooler.root_hidden_size, model.model.embed_vision.forward = 1.0, lambda inputs_embeds: inputs_embeds
    named = tokenizer(boi_token="<|vs|>", eoi_token="<|ve|>", boa_token="</s>", eoa_token="</s>", audio_token="</s>")
    sizes = dict(max_soft_tokens=70)
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(**sizes, **RAW),
        named,
        Gemma4VideoProcessor(**sizes),
        image_seq_length=70,
    )
    return _kind("patches", model, processor)


def llava_onevision(most: int = 2) -> Kind:
    """Tiles of 60 pixels, of which 4 patches see 56; at most ``most`` tiles' tokens."""
    pinpoints = [[60 * rows, 60 * columns] for rows in range(1, 5) for columns in range(1, 5)]
    config = transformers.LlavaOnevisionConfig(
        text_config=dict(model_type="qwen2", **TEXT),
        vision_config=dict(SIGLIP, image_size=60),
        image_token_index=IMAGE,
        video_token_index=tiny.IDS["<video>"],
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio=f"anyres_max_{most}",
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config)
    model.model.vision_tower, model.model.multi_modal_projector = PatchMeans(), nn.Identity()
    model.model.image_newline = nn.Parameter(torch.full((3,), -5.0))
    processor = transformers.LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size={"height": 60, "width": 60}, image_grid_pinpoints=pinpoints, **RAW),
        tokenizer(),
        transformers.LlavaOnevisionVideoProcessor(size={"height": 60, "width": 60}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{most}",
    )
    return _kind("anyres", model, processor)
