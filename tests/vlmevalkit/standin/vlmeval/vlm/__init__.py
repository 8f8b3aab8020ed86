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
