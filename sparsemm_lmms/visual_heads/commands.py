"""`sparsemm-lmms chase`, `heads`, `budgets` and `show`."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemm_lmms.demo import FAMILIES as DEMO_FAMILIES
from sparsemm_lmms.families import ANY, FAMILIES
from sparsemm_lmms.head_scores import HeadScores, write_atomically

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Find, look at and spend visual heads.")


ModelFamily = Enum("ModelFamily", {name: name for name in (*FAMILIES, ANY)}, type=str)  # type: ignore[misc]
DEFAULT_FAMILY = ModelFamily(DEMO_FAMILIES[0])


class ReadingMode(str, Enum):
    free = "free"
    teacher = "teacher"


class ReadingKinds(str, Enum):
    transcribe = "transcribe"
    mixture = "mixture"


class CountedViews(str, Enum):
    high = "high"
    all = "all"


@app.command()
def chase(
    output: Annotated[Path, typer.Option(help="Score file to write (JSON).")],
    model: Annotated[ModelFamily, typer.Option(help=f"Family of the model; {ANY}: any.")] = DEFAULT_FAMILY,
    pretrained: Annotated[str, typer.Option(help="Hugging Face id, folder, or demo.")] = "demo",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    images: Annotated[int, typer.Option(min=1, help="Calibration images (the paper: 1000).")] = 1000,
    data: Annotated[
        str, typer.Option(help="generated, demo, folder:PATH, or synthdog:PATH_OR_HUB_ID; default: by the model.")
    ] = "",
    readings: Annotated[
        ReadingKinds,
        typer.Option(
            help="transcribe: the paper's prompt. mixture: by page, drawn, everything, one line, or the word after a "
            "given one; on demo pages everything, one line, or one column."
        ),
    ] = ReadingKinds.transcribe,
    prompt: Annotated[str, typer.Option(help="Transcription prompt in place of the paper's.")] = "",
    mode: Annotated[
        ReadingMode, typer.Option(help="free: greedy decoding (paper); teacher: one forward on the known text.")
    ] = ReadingMode.free,
    views: Annotated[
        CountedViews, typer.Option(help="Image tokens that count beside a base view: high (paper) or all.")
    ] = CountedViews.high,
    token_text: Annotated[str, typer.Option(help="How a token's text is matched: stripped, decoded, piece.")] = (
        "stripped"
    ),
    per_token: Annotated[bool, typer.Option(help="Average over a sample's tokens where the paper sums.")] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of free running.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, help="Of the generated images and the mixture.")] = 0,
    limit: Annotated[int, typer.Option(min=0, help="Stop after so many inputs; 0: all.")] = 0,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu; default CUDA before CPU.")] = "",
    top: Annotated[int, typer.Option(min=0, help="Heads to print.")] = 10,
    overwrite: Annotated[bool, typer.Option(help="Replace an output of another model, data or settings.")] = False,
    retention_images: Annotated[
        int, typer.Option(min=0, help="Of the first so many images, also measure what heads hold; for waterfill.")
    ] = 64,
) -> None:
    """Score every head of a model by how often it looks at the word being written. A killed run goes on."""
    from sparsemm_lmms.visual_heads.chase import ChaseSettings, score_heads

    settings = ChaseSettings(
        mode.value,
        views.value,
        token_text,  # type: ignore[arg-type]
        batch_size,
        max_new_tokens,
        per_token,
        retention_images,
    )
    data = data or ("demo" if pretrained == "demo" else "generated")
    source = calibration_source(data, images, readings.value, prompt, seed)
    _, loaded, processor = named_model(model, pretrained, revision, device)
    name = f"demo/{model.value}" if pretrained == "demo" else pretrained
    scores = score_heads(
        loaded, processor, source, output, settings,
        limit=min(images, limit or images), model_id=name, revision=revision, overwrite=overwrite,
    )  # fmt: skip
    _print_summary(scores, top)
    print(f"Written to {output}. Use it with head_scores={output}.")


@app.command()
def heads(
    files: Annotated[list[Path], typer.Argument(help="One score file, or two to compare.")],
    plot: Annotated[Path | None, typer.Option(help="Picture to draw (.png or .svg).")] = None,
    summary: Annotated[Path | None, typer.Option(help="The printed numbers as JSON.")] = None,
    top: Annotated[int, typer.Option(min=0, help="Heads to print.")] = 10,
) -> None:
    """Show where the visual heads of a score file are and how far its images agree, or compare two files."""
    from sparsemm_lmms.visual_heads.summary import compare, in_words, summarise

    if len(files) > 2:
        raise ValueError(f"heads takes one file or two, got {len(files)}.")
    tables = [HeadScores.load(file) for file in files]
    for table in tables:
        _print_summary(table, top)
    files_told = [{"file": file.name, **summarise(table)} for file, table in zip(files, tables, strict=True)]
    facts: dict[str, Any] = {"files": files_told}
    if len(tables) == 2:
        facts["agreement"] = compare(*tables)
        print(f"The two files: {in_words(facts['agreement'])}")
    if summary is not None:
        write_atomically(summary, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        print(f"Written: {summary}")
    if plot is not None:
        from sparsemm_lmms.visual_heads.plots import plot_heads

        print(f"Drawn: {plot_heads(tables[0], plot, tables[1] if len(tables) == 2 else None)}")


@app.command()
def budgets(
    file: Annotated[Path, typer.Argument(help="Score file.")],
    budget: Annotated[int, typer.Option(min=1, help="Tokens per kv head on average, window included.")] = 256,
    window_size: Annotated[int, typer.Option(min=1)] = 32,
    ratio: Annotated[float, typer.Option(min=0, max=1, help="Share that every head gets.")] = 0.1,
    kv_heads: Annotated[int, typer.Option(min=0, help="KV heads a layer; 0: from the file, else no grouping.")] = 0,
    prompt_length: Annotated[int, typer.Option(min=0, help="Clamp to a prompt of so many tokens; 0: don't.")] = 0,
    redistribute: Annotated[bool, typer.Option(help="Give what a head can't use to others (needs a prompt).")] = False,
    method: Annotated[str, typer.Option(help="sparsemm, or another method of head scores.")] = "sparsemm",
    plot: Annotated[Path | None, typer.Option(help="Picture to draw (.png or .svg).")] = None,
) -> None:
    """Show how many tokens each layer and kv head gets by its score, and the sum against the nominal budget."""
    from sparsemm_lmms.config import CompressionConfig
    from sparsemm_lmms.visual_heads.budget_table import budget_table

    scores = HeadScores.load(file)
    config = CompressionConfig(
        method=method, budget=budget, window_size=window_size, ratio=ratio, redistribute=redistribute
    )
    groups = kv_heads or int(scores.provenance.get("kv_heads") or scores.heads)
    table = budget_table(scores, groups, config, prompt_length or None)
    nominal = min(budget, prompt_length) if prompt_length else budget
    _print_budgets(table, nominal)
    if plot is not None:
        from sparsemm_lmms.visual_heads.plots import plot_budgets

        title = f"{file.name}, budget {budget}" + (f", prompt of {prompt_length}" if prompt_length else "")
        print(f"Drawn: {plot_budgets(table, nominal, plot, title, min(window_size, prompt_length or window_size))}")


@app.command()
def show(
    image: Annotated[str, typer.Option(help="Picture to ask about; demo:K for calibration page K of the demo.")],
    plot: Annotated[Path, typer.Option(help="Picture to draw (.png or .svg).")],
    question: Annotated[str, typer.Option(help="Question about it; default: the demo page's own.")] = "",
    model: Annotated[ModelFamily, typer.Option(help=f"Family of the model; {ANY}: any.")] = DEFAULT_FAMILY,
    pretrained: Annotated[str, typer.Option(help="Hugging Face id, folder, or demo.")] = "demo",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    head_scores: Annotated[str, typer.Option(help="auto, a score file, random, ...")] = "auto",
    heads: Annotated[int, typer.Option(min=1, help="So many visual heads, and so many others.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Answer tokens to draw.")] = 6,
    method: Annotated[str, typer.Option(help="Method of the retention map.")] = "sparsemm",
    budget: Annotated[int, typer.Option(min=1, help="Budget of the retention map.")] = 64,
    window_size: Annotated[int, typer.Option(min=1)] = 32,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu; default CUDA before CPU.")] = "",
    foreign_head_scores: Annotated[bool, typer.Option(help="Take a score file of another model.")] = False,
) -> None:
    """Draw where visual heads and others look while the model answers, and what the cache keeps of the image."""
    from sparsemm_lmms.config import CompressionConfig
    from sparsemm_lmms.visual_heads.plots import plot_view
    from sparsemm_lmms.visual_heads.resolve import resolve_head_scores
    from sparsemm_lmms.visual_heads.show import view_heads

    compression = CompressionConfig(method=method, budget=budget, window_size=window_size)
    picture, question = _picture(image, question)
    path, loaded, processor = named_model(model, pretrained, revision, device)
    scores = resolve_head_scores(
        head_scores, loaded.config, path, revision, model=loaded, processor=processor, foreign=foreign_head_scores
    )
    view = view_heads(
        loaded, processor, picture, question, scores, count=heads, max_tokens=tokens, compression=compression
    )
    print(f"Answer: {''.join(view.tokens)}")
    title = f"{question}  ({method}, budget {budget})"
    print(f"Drawn: {plot_view(view, plot, title)}")


def _picture(image: str, question: str) -> tuple[Any, str]:
    """The picture that ``--image`` names, and the question about it."""
    from sparsemm_lmms.visual_heads.demo_pages import DemoPages
    from sparsemm_lmms.visual_heads.samples import CalibrationSample
    from sparsemm_lmms.visual_heads.sources import open_image

    kind, _, page = image.partition(":")
    if kind == "demo" and page.isdecimal():
        (sample,) = DemoPages(1, first=int(page))
        if not isinstance(sample, CalibrationSample):
            raise ValueError(f"--image {image}: {sample.reason} Take another page.")
        return sample.images[0], question or sample.prompt
    picture = open_image(Path(image))
    if not question:
        raise ValueError(f"--image {image} needs a --question about it.")
    return picture, question


def named_model(family: ModelFamily, pretrained: str, revision: str, device: str) -> tuple[str, Any, Any]:
    """(path, model, processor) of ``--pretrained``, checked to be of ``--model``'s family."""
    from sparsemm_lmms.visual_heads.resolve import load_config, load_model
    from sparsemm_lmms.visual_heads.token_grid import grid_for

    path = pretrained
    if pretrained == "demo":
        from sparsemm_lmms.demo import model_path

        if family.value == ANY:
            raise ValueError(f"--model {ANY} needs --pretrained: a Hugging Face id, or a folder.")
        path = str(model_path(family.value))
    config = load_config(path, revision)
    if family.value != ANY and config.model_type not in FAMILIES[family.value].architectures:
        raise ValueError(f"{pretrained} is a {config.model_type} model, not {family.value}; set --model to it.")
    grid_for(config)  # refused before any weight is read
    loaded, processor = load_model(path, revision, device or None)
    return path, loaded, processor


def calibration_source(data: str, images: int, readings: str = "transcribe", prompt: str = "", seed: int = 0) -> Any:
    """The samples that ``--data`` names."""
    from sparsemm_lmms.visual_heads.demo_pages import DemoPages
    from sparsemm_lmms.visual_heads.render import GeneratedPages
    from sparsemm_lmms.visual_heads.samples import PAPER_PROMPT
    from sparsemm_lmms.visual_heads.sources import FolderPages, SynthDogPages

    kind, _, where = data.partition(":")
    options: dict[str, Any] = {"readings": readings, "prompt": prompt or PAPER_PROMPT, "seed": seed}
    if data == "generated":
        return GeneratedPages(images, **options)
    if data == "demo":
        if prompt:
            raise ValueError("--prompt does not apply to --data demo: its models know their own questions only.")
        return DemoPages(images, "mixed" if readings == "mixture" else "all", seed)
    if kind == "folder" and where:
        return FolderPages(where, **options)
    if kind == "synthdog" and where:
        return SynthDogPages(where, **options)
    raise ValueError(f"--data {data!r} must be generated, demo, folder:PATH or synthdog:PATH_OR_HUB_ID.")


def _print_summary(scores: HeadScores, top: int) -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from sparsemm_lmms.visual_heads.summary import sentences

    facts, values = scores.provenance, scores.values
    table = Table(title=f"{facts.get('path') or facts.get('model', '')}: {scores.layers} layers x {scores.heads} heads")
    for column in ("rank", "layer", "head", "score", "std. error", "share", "sum of shares"):
        table.add_column(column, justify="right")
    order = np.argsort(-values, axis=None, kind="stable")[:top]
    total = 0.0
    for rank, (layer, head) in enumerate(zip(*np.unravel_index(order, values.shape), strict=True), start=1):
        share = values[layer, head] / values.sum()
        total += share
        error = f"{scores.stderr[layer, head]:.4g}" if scores.stderr is not None else "-"
        row = (str(rank), str(layer), str(head), f"{values[layer, head]:.4g}", error, f"{share:.1%}", f"{total:.1%}")
        table.add_row(*row)
    console = Console()
    if top:
        console.print(table)
    for sentence in sentences(scores):
        console.print(sentence, soft_wrap=True)


def _print_budgets(table: Any, nominal: int) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"Tokens kept by a head, nominal {nominal}", min_width=40)
    for column in ("layer", "least", "mean", "most"):
        shown.add_column(column, justify="right")
    for layer, row in enumerate(table):
        shown.add_row(str(layer), str(row.min()), f"{row.mean():.1f}", str(row.max()))
    console = Console()
    console.print(shown)
    wanted = nominal * table.size
    console.print(f"Sum {int(table.sum()):,} of nominal {wanted:,} ({table.sum() / wanted:.1%}).")
