"""Infers like VLMEvalKit's run.py: files named after the model, kept between runs, dict answers with their records."""

import argparse
import json
import os
from pathlib import Path

import vlmeval.vlm
from vlmeval.config import supported_VLM
from vlmeval.dataset import Dataset
from vlmeval.smp import load


def load_env():
    pass


def build(config, name):
    if config is None or not config[name]:
        return supported_VLM[name]()
    given = dict(config[name])
    return getattr(vlmeval.vlm, given.pop("class"))(**given)


def infer(model, dataset, out):
    results = json.loads(out.read_text()) if out.is_file() else {}
    model.set_dump_image(dataset.dump_image)
    for line in dataset.rows:
        if line["index"] in results:
            continue
        custom = model.use_custom_prompt(dataset.dataset_name)
        struct = model.build_prompt(line, dataset=dataset.dataset_name) if custom else dataset.build_prompt(line)
        results[line["index"]] = model.generate(message=struct, dataset=dataset.dataset_name)
        out.write_text(json.dumps(results))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--model", nargs="+")
    parser.add_argument("--config")
    parser.add_argument("--work-dir", default="outputs")
    parser.add_argument("--judge")
    args = parser.parse_args()
    config = load(args.config) if args.config else {"model": dict.fromkeys(args.model or []), "data": args.data}
    for name in config["model"]:
        for data in config["data"]:
            folder = Path(args.work_dir) / name
            folder.mkdir(parents=True, exist_ok=True)
            infer(build(config["model"], name), Dataset(data, os.environ["LMUData"]), folder / f"{name}_{data}.json")


if __name__ == "__main__":
    load_env()
    main()
