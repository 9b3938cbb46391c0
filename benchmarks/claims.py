"""The figures behind docs/claims.md: from shapes, and from the runs of the method recipes.

    python benchmarks/claims.py [--banking77 HOME] [--causal HOME]

HOME is where `peftflow run recipes/methods-banking77.yaml` (or methods-causal.yaml) was run; what
is not given keeps the result file that it has. Shapes need no weights: models are built on
PyTorch's meta device.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import Result, write
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
)

from schemas.candidates import BitFit, Bottleneck, Lora
from tasks.methods.method import count_parameters, head_parameters
from tasks.methods.table import method_for

#: Published shapes: widths, depths and vocabularies as in the models' own configurations.
LLAMA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
GPT3 = OPTConfig(
    hidden_size=12288,
    ffn_dim=49152,
    num_hidden_layers=96,
    num_attention_heads=96,
    vocab_size=50257,
    max_position_embeddings=2048,
    word_embed_proj_dim=12288,
)
BERT_BASE = BertConfig(num_labels=2)
BERT_LARGE = BertConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_labels=2,
)


def shares(config: PretrainedConfig, task: str, candidate: Any) -> tuple[int, int]:
    """Trained weights beside the head, and all weights."""
    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = auto.from_config(config)
        total = count_parameters(model)
        learned = method_for(candidate.method, task).trainable_parameters(model, candidate, task)
    return learned - head_parameters(model, task), total


def of_shapes() -> list[Result]:
    rows = []
    for name, config, task in (
        ("Llama-7B", LLAMA_7B, "causal-lm"),
        ("BERT-base", BERT_BASE, "sequence-classification"),
    ):
        pair = ["q_proj", "v_proj"] if task == "causal-lm" else ["query", "value"]
        for rank in (4, 8, 16, 64):
            for where, targets in (("q and v", pair), ("all-linear", "all-linear")):
                lora = Lora(method="lora", rank=rank, target_modules=targets)
                own, total = shares(config, task, lora)
                label = f"1. LoRA r = {rank}, {where}, {name}"
                rows.append(Result(label, round(100 * own / total, 4), "% trained"))
    own, total = shares(
        GPT3, "causal-lm", Lora(method="lora", rank=4, target_modules=["q_proj", "v_proj"])
    )
    rows += [
        Result("2. GPT-3's shape, weights", total, ""),
        Result("2. LoRA r = 4 on q and v, trained", own, ""),
        Result("2. fewer trained weights", round(total / own, 1), "×"),
        Result("2. checkpoint, both in 16 bits", round(total / own, 1), "× smaller"),
        Result("2. checkpoint, LoRA in float32 as shipped here", round(total / own / 2, 1), "×"),
    ]
    bottleneck = Bottleneck(method="bottleneck", placement="double_sequential", reduction_factor=8)
    own, total = shares(BERT_LARGE, "sequence-classification", bottleneck)
    rows.append(Result("4. adapters of width 128, BERT-large", round(100 * own / total, 3), "%"))
    for name, config, task in (
        ("BERT-base", BERT_BASE, "sequence-classification"),
        ("BERT-large", BERT_LARGE, "sequence-classification"),
        ("GPT-2", GPT2Config(), "causal-lm"),
        ("GPT-3's shape (OPT)", GPT3, "causal-lm"),
    ):
        own, total = shares(config, task, BitFit(method="bitfit"))
        rows.append(Result(f"5. BitFit, {name}", round(100 * own / total, 4), "% trained"))
    layer = torch.nn.Linear(10, 10, bias=False)
    own = method_for("lora", "causal-lm").trainable_parameters(
        torch.nn.Sequential(layer), Lora(method="lora", rank=1), "causal-lm"
    )
    rows.append(
        Result("11. a 10 x 10 update of rank 1", own, f"numbers for {layer.weight.numel()}")
    )
    return rows


def last_record(home: Path) -> dict[str, Any]:
    found = [json.loads(path.read_text()) for path in sorted((home / "runs").glob("*.json"))]
    return dict([record for record in found if record["state"] in ("done", "refused")][-1])


def of_run(record: dict[str, Any], name: str, metric: str) -> list[Result]:
    """Per candidate the figures that claims speak of."""
    rows = []
    for subject in record["candidates"]:
        figures, label = subject["figures"], f"{name}, {subject['label']}"
        rows.append(Result(f"{label}: {metric}", round(figures[metric], 4), ""))
        rows.append(Result(f"{label}: trained", round(100 * figures["trainable_share"], 3), "%"))
        for figure, unit in (
            ("retention_change", "nats"),
            ("train_peak_mib", "MiB"),
            ("generate_peak_mib", "MiB"),
            ("prefill_ratio_b1", "× base"),
            ("prefill_ratio_b1_merged", "× base"),
            ("token_ratio_b1", "× base"),
            ("token_ratio_b1_merged", "× base"),
        ):
            if figure in figures:
                rows.append(Result(f"{label}: {figure}", round(figures[figure], 3), unit))
    for label, trials in record["searched"].items():
        text = ", ".join(
            f"{trial['learning_rate']:g}: "
            + ("diverged" if trial["value"] is None else f"{trial['value']:.4g}")
            for trial in trials
        )
        rows.append(Result(f"10. {name}, {label}: {metric} by rate", text, ""))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--banking77", type=Path)
    parser.add_argument("--causal", type=Path)
    parser.add_argument("--quick", action="store_true", help="the same: it takes seconds")
    arguments = parser.parse_args()
    write("claims", of_shapes(), quick=arguments.quick)
    if arguments.banking77:
        rows = of_run(last_record(arguments.banking77), "banking77", "accuracy")
        write("claims_banking77", rows, quick=arguments.quick)
    if arguments.causal:
        rows = of_run(last_record(arguments.causal), "quickstart", "loss")
        write("claims_causal", rows, quick=arguments.quick)


if __name__ == "__main__":
    main()
