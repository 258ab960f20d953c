"""Weights from a file or folder of any known kind, with the options of their run.

    run folder | checkpoint | safetensors | torch.save | folder of FastMoE -> read_source -> Source

export.py lists the formats. A refusal of incomplete weights says how to complete them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from parallel.terminal import warn
from weights import families, formats, hub, preprocessing, verify
from weights import files as weight_files
from weights.dcp_writer import MANIFEST, METADATA
from weights.formats import Json, MtlFile, Weights, listed
from weights.verify import Checkpoint

BEST = "-val_loss"
# Where files of torch.save have weights, and where their average.
_TRAINED = ("state_dict", "model", "teacher", "module", "model_state_dict")
_AVERAGES = ("state_dict_ema", "model_ema", "ema")
_OF_TRANSFORMERS = "pytorch_model.bin"
_MOST_LEVELS = 8  # of sections and lists in options


@dataclasses.dataclass(frozen=True)
class Source:
    """What was read: our weights or a file of M3ViT, and the options of the run, {} if unknown.

    `classes` are the ids of the classes that were trained, () if unknown. `passed_over` says which
    checkpoints of the run would have been chosen, and what is wrong with them. `pretrained_cfg` is
    what a file without options says of its images, and `notes` what a user should know.
    """

    content: Weights | MtlFile
    config: Json
    origin: str
    passed_over: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    pretrained_cfg: Json = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        is_mtl = isinstance(self.content, MtlFile)
        tensors: Weights = self.content.weights if is_mtl else self.content  # type: ignore[assignment, union-attr]
        formats.check_dtypes(tensors, self.origin)

    @property
    def preprocessing(self) -> Json:
        """How images were prepared in training, in timm's words; {} if unknown."""
        return preprocessing.of_options(self.config) or self.pretrained_cfg

    def weights(self) -> Weights:
        """Return the weights by our names."""
        is_mtl = isinstance(self.content, MtlFile)
        return formats.from_mtl(self.content) if is_mtl else self.content  # type: ignore[arg-type, return-value]

    def print_notes(self) -> None:
        """Say on stderr what was passed over, and what else a user should know."""
        for line in (*(f"passed over {problem}" for problem in self.passed_over), *self.notes):
            warn(f"note: {line}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What to take where a source holds several.

    weights: "model" as trained, or "ema" for their average; None: the model, but the average of a
        file of timm, DeiT or M3ViT that has one, as timm's own loader does.
    metric: the best of a run's checkpoints by this figure; None for the newest.
    stem: the files <stem>_rank<r>.pth of a folder.
    any_mode: read checkpoints that every user could have written, where files have no modes.
    """

    weights: str | None = None
    metric: str | None = None
    stem: str | None = None
    any_mode: bool = False


def picked_metric(pick: str, metric: str | None) -> str | None:
    """Return the figure of the checkpoint that --pick and --metric ask for, None for the newest.

    Raises:
        ValueError: The figure has no sign, or no effect.
    """
    if pick != "best":
        if metric is not None:
            raise ValueError(f"--metric {metric}: has no effect without --pick best")
        return None
    metric = BEST if metric is None else metric
    if metric[:1] not in ("+", "-"):
        raise ValueError(f"--metric {metric}: must be +name (highest) or -name (lowest)")
    return metric


def find_checkpoint(
    run_folder: Path, *, metric: str | None, any_mode: bool = False
) -> tuple[Checkpoint, tuple[str, ...]]:
    """Return the newest complete checkpoint of a run, or the best one by a figure of its state.

    The second value says what is wrong with those that come before it. `metric` is "+name" where
    the highest figure is the best and "-name" where the lowest is.
    """
    folders = verify.candidates(run_folder, metric=metric)
    if metric is not None:  # here a person asks for the figure: no other checkpoint will do
        known = {name for folder in folders for name in verify.claimed_figures(folder)}
        folders = [folder for folder in folders if math.isfinite(verify.score(folder, metric))]
        if not folders:
            raise ValueError(
                f"--metric {metric}: no checkpoint in {run_folder} has this figure "
                f"(there are: {', '.join(sorted(known)) or 'none'})"
            )
    found, rejected = verify.first_whole(folders, any_mode=any_mode)
    problems = tuple(reason.removeprefix("checkpoint ") for reason in rejected.values())
    if found is None:
        raise ValueError(f"folder {run_folder}: no complete checkpoint: {'; '.join(problems)}")
    return found, problems


def _is_shallow(value: object, levels: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in inside)


def _our_options(value: object) -> Json:
    """Return `value` if it is the options of a run of ours, {} if a file means something else."""
    if not _is_shallow(value, _MOST_LEVELS):
        return {}
    model = value.get("model") if isinstance(value, dict) else None
    sections = [model.get(name) for name in ("vit", "moe")] if isinstance(model, dict) else [None]
    is_ours = isinstance(value, dict) and all(isinstance(part, dict) for part in sections)
    return value if is_ours else {}  # type: ignore[return-value]


def _class_ids(value: object, weights: Weights) -> tuple[str, ...]:
    """Return the class ids in a list or in its JSON, () for anything else.

    Other projects' files have lists of that name too, so it must be as long as the head.
    """
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return ()
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        return ()
    head = weights.get("head.weight")
    is_head = head is not None and len(head) == len(found) == len(set(found))
    return tuple(found) if is_head else ()


def other_classes(trained: Sequence[str], given: Sequence[str]) -> str | None:
    """Say how the classes of weights differ from a dataset's; None if not, or if unknown."""
    pairs = enumerate(zip(trained, given, strict=False))
    differing = [(number, *pair) for number, pair in pairs if pair[0] != pair[1]]
    if not differing:
        return None
    number, theirs, ours = differing[0]
    return (
        f"{len(differing)} of {len(given)} classes were others in training: "
        f"class {number} was {theirs}, is {ours}"
    )


def _parse_options(text: object) -> Json:
    try:
        return _our_options(json.loads(text)) if isinstance(text, str) else {}
    except (ValueError, RecursionError):  # some other project's `config`
        return {}


def _read_checkpoint(found: Checkpoint, choice: Choice) -> Source:
    weights = weight_files.read_dcp(found.folder, choice.weights or "model")
    options, classes = _our_options(found.state.get("config")), found.state.get("classes")
    return Source(weights, options, str(found.folder), classes=_class_ids(classes, weights))


def _read_run(folder: Path, choice: Choice) -> Source:
    found, passed_over = find_checkpoint(folder, metric=choice.metric, any_mode=choice.any_mode)
    return dataclasses.replace(_read_checkpoint(found, choice), passed_over=passed_over)


def _refuse_unused(path: Path, choice: Choice, *, is_run: bool, is_ranks: bool) -> None:
    """Refuse an argument that picks one of several where there is only one."""
    if choice.metric is not None and not is_run:
        raise ValueError(f"--pick best: has no effect on {path}, which is no run folder")
    if choice.stem is not None and not is_ranks:
        raise ValueError(
            f"--stem {choice.stem}: has no effect on {path}, which is no folder of ranks' files"
        )


def _state_dict(content: object, path: Path, choice: Choice) -> tuple[Weights, tuple[str, ...]]:
    """Return the state dict in a file of torch.save, and a note if it is one of several.

    Raises:
        ValueError: There is none, or not the one that was asked for.
    """
    holder = content if isinstance(content, dict) else {}
    held = [key for key in holder if isinstance(key, str) and weight_files.is_tensors(holder[key])]
    averages = [key for key in _AVERAGES if key in held]
    trained = [key for key in _TRAINED if key in held]
    if not trained and len(held) == 1 and not averages:
        trained = held
    wanted = averages if choice.weights == "ema" else trained
    if choice.weights is None:  # `ema` is in our checkpoints as files, whose model is the run's
        wanted = [key for key in averages if key != "ema"] or trained
    if not held and choice.weights != "ema" and weight_files.is_tensors(content):
        weights, others, is_usual = holder, [], True
    elif wanted:
        weights, is_usual = holder[wanted[0]], wanted[0] in _TRAINED[:2]
        others = [key for key in (*averages, *trained) if key != wanted[0]]
    else:
        asked = " or ".join(f"`{k}`" for k in (_AVERAGES if choice.weights == "ema" else _TRAINED))
        there = listed(map(str, holder)) if holder else f"a {type(content).__name__}"
        raise ValueError(f"file {path}: has no weights in {asked} (it has: {there})")
    weight_files.check_dense(weights, path)
    if is_usual and not others:
        return weights, ()
    rest = f", not {' or '.join(f'`{k}`' for k in others)} (see --weights, init.weights)"
    return weights, (f"{path}: took the weights in `{wanted[0]}`{rest if others else ''}",)


def _local_advice(path: Path) -> str:
    """Say how to get a global file where `path` has one rank's experts."""
    stem = re.sub(r"_rank\d+$", "", path.stem)
    is_set = (path.parent / f"{stem}_rank0.pth").exists()
    name, also = (f"{stem}_rank<r>.pth", f" --stem {stem}") if is_set else ("<r>.pth", "")
    return (
        f"these are one rank's; with the files of all ranks in one folder, as {name}, run: "
        f"python export.py {path.parent}{also} --to mtl --output <folder>"
    )


def _of_any(
    origin: str,
    raw: Weights,
    path: Path,
    *,
    config: object = None,
    classes: object = None,
    about: object = None,
) -> Source:
    """Return weights of any family but M3ViT's by our names; `about` is a pretrained_cfg.

    What transformers or timm wrote beside `path` is used too.
    """
    beside = _json_beside(path, hub.CONFIG)
    options, extra = _parse_options(config), tuple[str, ...]()
    try:
        found = families.translate(raw)
        if found.family == families.TRANSFORMERS and beside and not options:
            images = _json_beside(path, hub.PREPROCESSOR)
            options, extra = hub.options_of(beside, images, found.weights)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    return Source(
        found.weights,
        options,
        origin,
        classes=_class_ids(classes, found.weights),
        pretrained_cfg=preprocessing.parse(about or beside.get(preprocessing.KEY)),
        notes=tuple(f"{origin}: {note}" for note in (*found.notes, *extra)),
    )


def _read_pickle(path: Path, choice: Choice) -> Source:
    content = weight_files.read_pickle(path)
    holder: Mapping[str, object] = content if isinstance(content, dict) else {}
    raw, which = _state_dict(content, path, choice)
    found = holder.get("meta")
    meta = found if isinstance(found, dict) and "expert_format" in found else {}
    if not meta and not formats.is_m3vit(raw):
        about = holder.get(preprocessing.KEY)
        config, classes = holder.get("config"), holder.get("classes")
        source = _of_any(str(path), raw, path, config=config, classes=classes, about=about)
        return dataclasses.replace(source, notes=(*which, *source.notes))
    encoder, _ = formats.encoder_of(raw)
    try:
        families.check_tensors(encoder)
    except ValueError as error:
        raise ValueError(f"file {path}: {error}") from error
    if problem := formats.missing_experts(encoder):
        raise ValueError(f"file {path}: {problem}: {_local_advice(path)}")
    merged = formats.merge_shards([raw], source="pretrain_single_file")
    facts = {**merged.meta, **meta}
    own = facts["moevit"]
    config = _parse_options(own.get("config") if isinstance(own, dict) else None)
    checked = {name: merged.meta[name] for name in ("expert_format", "moe_experts_global")}
    file = MtlFile(merged.weights, {**facts, **checked}, merged.left_out)
    return Source(file, config, str(path), notes=which)


def _read_shards(folder: Path, choice: Choice) -> Source:
    """Join the files of FastMoE's ranks; only the state dict of each stays in memory."""
    files = weight_files.shard_files(folder, stem=choice.stem)
    shards: list[Weights] = []
    notes: dict[str, None] = {}
    for path in files:
        weights, note = _state_dict(weight_files.read_pickle(path), path, choice)
        shards.append(weights)
        notes |= dict.fromkeys(note)
    try:
        for shard in shards:
            families.check_tensors(formats.encoder_of(shard)[0])
        merged = formats.merge_shards(shards, source="pretrain_sharded_dir")
    except ValueError as error:
        raise ValueError(f"folder {folder}: {error}") from error
    return Source(merged, {}, f"{len(files)} files of {folder}", notes=tuple(notes))


def _json_beside(path: Path, name: str) -> Json:
    """Return a JSON file that timm or transformers wrote beside the weights at `path`."""
    file = (path if path.is_dir() else path.parent) / name
    is_beside = path.is_dir() or path.name in (weight_files.SINGLE_NAME, _OF_TRANSFORMERS)
    return weight_files.read_json(file) if is_beside and file.is_file() else {}


def read_source(path: Path, choice: Choice) -> Source:
    """Read whatever is at `path`.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: It is of no known kind, damaged or incomplete.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    is_run = not names & {MANIFEST, METADATA} and bool(verify.candidates(path))
    known = {MANIFEST, METADATA, weight_files.INDEX_NAME, weight_files.SINGLE_NAME}
    if not names & known and _OF_TRANSFORMERS in names:
        path, names = path / _OF_TRANSFORMERS, set()
    is_ranks = path.is_dir() and not is_run and not names & known
    _refuse_unused(path, choice, is_run=is_run, is_ranks=is_ranks)
    if path.is_dir():
        if MANIFEST in names:
            return _read_checkpoint(verify.verify(path, any_mode=choice.any_mode), choice)
        if METADATA in names:
            origin = f"{path} (not verified: it has no {MANIFEST})"
            return _of_any(origin, weight_files.read_dcp(path, choice.weights or "model"), path)
        if is_run:
            return _read_run(path, choice)
        if is_ranks:
            return _read_shards(path, choice)
    elif path.suffix != ".safetensors":
        return _read_pickle(path, choice)
    if choice.weights == "ema":
        raise ValueError(f"--weights ema: {path} has one set of weights; leave it out")
    weights, metadata = weight_files.read_safetensors(path)
    about = metadata.get(preprocessing.KEY)
    config, classes = metadata.get("config"), metadata.get("classes")
    return _of_any(str(path), weights, path, config=config, classes=classes, about=about)
