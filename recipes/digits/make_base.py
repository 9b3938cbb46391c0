"""Pretrain the small ViT that recipes/digits.yaml adapts, on printed letters and no digit.

    python recipes/digits/make_base.py --out recipes/digits/base --steps 3000

The letters A to Z and a to z in the fonts that matplotlib ships -> each turned, stretched, bent and
moved anew for every batch -> 8 x 8 grey pixels, as the digits have -> bf16 safetensors. The same
seed, versions and processor give the same bytes. It takes about seven minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import math
import string
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from transformers import ViTConfig, ViTForImageClassification

LETTERS = string.ascii_uppercase + string.ascii_lowercase
#: Text fonts among those of matplotlib; the others are symbols, or lack letters.
FONTS = ("DejaVuSans*.ttf", "DejaVuSerif*.ttf", "STIXGeneral*.ttf", "cmb10.ttf", "cmr10.ttf")
FONTS = (*FONTS, "cmss10.ttf", "cmtt10.ttf", "cmmi10.ttf")
DRAWN = 32  # pixels of a letter as it is drawn, as UCI's digits were
SMALL = 8  # and as the model is given it
SIZE = 16  # what the image processor makes of that
BATCH = 128
HELD_OUT_BATCHES = 40

PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def fonts() -> list[Path]:
    """The font files, those of display maths (`…Display`) left out."""
    directory = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = {path for pattern in FONTS for path in directory.glob(pattern)}
    return sorted(path for path in found if "Display" not in path.name)


def drawn_letters() -> tuple[torch.Tensor, torch.Tensor]:
    """Every letter in every font, white on black, [N, 1, DRAWN, DRAWN] from 0 to 1; its class."""
    images, labels = [], []
    for path in fonts():
        font = ImageFont.truetype(str(path), DRAWN * 4)
        for label, letter in enumerate(LETTERS):
            box = font.getbbox(letter)
            width, height = box[2] - box[0], box[3] - box[1]
            canvas = Image.new("L", (width, height))
            ImageDraw.Draw(canvas).text((-box[0], -box[1]), letter, fill=255, font=font)
            # As UCI's digits were: each fills its box, the longer side to the edge.
            scale = (DRAWN - 4) / max(width, height)
            fitted = canvas.resize(
                (max(1, round(width * scale)), max(1, round(height * scale))),
                Image.Resampling.LANCZOS,
            )
            square = Image.new("L", (DRAWN, DRAWN))
            square.paste(fitted, ((DRAWN - fitted.width) // 2, (DRAWN - fitted.height) // 2))
            images.append(np.asarray(square, dtype=np.float32) / 255)
            labels.append(label)
    return torch.from_numpy(np.stack(images))[:, None], torch.tensor(labels)


def varied(images_B1HW: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """The same letters as other hands would write them: affine, bent, thinner or fatter; 8 x 8
    pixels of 17 greys."""
    count = len(images_B1HW)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=draw)

    angle, shear = uniform(-0.3, 0.3), uniform(-0.35, 0.35)
    wide, high = uniform(0.8, 1.35), uniform(0.85, 1.25)
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack(
        [
            torch.stack([cos * wide, (shear - sin) * wide, uniform(-0.12, 0.12)], 1),
            torch.stack([sin * high, cos * high, uniform(-0.12, 0.12)], 1),
        ],
        1,
    )
    grid = F.affine_grid(affine, list(images_B1HW.shape), align_corners=False)
    bend = torch.randn(count, 2, 4, 4, generator=draw) * 0.07
    grid = grid + F.interpolate(bend, (DRAWN, DRAWN), mode="bicubic").permute(0, 2, 3, 1)
    moved = F.grid_sample(images_B1HW, grid, align_corners=False)
    blurred = F.avg_pool2d(moved, 3, 1, 1)
    # A threshold on a blurred letter is a pen of another width.
    ink = torch.sigmoid((blurred - uniform(0.15, 0.6)[:, None, None, None]) * 20)
    small = F.avg_pool2d(ink, DRAWN // SMALL)
    return (small * 16).round() / 16


def pixel_values(small_B1HW: torch.Tensor) -> torch.Tensor:
    """What the image processor makes of 8 x 8 greys."""
    grey = (small_B1HW * 255).round()
    large = F.interpolate(grey, (SIZE, SIZE), mode="bilinear", align_corners=False).round()
    return ((large / 255 - 0.5) / 0.5).expand(-1, 3, -1, -1)


def pretrain(steps: int, seed: int) -> tuple[ViTForImageClassification, float]:
    """The model, and its accuracy on letters that were varied anew."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    images, labels = drawn_letters()
    model = ViTForImageClassification(
        ViTConfig(
            image_size=SIZE,
            patch_size=4,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            id2label=dict(enumerate(LETTERS)),
            label2id={letter: label for label, letter in enumerate(LETTERS)},
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.05)
    started = time.monotonic()
    for step in range(steps):
        warm, falling = min(1.0, (step + 1) / 200), (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = 1e-3 * warm * (0.02 + 0.98 * falling)
        chosen = torch.randint(len(images), (BATCH,), generator=draw)
        inputs = pixel_values(varied(images[chosen], draw))
        loss = model(pixel_values=inputs, labels=labels[chosen]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0:
            spent = time.monotonic() - started
            print(f"step {step + 1}: loss {loss.item():.3f}, {spent:.0f} s", flush=True)
    model = model.to(torch.bfloat16).eval()
    return model, held_out(model, images, labels, draw)


@torch.no_grad()
def held_out(
    model: ViTForImageClassification,
    images: torch.Tensor,
    labels: torch.Tensor,
    draw: torch.Generator,
) -> float:
    """Accuracy on fresh variations of the same fonts' letters."""
    right = 0
    for _ in range(HELD_OUT_BATCHES):
        chosen = torch.randint(len(images), (BATCH,), generator=draw)
        logits = model(pixel_values=pixel_values(varied(images[chosen], draw))).logits
        right += int((logits.argmax(-1) == labels[chosen]).sum())
    return right / (HELD_OUT_BATCHES * BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, accuracy = pretrain(arguments.steps, arguments.seed)
    model.save_pretrained(arguments.out, safe_serialization=True)
    processor = json.dumps(PROCESSOR, indent=2) + "\n"
    (arguments.out / "preprocessor_config.json").write_text(processor)
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"{weights:,} parameters, {len(fonts())} fonts, held-out accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
