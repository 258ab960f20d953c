"""Measure what the bundled data set gives away without looking at shape.

    python data/baselines.py

Four models that cannot see shape: nearest class mean and logistic regression on the mean and spread
of each colour channel, logistic regression on the file size, and logistic regression on raw pixels.
Each is fitted on train/ and scored on val/; for the penalised ones the best penalty on val/ counts,
which favours the baseline.
"""

import argparse
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

ARCHIVE = Path(__file__).with_name("tiny-imagenet-5.tar.gz")
PIXEL_PENALTIES = (1e-2, 1e-1, 1.0)
FEW_FEATURES_PENALTIES = (1e-3, 1e-1)


@dataclass(frozen=True)
class Split:
    """One split in memory: N x H x W x C pictures as uint8, N labels, N file sizes."""

    images: Tensor
    labels: Tensor
    sizes_bytes: Tensor


def read_members(path: Path) -> dict[str, bytes]:
    """Return path below the top folder -> content for the regular files of the archive."""
    with tarfile.open(path) as archive:
        readers = {entry.name: archive.extractfile(entry) for entry in archive if entry.isfile()}
        return {
            name.split("/", 1)[1]: reader.read()
            for name, reader in readers.items()
            if reader is not None
        }


def to_split(rows: list[tuple[bytes, int]]) -> Split:
    """Return decoded pictures, labels and sizes of (JPEG bytes, label) rows."""
    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data, _ in rows]
    return Split(
        images=torch.from_numpy(np.stack(images)),
        labels=torch.tensor([label for _, label in rows]),
        sizes_bytes=torch.tensor([len(data) for data, _ in rows]),
    )


def read_splits(path: Path) -> tuple[Split, Split]:
    """Return the train and the val split of the archive; labels follow wnids.txt."""
    files = read_members(path)
    label_of = {wnid: i for i, wnid in enumerate(files["wnids.txt"].decode().split())}
    train = [
        (data, label_of[name.split("/")[1]])
        for name, data in files.items()
        if name.startswith("train/") and name.endswith(".JPEG")
    ]
    rows = [line.split("\t") for line in files["val/val_annotations.txt"].decode().splitlines()]
    val = [(files[f"val/images/{row[0]}"], label_of[row[1]]) for row in rows]
    return to_split(train), to_split(val)


def colour_features(split: Split) -> Tensor:
    """Return the mean and the spread of each channel.

    Shapes: images NHWC uint8 -> [N, 6] float32.
    """
    pixels_NLC = split.images.flatten(1, 2).float()
    return torch.cat([pixels_NLC.mean(dim=1), pixels_NLC.std(dim=1)], dim=1)


def size_features(split: Split, *, edges_bytes: Tensor) -> Tensor:
    """Return which range of file sizes each picture is in, one-hot, so that any range can tell.

    Shapes: sizes_bytes N int64, edges_bytes E -> [N, E + 1] float32.
    """
    return one_hot(torch.bucketize(split.sizes_bytes, edges_bytes), len(edges_bytes) + 1).float()


def pixel_features(split: Split) -> Tensor:
    """Return the raw pixels in a row.

    Shapes: images NHWC uint8 -> [N, H*W*C] float32.
    """
    return split.images.flatten(1).float()


def standardise(train_NF: Tensor, val_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with the mean and spread of the training features taken out."""
    mean_F, std_F = train_NF.mean(dim=0), train_NF.std(dim=0).clamp_min(1e-6)
    return (train_NF - mean_F) / std_F, (val_NF - mean_F) / std_F


def nearest_mean(train_NF: Tensor, label_N: Tensor, *, val_NF: Tensor) -> Tensor:
    """Return for each row of `val_NF` the class whose mean is nearest."""
    num_classes = int(label_N.max()) + 1
    mean_YF = torch.stack([train_NF[label_N == y].mean(dim=0) for y in range(num_classes)])
    return torch.cdist(val_NF, mean_YF).argmin(dim=1)


def fit_logistic(x_NF: Tensor, label_N: Tensor, *, penalty: float) -> tuple[Tensor, Tensor]:
    """Return weight and bias of multinomial logistic regression with an L2 penalty, by LBFGS."""
    num_classes = int(label_N.max()) + 1
    weight_FY = torch.zeros(x_NF.shape[1], num_classes, requires_grad=True)
    bias_Y = torch.zeros(num_classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight_FY, bias_Y], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = cross_entropy(x_NF @ weight_FY + bias_Y, label_N)
        value = value + 0.5 * penalty / len(label_N) * weight_FY.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return weight_FY.detach(), bias_Y.detach()


def row_space(x_NF: Tensor, v_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in an orthonormal basis of the training rows, where that has fewer columns.

    An L2-penalised weight lies in that span, so the fit is the same and a few times faster.
    """
    if x_NF.shape[1] <= x_NF.shape[0]:
        return x_NF, v_NF
    basis_FN, _ = torch.linalg.qr(x_NF.T)
    return x_NF @ basis_FN, v_NF @ basis_FN


def logistic_accuracy(
    train_NF: Tensor, train: Split, *, val_NF: Tensor, val: Split, penalties: tuple[float, ...]
) -> float:
    """Return the best val/ accuracy over the penalties."""
    scale = train_NF.shape[1] ** -0.5  # one penalty then means the same for any number of features
    x_NF, v_NF = (features * scale for features in standardise(train_NF, val_NF))
    x_NF, v_NF = row_space(x_NF, v_NF)
    scores = []
    for penalty in penalties:
        weight_FY, bias_Y = fit_logistic(x_NF, train.labels, penalty=penalty)
        scores.append(accuracy((v_NF @ weight_FY + bias_Y).argmax(dim=1), val))
    return max(scores)


def accuracy(label_N: Tensor, split: Split) -> float:
    """Return the fraction of right labels."""
    return (label_N == split.labels).float().mean().item()


def measure(train: Split, val: Split) -> dict[str, float]:
    """Return baseline name -> val/ top-1 accuracy, 0..1."""
    colour_NF, val_colour_NF = colour_features(train), colour_features(val)
    x_NF, v_NF = standardise(colour_NF, val_colour_NF)
    deciles = torch.arange(1, 10) / 10
    edges_bytes = torch.quantile(train.sizes_bytes.float(), deciles).long()
    return {
        "chance": 1 / (int(train.labels.max()) + 1),
        "nearest_mean_colour": accuracy(nearest_mean(x_NF, train.labels, val_NF=v_NF), val),
        "logistic_colour": logistic_accuracy(
            colour_NF, train, val_NF=val_colour_NF, val=val, penalties=FEW_FEATURES_PENALTIES
        ),
        "logistic_file_size": logistic_accuracy(
            size_features(train, edges_bytes=edges_bytes),
            train,
            val_NF=size_features(val, edges_bytes=edges_bytes),
            val=val,
            penalties=FEW_FEATURES_PENALTIES,
        ),
        "logistic_pixels": logistic_accuracy(
            pixel_features(train),
            train,
            val_NF=pixel_features(val),
            val=val,
            penalties=PIXEL_PENALTIES,
        ),
    }


def main() -> None:
    """Print one line per baseline."""
    parser = argparse.ArgumentParser(description="Measure the baselines of the bundled data set.")
    parser.add_argument("--archive", type=Path, default=ARCHIVE)
    train, val = read_splits(parser.parse_args().archive)
    print(f"train={len(train.labels)} val={len(val.labels)}")
    for name, value in measure(train, val).items():
        print(f"baseline={name} top1_percent={100 * value:.1f}")


if __name__ == "__main__":
    main()
