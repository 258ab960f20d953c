"""What a plain script does before and in its first step: the rival of benchmarks/launch.py.

    python -m benchmarks.plain_timm --root data/tiny-imagenet-5 --device cpu

torchvision's ImageFolder and DataLoader, timm's VisionTransformer, AdamW. It does one step of
training, prints a line, and waits to be ended, as the other of the two is.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from timm.models import VisionTransformer
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    """Make one training step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--embed-dim", type=int, default=192)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--num-heads", type=int, default=3)
    arguments = parser.parse_args()
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(arguments.img_size, scale=(0.6, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    images = ImageFolder(arguments.root / "train", transform)
    loader = DataLoader(
        images,
        batch_size=arguments.batch,
        shuffle=True,
        drop_last=True,
        num_workers=arguments.workers,
        pin_memory=arguments.device == "cuda",
    )
    model = VisionTransformer(
        img_size=arguments.img_size,
        patch_size=arguments.patch_size,
        embed_dim=arguments.embed_dim,
        depth=arguments.depth,
        num_heads=arguments.num_heads,
        num_classes=len(images.classes),
    ).to(arguments.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    image_BCHW, label_B = next(iter(loader))
    dtype = torch.bfloat16 if arguments.device == "cuda" else None
    with torch.autocast(arguments.device, dtype=dtype, enabled=dtype is not None):
        logits_BY = model(image_BCHW.to(arguments.device, non_blocking=True))
        loss = functional.cross_entropy(logits_BY, label_B.to(arguments.device))
    loss.backward()
    optimizer.step()
    print(f"train step=1 loss={loss.item():.4f}", flush=True)
    time.sleep(3600)


if __name__ == "__main__":
    main()
