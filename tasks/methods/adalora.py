"""AdaLoRA: W + s B diag(E) A, whose ranks go to the layers that need them while it trains.

Zhang et al. 2023, arXiv:2303.10512. E is zero at the start, so that training starts from the base
exactly. Every layer starts with r0 triplets (a row of A, a number of E, a column of B): for a shape
of (out, in) it trains r0 * (in + out + 1) weights, and the head for classification. Between
`warmup` and `final` the least important triplets of all layers are masked, until as many are left
as `rank` of each layer would be; rows of A and columns of B are held orthogonal by a penalty.

    importance of a weight w:  I U,  I = mean of |w dw| over steps,  U = mean of how far it strays
    penalty:                   mean over all A and B of || A A^T - 1 ||, || B^T B - 1 ||

PEFT has tuner and allocator, and leaves two things to who trains: telling the allocator of each
step, and the penalty, which it adds only to the loss of its own `forward`. What ships is a plain
LoRA with a rank for each layer, which every server loads: s diag(E) A for A, and B.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from schemas.candidates import AdaLora
from schemas.errors import Problem, StageError, UserError
from tasks.core.adapters import CONFIG, WEIGHTS
from tasks.core.files import write_atomic
from tasks.core.progress import say, warn
from tasks.methods.course import Course
from tasks.methods.fused import EPSILON
from tasks.methods.method import Method, head_parameters, task_settings
from tasks.methods.targets import linear_targets

PLACE = "candidates[method=adalora]"
ADAPTER = "default"
#: Of all steps: how often ranks are given away.
INTERVAL = 0.01


def config(model: nn.Module, candidate: AdaLora, task: str) -> AdaLoraConfig:
    """What PEFT is told.

    Raises:
        UserError: a target that matches no linear layer, or that is narrower than `initial_rank`.
    """
    targets = checked_targets(model, candidate)
    return AdaLoraConfig(
        **task_settings(model, task),
        target_r=candidate.rank,
        init_r=candidate.initial_rank,
        lora_alpha=candidate.alpha,
        lora_dropout=candidate.dropout,
        orth_reg_weight=candidate.orthogonality,
        target_modules=sorted(targets),
        # The course of a run knows its steps.
        total_step=1,
    )


def without_ranks(model: nn.Module) -> None:
    """Freeze what alpha is divided by. Over a base in bfloat16 PEFT makes weights of it."""
    for name, weight in model.named_parameters():
        if ".ranknum." in name:
            weight.requires_grad_(False)


def trainable_parameters(model: nn.Module, candidate: AdaLora, task: str) -> int:
    """initial_rank * (in + out + 1) for every target, and the head."""
    layers = checked_targets(model, candidate).values()
    own = sum(layer.in_features + layer.out_features + 1 for layer in layers)
    return candidate.initial_rank * own + head_parameters(model, task)


def shipped_parameters(model: nn.Module, candidate: AdaLora, task: str) -> int:
    """As if `rank` were left to every target, which it is on average, and the head."""
    layers = checked_targets(model, candidate).values()
    own = sum(layer.in_features + layer.out_features for layer in layers)
    return candidate.rank * own + head_parameters(model, task)


def checked_targets(model: nn.Module, candidate: AdaLora) -> dict[str, nn.Linear]:
    """The linear layers to adapt. Raises a UserError for one that cannot have the first rank."""
    targets = linear_targets(model, candidate.target_modules)
    widths = {name: min(layer.in_features, layer.out_features) for name, layer in targets.items()}
    narrow = {name: width for name, width in widths.items() if width < candidate.initial_rank}
    if narrow:
        kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in narrow}))
        smallest = min(narrow.values())
        found = f"{candidate.initial_rank}, but {kinds} of this base are only {smallest} wide"
        fix = f"choose an initial_rank of at most {smallest}, or other target_modules"
        raise UserError([Problem(f"{PLACE}.initial_rank", found, fix)])
    return targets


class AdaLoraCourse(Course):
    """Gives ranks away after each step, and ships what is left.

    Raises:
        UserError: the run is too short for its warm-up, its final part and one step between.
    """

    def __init__(self, model: Any, candidate: AdaLora, steps: int) -> None:
        super().__init__(model, candidate, steps)
        self.tuner: Any = model.base_model
        self.config: Any = self.tuner.peft_config[ADAPTER]
        self.allocator: Any = self.tuner.rankallocator
        warmup, final = int(candidate.warmup * steps), int(candidate.final * steps)
        if steps - final < max(2, warmup + 1):
            raise UserError.at(
                PLACE,
                f"a run of {steps} steps has none left in which ranks are given away",
                "train longer, or lower `warmup` and `final`",
            )
        self.config.total_step, self.config.tinit, self.config.tfinal = steps, warmup, final
        self.config.deltaT = max(1, int(INTERVAL * steps))

    def penalty(self) -> torch.Tensor | None:
        parts = []
        for name, weight in self.tuner.model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                rows_RX = weight if ".lora_A." in name else weight.T
                one_RR = torch.eye(len(rows_RX), device=weight.device, dtype=weight.dtype)
                parts.append(torch.linalg.matrix_norm(rows_RX @ rows_RX.T - one_RR))
        total: torch.Tensor = self.candidate.orthogonality * torch.stack(parts).mean()
        return total

    def after_step(self, step: int) -> None:
        self.tuner.update_and_allocate(step)

    def state(self) -> dict[str, torch.Tensor]:
        """The allocator's two moving averages, and which triplets are left."""
        pattern = self.config.rank_pattern or {}
        return {
            **{f"sensitivity/{name}": x for name, x in self.allocator.exp_avg_ipt.items()},
            **{f"uncertainty/{name}": x for name, x in self.allocator.exp_avg_unc.items()},
            **{f"kept/{name}": torch.tensor(kept) for name, kept in pattern.items()},
        }

    def kept(self) -> int:
        """The importance of each weight in a step, and the two averages, in float32."""
        own = [weight for name, weight in self.model.named_parameters() if ".lora_" in name]
        return 3 * 4 * sum(weight.numel() for weight in own)

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.allocator.reset_ipt()
        parts: dict[str, dict[str, torch.Tensor]] = {"sensitivity": {}, "uncertainty": {}}
        for key, value in state.items():
            kind, name = key.split("/", 1)
            parts.setdefault(kind, {})[name] = value
        devices = {name: x.device for name, x in self.tuner.model.named_parameters()}
        for name, x in parts["sensitivity"].items():
            self.allocator.exp_avg_ipt[name] = x.to(devices[name])
            self.allocator.exp_avg_unc[name] = parts["uncertainty"][name].to(devices[name])
            # Made anew at each step; a name that is absent would clear its averages.
            self.allocator.ipt[name] = torch.zeros_like(self.allocator.exp_avg_ipt[name])
        kept = {name: x.tolist() for name, x in parts.get("kept", {}).items()}
        self.config.rank_pattern = kept or None

    def ranks(self) -> dict[str, int]:
        """What is left to each layer, by its name in the base."""
        pattern = self.config.rank_pattern or {}
        return {name.partition(".lora_E")[0]: sum(kept) for name, kept in pattern.items()}

    def finish(self) -> dict[str, Any]:
        """The ranks. Raises a StageError where none were given away."""
        ranks = self.ranks()
        most = self.candidate.rank * len(ranks)
        if not ranks or not 0 < sum(ranks.values()) <= most:
            raise StageError(
                f"AdaLoRA left ranks of {sum(ranks.values())} in all, where it should leave "
                f"{most}: its allocator did not run, or its weights do not reach the loss"
            )
        if len(set(ranks.values())) == 1:
            warn(f"AdaLoRA gave every layer the same rank, {most // len(ranks)}: train longer")
        kinds: dict[str, list[int]] = {}
        for name, rank in ranks.items():
            kinds.setdefault(name.rsplit(".", 1)[-1], []).append(rank)
        found = {
            "initial": self.candidate.initial_rank,
            "mean": sum(ranks.values()) / len(ranks),
            "least": min(ranks.values()),
            "most": max(ranks.values()),
            "mean_of": {kind: sum(own) / len(own) for kind, own in sorted(kinds.items())},
        }
        say(
            f"ranks: {found['least']} to {found['most']}, {found['mean']:.1f} a layer "
            f"(from {found['initial']})"
        )
        return {"ranks": found}

    def export(self, adapter: Path) -> None:
        path, settings = adapter / WEIGHTS, adapter / CONFIG
        saved, record = load_file(path), json.loads(settings.read_text())
        scale = record["lora_alpha"] / (record["init_r"] + EPSILON)
        tensors, ranks = {}, {}
        for name, value in saved.items():
            if not name.endswith((".lora_A", ".lora_B", ".lora_E")):
                tensors[name] = value.clone()
            elif name.endswith(".lora_A") and len(value) > 0:
                layer = name.removesuffix(".lora_A")
                tensors[f"{layer}.lora_A.weight"] = scale * saved[f"{layer}.lora_E"] * value
                tensors[f"{layer}.lora_B.weight"] = saved[f"{layer}.lora_B"].contiguous()
                ranks[layer.removeprefix("base_model.model.")] = len(value)
        save_file(tensors, path, metadata={"format": "pt"})
        plain_config(ranks, record).save_pretrained(str(adapter))
        written = json.loads(settings.read_text())
        written["target_modules"] = sorted(ranks)
        write_atomic(settings, json.dumps(written, indent=2, sort_keys=True) + "\n")


def plain_config(ranks: dict[str, int], record: dict[str, Any]) -> LoraConfig:
    """LoRA's own configuration of these ranks, by layer; alpha is the rank, so the scale is 1."""
    most = max(ranks.values())
    others = {re.escape(name): rank for name, rank in ranks.items() if rank != most}
    return LoraConfig(
        base_model_name_or_path=record["base_model_name_or_path"],
        task_type=record["task_type"],
        modules_to_save=record["modules_to_save"],
        inference_mode=True,
        r=most,
        lora_alpha=most,
        lora_dropout=record["lora_dropout"],
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=others,
    )


METHOD = Method(
    name="adalora",
    paper="arXiv:2303.10512",
    family="reparameterisation",
    merges=True,
    trained_base=False,
    format="peft-adapter",
    config=config,
    settle=without_ranks,
    trainable_parameters=trainable_parameters,
    course=AdaLoraCourse,
    ships=shipped_parameters,
)
