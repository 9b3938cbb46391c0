"""Bottleneck adapters side by side with the package `adapters`: what it computes, and what it
makes of ours. The outputs, and how far the two are apart, lie in tests/reference/adapterhub/.

The package needs an older transformers than ours, so it has an environment of its own:

    python3 -m venv /tmp/adapters
    /tmp/adapters/bin/pip install adapters==1.3.0 torch==2.13.0

From the repository's root, in this order:

    /tmp/adapters/bin/python tests/reference/adapterhub.py make
        there: models, adapters of the package, and their outputs
    .venv/bin/python -m tests.reference.adapterhub ours /tmp/ours
        here: those converted and run, and adapters of ours converted
    /tmp/adapters/bin/python tests/reference/adapterhub.py check /tmp/ours
        there: those of ours run

Each writes its part of provenance.json. Models are tiny, of random weights large enough that an
adapter moves every output.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).with_suffix("")
SHAPE = {
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
ENCODER = SHAPE | {"max_position_embeddings": 16, "type_vocab_size": 2}
DECODER = SHAPE | {"max_position_embeddings": 16}
#: The class of each model, and its shape.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", ENCODER),
    "roberta": ("RobertaForSequenceClassification", ENCODER),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", ENCODER),
    "electra": ("ElectraForSequenceClassification", ENCODER | {"embedding_size": 8}),
    "llama": ("LlamaForCausalLM", DECODER | {"num_key_value_heads": 1}),
    "mistral": ("MistralForCausalLM", DECODER | {"num_key_value_heads": 1}),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": 24,
            "n_embd": 8,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 24,
            "d_model": 8,
            "d_kv": 4,
            "d_ff": 12,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
    ),
}
POST_NORM = ("bert", "roberta", "xlm-roberta", "electra")
#: Their name for a configuration, and ours. The head of one comes with it.
PLACEMENTS = {
    "double_seq_bn": "double_sequential",
    "seq_bn": "sequential_normed",
    "seq_bn_output": "sequential",
    "par_bn": "parallel",
    "with_head": "double_sequential",
}


def configurations(model: str) -> list[str]:
    """Those that have a counterpart on the other side."""
    names = ["double_seq_bn", "seq_bn_output"]
    names += ["seq_bn", "par_bn"] if model in POST_NORM else []
    return [*names, "with_head"] if model == "bert" else names


def base_of(model: str) -> Any:
    """The committed model. Eager attention: the same operations in either transformers."""
    model_class = getattr(transformers, MODELS[model][0])
    return model_class.from_pretrained(HERE / model, attn_implementation="eager").eval()


def input_ids() -> torch.Tensor:
    """Two rows of seven tokens, from 3 on: RoBERTa's 1 is padding."""
    return torch.randint(3, 24, (2, 7), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Logits, and what the last block hands on."""
    ids = input_ids()
    decoder = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    out = model(input_ids=ids, **decoder, output_hidden_states=True)
    hidden = out.decoder_hidden_states if decoder else out.hidden_states
    return {"logits": out.logits, "hidden": hidden[-1]}


@torch.no_grad()
def shake(weights: Any, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.add_(0.3 * torch.randn(weight.shape, generator=draw))


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], name: str) -> float:
    """The largest difference of any output."""
    return max((found[key] - expected[f"{name}.{key}"]).abs().max().item() for key in found)


def of(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}


def record(part: str, facts: dict[str, Any]) -> None:
    """A part of provenance.json, with what made it."""
    path = HERE / "provenance.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    packages = ("adapters", "peft", "safetensors", "torch", "transformers")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    python = sys.version.split()[0]
    made = {"date": date.today().isoformat(), "python": python, "versions": versions}
    known[part] = facts | made
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def make() -> None:
    """In the second environment: models, adapters of the package, and what they compute."""
    import adapters

    settings = {
        "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=4),
        "seq_bn": adapters.SeqBnConfig(reduction_factor=4),
        "seq_bn_output": adapters.SeqBnConfig(reduction_factor=4, original_ln_before=False),
        "par_bn": adapters.ParBnConfig(),
        "with_head": adapters.DoubleSeqBnConfig(reduction_factor=4, non_linearity="gelu"),
    }
    shutil.rmtree(HERE, ignore_errors=True)
    for name, (model_class, shape) in MODELS.items():
        kind = getattr(transformers, model_class)
        torch.manual_seed(0)
        base = kind(kind.config_class(**shape))
        shake(base.parameters(), seed=2)
        base.save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        expected = of("base", outputs(base_of(name)))
        for number, configuration in enumerate(configurations(name)):
            model = base_of(name)
            adapters.init(model)
            model.add_adapter(configuration, config=settings[configuration], set_active=True)
            with_head = configuration == "with_head"
            parts = [f".{configuration}.", *(["classifier"] if with_head else [])]
            shake(
                (w for key, w in model.named_parameters() if any(part in key for part in parts)),
                seed=3 + number,
            )
            place = str(HERE / name / configuration)
            model.save_adapter(place, configuration, with_head=with_head, use_safetensors=True)
            for written in Path(place).glob("*config.json"):
                # `adapters` notes where the base was.
                written.write_text(written.read_text().replace(f"{HERE}/", ""))
            expected |= of(configuration, outputs(model.eval()))
        save_file(expected, HERE / name / "outputs.safetensors")
    record("made", {"command": "make"})


def ours(target: Path) -> None:
    """In our environment: their adapters converted and run, and ours made and converted."""
    from peft import PeftModel, get_peft_model

    from tasks.methods.adapterhub.convert import from_adapterhub, to_adapterhub
    from tasks.methods.tuners.bottleneck import BottleneckConfig

    found: dict[str, dict[str, float]] = {}
    for name in MODELS:
        expected = load_file(HERE / name / "outputs.safetensors")
        found[name] = {"base": apart(outputs(base_of(name)), expected, "base")}
        made: dict[str, torch.Tensor] = {}
        for number, configuration in enumerate(configurations(name)):
            place = target / "peft" / name / configuration
            from_adapterhub(HERE / name / configuration, place / "theirs")
            model = PeftModel.from_pretrained(base_of(name), place / "theirs").eval()
            found[name][configuration] = apart(outputs(model), expected, configuration)

            with_head = configuration == "with_head"
            config = BottleneckConfig(
                placement=PLACEMENTS[configuration],
                reduction_factor=2,
                activation="gelu",
                scaling=1.5,
                task_type="SEQ_CLS" if with_head else None,
                modules_to_save=["classifier", "pooler"] if with_head else None,
            )
            torch.manual_seed(0)
            model = get_peft_model(base_of(name), config).eval()
            shake((w for w in model.parameters() if w.requires_grad), seed=10 + number)
            model.save_pretrained(place / "ours")
            to_adapterhub(place / "ours", target / name / configuration, name, configuration)
            made |= of(configuration, outputs(model))
        save_file(made, target / name / "outputs.safetensors")
    record("theirs_in_ours", {"command": "ours", "largest_difference": found})


def check(target: Path) -> None:
    """In the second environment: our converted adapters run by the package."""
    import adapters

    found: dict[str, dict[str, float]] = {}
    for name in MODELS:
        expected = load_file(target / name / "outputs.safetensors")
        found[name] = {}
        for configuration in configurations(name):
            model = base_of(name)
            adapters.init(model)
            told: dict[str, Any] = {}
            model.load_adapter(
                str(target / name / configuration),
                with_head=configuration == "with_head",
                use_safetensors=True,
                set_active=True,
                loading_info=told,
            )
            assert not told["missing_keys"], told
            assert not told["unexpected_keys"], told
            model.eval()
            found[name][configuration] = apart(outputs(model), expected, configuration)
    record("ours_in_theirs", {"command": "check", "largest_difference": found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make")
    commands.add_parser("ours").add_argument("target", type=Path)
    commands.add_parser("check").add_argument("target", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "make":
        make()
    elif arguments.command == "ours":
        ours(arguments.target)
    else:
        check(arguments.target)


if __name__ == "__main__":
    main()
