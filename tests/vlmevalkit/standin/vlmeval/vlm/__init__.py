import re

from PIL import Image
from transformers.image_utils import load_image

from ..dataset import DATASET_TYPE


class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image", "video"]

    def __init__(self):
        self.dump_image_func = None

    def use_custom_prompt(self, dataset):
        return False

    def set_dump_image(self, dump_image_func):
        self.dump_image_func = dump_image_func

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)

    def preproc_content(self, inputs):
        if isinstance(inputs, str):
            return [{"type": "text", "value": inputs}]
        return [inputs] if isinstance(inputs, dict) else inputs

    def generate(self, message, dataset=None):
        message = self.preproc_content(message)
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)

    def chat(self, messages, dataset=None):
        for message in messages:
            message["content"] = self.preproc_content(message["content"])
        while messages:
            try:
                return self.chat_inner(messages, dataset=dataset)
            except Exception:
                messages = messages[1:]
        return "Failed"


class Unloaded(BaseModel):
    INTERLEAVE = True

    def __init__(self, model_path="", **kwargs):
        raise AssertionError("the stock constructor loads a model")


class LLaVA(Unloaded):
    def use_custom_prompt(self, dataset):
        return DATASET_TYPE(dataset) == "MCQ"

    def build_prompt(self, line, dataset=None):
        images = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        return [*images, {"type": "text", "value": f"(llava) {line['question']}"}]


class LLaVA_OneVision_HF(Unloaded):
    VIDEO_LLM = True

    def generate_inner(self, message, dataset=None):
        content, images = "", []
        for part in message:
            if part["type"] == "text":
                content += part["value"]
            else:
                images.append(Image.open(part["value"]).convert("RGB"))
                content += "<image>\n"
        turns = [{"role": "user", "content": [{"type": "text", "text": content}]}]
        prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = self.processor(images=images, text=prompt, return_tensors="pt").to("cuda")
        return self.model.generate(**inputs)


class Gemma3(Unloaded):
    def message2pipeline(self, message):
        content = []
        for part in message:
            text = part["type"] == "text"
            content.append({"type": "text", "text": part["value"]} if text else {"type": "image", "url": part["value"]})
        system = {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}
        return [system, {"role": "user", "content": content}]

    def generate_inner(self, message, dataset=None):
        assert not self.use_vllm
        turns = self.message2pipeline(message)
        inputs = self.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.device)
        return self.model.generate(**inputs)


class Gemma4(Unloaded):
    def message2pipeline(self, message):
        content = []
        for part in message:
            text = part["type"] == "text"
            image = None if text else Image.open(part["value"]).convert("RGB")
            content.append({"type": "text", "text": part["value"]} if text else {"type": "image", "image": image})
        return [{"role": "user", "content": content}]

    @staticmethod
    def extract_response_for_eval(response):
        return response.split("</think>")[-1].strip()

    def generate_inner(self, message, dataset=None):
        turns = self.message2pipeline(message)
        inputs = self.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, enable_thinking=self.enable_thinking
        ).to(self.device)
        return self.extract_response_for_eval(self.model.generate(**inputs))


class GLMThinking(Unloaded):
    def extract_answer(self, response_text, dataset=None):
        answer = re.sub(r"<think>.*?</think>", "", response_text, flags=re.DOTALL).strip()
        match = re.search(r"<\|begin_of_box\|>(.*?)<\|end_of_box\|>", answer, re.DOTALL)
        return answer if dataset == "OCRBench" or match is None else match.group(1).strip()

    def generate_inner(self, message, dataset=None):
        try:
            content = []
            for part in message:
                text = part["type"] == "text"
                kind, value = ("text", part["value"]) if text else ("url", part["value"])
                content.append({"type": part["type"], kind: value})
            if dataset in {"HallusionBench", "POPE"}:
                content.append({"type": "text", "text": "Please answer yes or no."})
            turns = [{"role": "user", "content": content}]
            inputs = self.processor.apply_chat_template(
                turns, tokenize=True, add_generation_prompt=True, return_dict=True
            ).to(self.device)
            return self.extract_answer(self.model.generate(**inputs), dataset=dataset)
        except Exception:
            return "Failed to obtain answer."


class IDEFICS2(Unloaded):
    begins, brief = "User:", {"DocVQA_VAL": "\nGive a very brief answer."}

    def written(self, message, begins, ends="", letter=False):
        prompt, images = begins, []
        for part in message:
            if part["type"] == "image":
                images.append(load_image(part["value"]))
                prompt += "<image>"
            else:
                text = part["value"].strip()
                prompt += text.replace("\nOptions:", "\nChoices:") if letter else text
        mark = " Answer:" if letter else ""
        return f"{prompt}{ends}<end_of_utterance>\nAssistant:{mark}", images

    def build(self, message, dataset):
        if dataset == "HallusionBench":
            return self.written(message, self.begins, "\nAnswer yes or no.")
        return self.written(message, self.begins, self.brief.get(dataset, ""), dataset == "MMBench_DEV_EN")

    def generate_inner(self, message, dataset=None):
        text, images = self.build(message, dataset)
        inputs = self.processor(text=text, images=images, return_tensors="pt")
        return self.model.generate(**inputs).strip()


class SmolVLM(IDEFICS2):
    begins, brief = "<|im_start|>User:", {"OCRBench": "\nGive a very brief answer."}

    def build(self, message, dataset):
        if dataset != "DocVQA_VAL":
            return super().build(message, dataset)
        told = (
            "<|im_start|>User:<image>Give a short and terse answer to the following question. "
            "Do not paraphrase or reformat the text you see in the image. Do not include any full stops. "
            "Just give the answer without additional explanation. Question: "
        )
        text, _ = self.written([part for part in message if part["type"] == "text"], told)
        return text, [load_image(part["value"]) for part in message if part["type"] == "image"]


class SmolVLM2(SmolVLM):
    pass


class InternVLChat(Unloaded):
    def use_custom_prompt(self, dataset):
        return self._use_custom_prompt and dataset != "MMDU"

    def build_prompt(self, line, dataset=None):
        short = "" if self.use_mpo_prompt or DATASET_TYPE(dataset) == "MCQ" else "\nAnswer in a word."
        images = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        return [{"type": "text", "value": line["question"] + short}, *images]

    def set_max_num(self, dataset):
        self.total_max_num = 64
        self.max_num = {"DocVQA_VAL": 18, "OCRBench": 24}.get(dataset, 6)

    def generate_inner(self, message, dataset=None):
        self.set_max_num(dataset)
        assert self.version == "V2.0"
        text = "\n".join(part["value"] for part in message if part["type"] == "text")
        images = [part for part in message if part["type"] == "image"]
        numbered = "".join(f"Image-{i}: <image>\n" for i, _ in enumerate(images, 1))
        question = ("<image>\n" if len(images) == 1 else numbered) + text
        return self.model.chat(
            self.tokenizer,
            pixel_values=None,
            num_patches_list=[],
            question=question,
            generation_config={},
            verbose=True,
        )


class LLaVA_Next(BaseModel):
    INTERLEAVE = True

    def __init__(self, model_path="llava-hf/llava-v1.6-vicuna-7b-hf", **kwargs):
        raise AssertionError("the stock constructor loads a model")

    def output_process(self, answer):
        return answer.split("ASSISTANT:")[1].strip() if "ASSISTANT:" in answer else answer

    def use_custom_prompt(self, dataset):
        return DATASET_TYPE(dataset) == "MCQ"

    def build_prompt(self, line, dataset=None):
        choices = [f"{letter}: {line[letter]}" for letter in "ABCD" if letter in line]
        text = "\n".join(["(llava)", line["question"], *choices])
        images = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        return [*images, {"type": "text", "value": text}]


class Qwen2VLChat(BaseModel):
    INTERLEAVE = True
    VIDEO_LLM = True

    def __init__(
        self,
        model_path,
        min_pixels=None,
        max_pixels=None,
        total_pixels=None,
        max_new_tokens=2048,
        top_p=0.001,
        top_k=1,
        temperature=0.01,
        repetition_penalty=1.0,
        do_sample=True,
        use_custom_prompt=True,
        system_prompt=None,
        **kwargs,
    ):
        raise AssertionError("the stock constructor loads a model")

    def use_custom_prompt(self, dataset):
        return self._use_custom_prompt and DATASET_TYPE(dataset, default=None) is not None

    def build_prompt(self, line, dataset):
        images = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        return [*images, {"type": "text", "value": f"(qwen) {line['question']}"}]

    def _prepare_content(self, inputs, dataset=None):
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels, "total_pixels": self.total_pixels}
        if dataset == "OCRBench":
            limits["min_pixels"] = 10 * 10 * 28 * 28
        limits = {name: value for name, value in limits.items() if value is not None}
        content = []
        for part in inputs:
            kind = part["type"]
            if kind == "text":
                content.append({"type": "text", "text": part["value"]})
            elif kind == "image":
                content.append({"type": "image", "image": "file://" + part["value"], **limits})
            else:
                frames = {"fps": self.fps} if self.fps is not None else {"nframes": self.nframe}
                content.append({"type": "video", "video": "file://" + part["value"], **limits, **frames})
        return content


class Qwen3VLChat(Qwen2VLChat):
    def __init__(self, model_path, max_new_tokens=32768, top_p=0.8, top_k=20, temperature=0.01, **kwargs):
        raise AssertionError("the stock constructor loads a model")

    def build_prompt(self, line, dataset):
        *images, text = super().build_prompt(line, dataset)
        return [*images, {"type": "text", "value": text["value"] + "3"}]
