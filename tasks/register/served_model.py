"""The code of a registered model: MLflow runs this file, alone, wherever the version is loaded.

It imports nothing of this project. Beside it, as the artifact `package`, lie the weights (or
adapters, or the examples of a prompt, with the content hash of the base), the tokenizer, and
`serving.json`, which says what training used: the task, the template, the dtype, the tokens that
end an answer.

A language model answers prompts: plain text, or, with a chat template, a conversation as a JSON
list of `{"role": …, "content": …}`. A classifier gives each text its label and that label's
probability, or, where tokens have labels, the spans that it finds, as a JSON list. Images come as
the bytes of a file (PNG, JPEG, …), in JSON as base64; a path is not read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
)

MODEL_CLASSES = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "image-classification": AutoModelForImageClassification,
}

#: Rows that go through the model together. More is no faster on a CPU and costs memory.
BATCH_ROWS = 16


class ServedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """What `mlflow.pyfunc.load_model(...).predict(rows, params)` calls."""

    examples: Any = None
    processor: Any = None
    writer: Any = None

    def load_context(self, context: Any) -> None:
        package = Path(context.artifacts["package"])
        self.serving: dict[str, Any] = json.loads((package / "serving.json").read_text())
        whole = self.serving["base"] is None
        reader = package / ("model" if whole else "tokenizer")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(package, self.serving).to(self.device).eval()
        if (package / "pictures.py").exists():
            self.pictures = import_file(package / "pictures.py")
            # On Pillow, as in training: torchvision, where it is installed, resizes otherwise.
            self.processor = AutoImageProcessor.from_pretrained(reader, backend="pil")
        else:
            self.tokenizer = AutoTokenizer.from_pretrained(reader)
            self.pad_id = pad_id_of(self.model, self.tokenizer)
        self.batch_rows = batch_rows(self.model)
        if (package / "heads").is_dir():
            turbo = import_file(package / "turbo.py")
            self.writer = turbo.writer_with_heads(package, self.model, self.tokenizer)
        if (package / "model" / "examples.safetensors").exists():
            self.examples = import_file(package / "examples.py").Examples(package / "model")

    @property
    def writes(self) -> bool:
        """Whether answers are generated."""
        return self.serving["task"] in ("causal-lm", "seq2seq")

    @property
    def encodes(self) -> bool:
        """Whether an encoder reads a prompt, and a decoder beside it writes the answer."""
        return bool(self.serving["task"] == "seq2seq")

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row out for one row in: `completion`, `label` and `score`, or `spans`.

        model_input: MLflow makes a frame of a list, too; the first column counts.
        params: max_new_tokens, for a language model, and turbo: false to leave Turbo heads out.
        """
        rows = list(model_input.iloc[:, 0])
        if self.processor is not None:
            return self.classify(rows)
        rows = [str(row) for row in rows]
        if self.writes:
            params = params or {}
            longest = int(params.get("max_new_tokens", self.serving["max_new_tokens"]))
            turbo = bool(params.get("turbo", True))
            return pd.DataFrame({"completion": self.complete(rows, longest, turbo=turbo)})
        if self.serving["task"] == "token-classification":
            return pd.DataFrame({"spans": self.mark(rows)})
        return self.classify(rows)

    def encode(self, row: Any) -> Any:
        """The tokens of a prompt or a text, or the pixels of an image, as in training."""
        if self.processor is not None:
            image = self.pictures.decode(self.pictures.sent(row))
            return self.processor(image, return_tensors="np")["pixel_values"][0]
        if self.serving["template"] == "chat":
            text = self.tokenizer.apply_chat_template(
                conversation(row), tokenize=False, add_generation_prompt=True
            )
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.encodes or not self.writes:
            return list(self.encode_whole(row)["input_ids"])
        encoded = self.tokenizer(row, return_special_tokens_mask=True)
        ids, special = list(encoded["input_ids"]), encoded["special_tokens_mask"]
        while special and special[-1]:  # an answer follows, so the text does not end here
            special.pop()
            ids.pop()
        return ids

    def encode_whole(self, row: str) -> Any:
        """A text to classify, or to be read by an encoder: cut as in training, with the characters
        of each token."""
        return self.tokenizer(
            row,
            truncation=True,
            max_length=self.serving["max_length"],
            return_offsets_mapping=True,
        )

    def ask(self, row: Any, max_new_tokens: int) -> Any:
        """What the model reads: the tokens of a prompt, behind its examples if it has any, or those
        of a text, or pixels."""
        prompt = self.encode(row)
        if self.examples is None:
            return prompt
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return self.examples.ask(prompt, None if limit is None else limit - max_new_tokens)

    @torch.inference_mode()
    def complete(self, rows: list[str], max_new_tokens: int, *, turbo: bool = True) -> list[str]:
        """The greedy answer to each prompt; with Turbo heads, where there are any."""
        prompts = [self.ask(row, max_new_tokens) for row in rows]
        answers = [""] * len(rows)
        if turbo and self.writer is not None:
            for batch in batches(prompts, self.batch_rows):
                asked = [prompts[row] for row in batch]
                written, _ = self.writer.write(
                    asked, max_new_tokens, frozenset(self.serving["stop_ids"])
                )
                for row, ids in zip(batch, written, strict=True):
                    answers[row] = self.text(ids)
            return answers
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.serving["stop_ids"],
            pad_token_id=self.pad_id,
            decoder_start_token_id=self.model.config.decoder_start_token_id
            if self.encodes
            else None,
        )
        # What the base's own settings say (beams, a first token, a length) was not evaluated.
        getattr(self.model, "get_base_model", lambda: self.model)().generation_config = settings
        for batch in batches(prompts, self.batch_rows):
            inputs = padded([prompts[row] for row in batch], self.pad_id, left=not self.encodes)
            ids_BT, mask_BT = (tensor.to(self.device) for tensor in inputs)
            written_BT = self.model.generate(
                input_ids=ids_BT, attention_mask=mask_BT, generation_config=settings
            )[:, 1 if self.encodes else ids_BT.shape[1] :]
            for row, ids in zip(batch, written_BT.tolist(), strict=True):
                answers[row] = self.text(ids)
        return answers

    def text(self, ids: list[int]) -> str:
        """What an answer's tokens say, up to the one that ends it."""
        end = next((at for at, token in enumerate(ids) if self.ends(token)), len(ids))
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=True))

    def ends(self, token: int) -> bool:
        return token in self.serving["stop_ids"]

    def classify(self, rows: list[Any]) -> pd.DataFrame:
        """The most probable label of each text or image, and its probability."""
        names = self.model.config.id2label
        logits_NC = self.logits([self.encode(row) for row in rows])
        scores_NC = torch.stack(logits_NC).softmax(dim=-1) if rows else torch.zeros(0, len(names))
        best_N = scores_NC.argmax(dim=-1).tolist()
        return pd.DataFrame(
            {
                "label": [names[best] for best in best_N],
                "score": [
                    float(score_C[best]) for score_C, best in zip(scores_NC, best_N, strict=True)
                ],
            }
        )

    def mark(self, rows: list[str]) -> list[str]:
        """The spans of each text, as JSON: start, end (characters, exclusive), label, text, and
        score: the mean probability of its tokens' labels."""
        encoded = [self.encode_whole(row) for row in rows]
        logits = self.logits([list(one["input_ids"]) for one in encoded])
        found = []
        for row, one, logits_TC in zip(rows, encoded, logits, strict=True):
            chars = [trimmed(row, *place) for place in one["offset_mapping"]]
            best_T = logits_TC.double().softmax(dim=-1).max(dim=-1)
            spans = spans_of(best_T.indices.tolist(), best_T.values.tolist(), chars)
            for span in spans:
                span["label"] = self.serving["labels"][span["label"]].removeprefix("B-")
                span["text"] = row[span["start"] : span["end"]]
                span["score"] = span.pop("score")
            found.append(json.dumps(spans, ensure_ascii=False))
        return found

    @torch.inference_mode()
    def logits(self, rows: list[Any], targets: list[list[int]] | None = None) -> list[torch.Tensor]:
        """The logits of each row of tokens (or pixels), float32: [T, vocabulary], [classes], or
        [T, classes]; of a decoder beside an encoder, those of each target.

        targets: what it is to say, of which it reads all but the last behind its start token.
        """
        if targets is not None:
            pairs = (
                (torch.tensor([row], device=self.device), torch.tensor([said], device=self.device))
                for row, said in zip(rows, targets, strict=True)
            )
            return [self.model(input_ids=i, labels=t).logits[0].float().cpu() for i, t in pairs]
        if self.writes:
            alone = (torch.tensor([row], device=self.device) for row in rows)
            # Behind a soft prompt, PEFT gives logits of its virtual tokens too, in front.
            return [
                self.model(input_ids=ids_1T).logits[0, -ids_1T.shape[1] :].float().cpu()
                for ids_1T in alone
            ]
        found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        for batch in batches(rows, self.batch_rows):
            inputs = self.inputs([rows[row] for row in batch])
            logits_BC = self.model(**inputs).logits.float().cpu()
            for row, logits_C in zip(batch, logits_BC, strict=True):
                # Where every token has some, those of the padding are left out.
                found[row] = logits_C if logits_C.ndim == 1 else logits_C[: len(rows[row])]
        return found

    def inputs(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        """What a classifier is called with for some rows."""
        if self.processor is not None:
            return {"pixel_values": torch.from_numpy(np.stack(rows)).to(self.device)}
        ids_BT, mask_BT = (
            tensor.to(self.device) for tensor in padded(rows, self.pad_id, left=False)
        )
        return {"input_ids": ids_BT, "attention_mask": mask_BT}


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A token's characters without white space at its ends, as in training."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def spans_of(
    labels: list[int], scores: list[float], chars: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    """The spans that IOB2 labels spell: 0 is O, 1 + 2 k begins type k, 2 + 2 k goes on with it,
    or starts a span after anything else. label: that of the type's beginning."""
    found: list[dict[str, Any]] = []
    parts: list[list[float]] = []
    current = 0
    for label, score, (start, end) in zip(labels, scores, chars, strict=True):
        if start == end:  # a token that stands for no character
            continue
        begin = label - 1 + label % 2
        if label and label != begin and begin == current:
            found[-1]["end"] = end
            parts[-1].append(score)
        elif label:
            found.append({"start": start, "end": end, "label": begin})
            parts.append([score])
        current = begin if label else 0
    for span, part in zip(found, parts, strict=True):
        span["score"] = sum(part) / len(part)
    return found


def load_model(package: Path, serving: dict[str, Any]) -> Any:
    """The whole model, or the adapter on the base that it was trained on and no other."""
    load = MODEL_CLASSES[serving["task"]].from_pretrained
    options: dict[str, Any] = {"dtype": getattr(torch, serving["dtype"]), "use_safetensors": True}
    if serving["base"] is None:
        return load(package / "model", local_files_only=True, **options)
    if serving["labels"] is not None:
        options["id2label"] = dict(enumerate(serving["labels"]))
        options["label2id"] = {label: at for at, label in enumerate(serving["labels"])}
        options["num_labels"] = len(serving["labels"])
        options["ignore_mismatched_sizes"] = True
    adapters = adapters_in(package / "model")
    quantisation = [path for path in adapters if (path / "quantisation.json").exists()]
    for path in quantisation:
        how = json.loads((path / "quantisation.json").read_text())
        options |= quantised(how, options["dtype"])
    base = load(find_base(serving["base"]), local_files_only=True, **options)
    if (package / "model" / "prompt.json").exists():
        return base
    if quantisation:
        keep_as_loaded(base)
    return with_adapters(base, adapters)


def adapters_in(directory: Path) -> list[Path]:
    """The adapter, those of several methods in the order in which they are put on, or none."""
    if (directory / "adapter_config.json").exists():
        return [directory]
    return sorted(path.parent for path in directory.glob("*/adapter_config.json"))


def with_adapters(model: Any, adapters: list[Path]) -> Any:
    """The base with each adapter around what the one before has left of it."""
    from peft import PeftModel
    from peft.tuners.ln_tuning.layer import LNTuningLayer

    for path in adapters:
        if (path / "tuner.py").exists():
            import_tuner(path / "tuner.py")
        if isinstance(model, PeftModel):
            model = model.get_base_model()
            # PEFT leaves its configuration here, and would take the next one for more of it.
            vars(model).pop("peft_config", None)
        with warnings.catch_warnings():
            # PEFT only warns of an adapter that lacks tensors, and goes on with random ones.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(model, path)
    for module in model.modules():
        if isinstance(module, LNTuningLayer):
            # With each further adapter PEFT makes float32 of norms that were learned.
            module.ln_tuning_layers.to(next(module.base_layer.parameters()).dtype)
    return model


def quantised(how: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What loads the base in the 4 bits beside which the adapter learned."""
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=how["quant_type"],
            bnb_4bit_use_double_quant=how["double_quantisation"],
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=how["unquantised"],
        ),
        "device_map": {"": "cuda" if torch.cuda.is_available() else "cpu"},
    }


def keep_as_loaded(model: Any) -> None:
    """No hooks that move it, and no packing of its weights anew: on some CPUs bitsandbytes does
    so in evaluation mode, with rounded scales."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def import_tuner(path: Path) -> None:
    """Run the file of a tuner that PEFT lacks, which makes it known to PEFT. What is loaded next
    gets the tuner of its own version, whatever other versions this process has loaded."""
    name, before = module_name(path), set(sys.modules)
    tuner = import_file(path)
    if name in before:
        tuner.register()


def import_file(path: Path) -> Any:
    """A module that travels with the version. Another version's file is another module."""
    name = module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    found: Any = importlib.util.spec_from_file_location(name, path)
    # Before it runs: dataclasses look their module up by name.
    sys.modules[name] = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(sys.modules[name])
    except Exception as error:
        del sys.modules[name]
        raise RuntimeError(
            f"{path} cannot be run with the packages that are installed ({error}); install the "
            "version's own requirements"
        ) from error
    return sys.modules[name]


def module_name(path: Path) -> str:
    return f"peftflow_{path.stem}_{sha256_file(path)[:12]}"


def find_base(base: dict[str, Any]) -> Path:
    """The directory of the base: PEFTFLOW_BASE, else where it was, else the hub's revision.

    Raises:
        RuntimeError: there is none, or its content is not what the adapter was trained on.
    """
    named = os.environ.get("PEFTFLOW_BASE")
    place = Path(named or base["path"])
    if not named and not place.is_dir() and base["revision"]:
        from huggingface_hub import snapshot_download

        names = sorted(base["sha256"])
        place = Path(
            snapshot_download(base["model"], revision=base["revision"], allow_patterns=names)
        )
    if not place.is_dir():
        raise RuntimeError(
            f"this version is no whole model and its base, {base['model']}, is not at {place}; "
            "set PEFTFLOW_BASE to a directory that holds it"
        )
    for name, wanted in base["sha256"].items():
        path = place / name
        if not path.is_file() or sha256_file(path) != wanted:
            raise RuntimeError(
                f"{path} is not the file that this version was made with (SHA-256 {wanted}); "
                f"set PEFTFLOW_BASE to a directory with the right {base['model']}"
            )
    return place


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def conversation(row: str) -> list[dict[str, str]]:
    """A row as chat messages: a JSON list of them, or one message of the user."""
    try:
        value = json.loads(row)
    except ValueError:
        value = None
    if isinstance(value, list) and value and all(is_message(item) for item in value):
        return value
    return [{"role": "user", "content": row}]


def is_message(item: Any) -> bool:
    return isinstance(item, dict) and item.keys() == {"role", "content"}


def pad_id_of(model: Any, tokenizer: Any) -> int:
    """The id that fills up rows; the configuration must name it for decoders that classify."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id or 0
    return int(model.config.pad_token_id)


def batch_rows(model: Any) -> int:
    """How many rows go through together: one behind a soft prompt, where PEFT counts positions
    from the padding on, and lets a decoder classify padding."""
    config = getattr(model, "active_peft_config", None)
    return 1 if getattr(config, "num_virtual_tokens", 0) else BATCH_ROWS


def batches(rows: list[list[int]], size: int = BATCH_ROWS) -> Iterator[list[int]]:
    """The indices of rows of similar length together, so that little is padding."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def padded(rows: list[list[int]], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, both int64 [B, T]."""
    width = max(len(row) for row in rows)
    ids_BT = torch.full((len(rows), width), pad_id)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.int64)
    for index, row in enumerate(rows):
        start = width - len(row) if left else 0
        ids_BT[index, start : start + len(row)] = torch.tensor(row)
        mask_BT[index, start : start + len(row)] = 1
    return ids_BT, mask_BT


mlflow.models.set_model(ServedModel())
