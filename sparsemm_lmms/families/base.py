"""What a model family states about itself. No torch here, and no host: every start of lmms-eval reads the families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FrameLimits:
    """Videos whose frames are sampled and resized one by one, as qwen-vl-utils does, which the host's own model uses.

    Attributes:
        max_num_frames, fps: what is sampled where the user says nothing.
        total_pixels: of all frames of a video; then `max_pixels` is for images only. None: qwen-vl-utils' own number,
            and `max_pixels` holds for each frame.
    """

    max_num_frames: int = 32
    fps: float | None = None
    total_pixels: int | None = None


@dataclass(frozen=True)
class LmmsEvalDefaults:
    """What lmms-eval's own model of the family uses where a task or the user says nothing.

    Attributes:
        prompts_of: id of that model. Task files choose prompts by the literal `--model`, so ours are looked up as it.
        max_new_tokens: length of an answer at most.
        system_prompt: text, or None for none.
        strip_answers: whether white space around answers is removed.
        pixel_limits: (min_pixels, max_pixels) to which images are resized, or None where images have no such limits.
        enable_thinking: told to the chat template, or None for nothing; where True, an answer is what
            stands behind `</think>`.
        frame_limits: how frames of videos are sampled and resized; None leaves their size to the processor.
    """

    prompts_of: str
    max_new_tokens: int
    system_prompt: str | None = None
    strip_answers: bool = False
    pixel_limits: tuple[int, int] | None = None
    enable_thinking: bool | None = None
    frame_limits: FrameLimits | None = None


GENERIC = LmmsEvalDefaults(prompts_of="huggingface", max_new_tokens=4096)
"""Defaults of checkpoints without a family: those of the host's model for any checkpoint."""


@dataclass(frozen=True)
class VLMEvalKit:
    """The family in VLMEvalKit.

    Attributes:
        stock: the host's class in `vlmeval.vlm`, whose prompts and image handling are used, or None where it has none
            for the family: the prompts are then those of the datasets.
        name: our class there, for `--config` files.
        checkpoints: first word of our names (no underscore in it) -> the host's own name of that checkpoint, or None
            where it has none. The host passes arguments of its own to names with `Qwen2-VL` or `Qwen2.5-VL`.
        repositories: word -> repository, where the host has no name for it or names a checkpoint of another format; a
            word without both is the packaged demo model.
        spread: those words whose checkpoints need several GPUs.
        reads_video: whether videos are read here, where the family reads them.
        prepares_content: whether the stock class's `_prepare_content` writes the message and qwen-vl-utils reads the
            images and videos in it.
        writes_prompts: whether the stock class's `generate_inner` writes the prompt, up to where it asks processor or
            model; else texts and images are passed as they are, in the checkpoint's chat template.
        writes_turns: whether those prompts hold the turns of the talk, so that no chat template is used.
        image_settings: what the image processor is set to for a question: by the object of the stock class (None
            unless `writes_prompts`), the dataset and the number of images.
        cuts_answers: whether the stock class's `output_process` finds the answer in prompt and answer together.
        strips_answers: whether it removes white space around answers.
        extracts_answers: its method that finds the answer in what was generated, or None.
        max_new_tokens: length of an answer at most, as in the stock class.
        attributes: what methods of the stock class read from the object, set by its constructor, which is not run.
        also: further stock classes of the family, for other checkpoints.
    """

    stock: str | None
    name: str
    checkpoints: Mapping[str, str | None]
    repositories: Mapping[str, str] = field(default_factory=dict)
    spread: tuple[str, ...] = ()
    reads_video: bool = True
    prepares_content: bool = False
    writes_prompts: bool = False
    writes_turns: bool = False
    image_settings: Callable[[Any, str | None, int], Mapping[str, Any]] | None = None
    cuts_answers: bool = False
    strips_answers: bool = False
    extracts_answers: str | None = None
    max_new_tokens: int = 2048
    attributes: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[VLMEvalKit, ...] = ()

    @property
    def adapters(self) -> tuple[VLMEvalKit, ...]:
        """This one and the further ones."""
        return (self, *self.also)


@dataclass(frozen=True)
class BenchModel:
    """A model with random weights for `sparsemm-lmms bench`.

    Attributes:
        config: values of its config; what all such models share (length, end tokens) is added.
        image_side: largest side of an image of its prompts in tokens, for grids of any size.
    """

    config: Mapping[str, Any]
    image_side: int = 0


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`. The name of the family is that type: `<model_type>_<method>` are its models.

    Attributes:
        model_type: `model_type` in the checkpoint's config.json.
        architecture: class in transformers.
        also: further `model_type` -> class in transformers, for variants (with experts, say) that share all the rest.
        pretrained: default checkpoint.
        vision_tokens: fields of the config with the ids of the image token and, if there is one, the video token.
        grid: which kind of token grid its images have (`visual_heads.token_grid.GRIDS`), or None: no head scores can be
            found for it, and those of a file are used.
        lmms_eval: defaults of that host.
        vlmevalkit: the family in that host, or None if it has no such model.
        reads_video: whether video is understood.
        in_papers: name of a checkpoint in lower case, without `-hf` -> what published tables call it.
        bench: models of `sparsemm-lmms bench` by name.

    Raises:
        ValueError: for names that lmms-eval could not resolve.
    """

    model_type: str
    architecture: str
    pretrained: str
    vision_tokens: tuple[str, ...]
    grid: str | None
    lmms_eval: LmmsEvalDefaults
    also: Mapping[str, str] = field(default_factory=dict)
    vlmevalkit: VLMEvalKit | None = None
    reads_video: bool = False
    in_papers: Mapping[str, str] = field(default_factory=dict)
    bench: Mapping[str, BenchModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.model_type:
            raise ValueError("model_type is empty; give the model_type of the family's config.json.")
        for name in self.architectures.values():
            if not name.isidentifier():
                raise ValueError(f"architecture={name!r} is no class of transformers; give its name.")
        if isinstance(self.vision_tokens, str) or not self.vision_tokens:
            raise ValueError(
                f"vision_tokens={self.vision_tokens!r} is no tuple of fields; give the config's field with the id of "
                "the image token, and that of the video token where there is one."
            )
        if not isinstance(self.lmms_eval, LmmsEvalDefaults):
            raise ValueError(f"lmms_eval={self.lmms_eval!r} is no LmmsEvalDefaults.")
        if not isinstance(self.vlmevalkit, VLMEvalKit | None):
            raise ValueError(f"vlmevalkit={self.vlmevalkit!r} is neither a VLMEvalKit nor None.")
        for adapter in self.vlmevalkit.adapters if self.vlmevalkit else ():
            for word in adapter.checkpoints:
                if not word or "_" in word:
                    raise ValueError(
                        f"checkpoint {word!r} must be a word without underscore: the method stands behind it."
                    )

    @property
    def architectures(self) -> dict[str, str]:
        """Every `model_type` whose checkpoints it runs -> class in transformers."""
        return {self.model_type: self.architecture, **self.also}

    @property
    def class_word(self) -> str:
        """How the names of its classes begin: the architecture without `ForConditionalGeneration`."""
        return self.architecture.partition("For")[0]

    def class_name(self, method: str) -> str:
        """Name of the class of one method, for example `...LocalWindow` for `local_window`."""
        return self.class_word + "".join(word.capitalize() for word in method.split("_"))

    def vision_ids(self, config: Any) -> tuple[int, ...]:
        """Ids of the tokens that stand for a piece of an image or a video, in the order of `vision_tokens`."""
        return tuple(getattr(config, name) for name in self.vision_tokens)
