"""The configuration files of the published code (arXiv 2203.15565), read as text and converted to ours.

Such a file is Python: `config = edict()`, then assignments such as `config.lr = 0.1`. Only that is read here, from the
syntax tree: literals, arithmetic of numbers, numbers assigned before, and the file that is extended. Nothing is
imported, called or executed, and a file that holds anything else is refused with its lines.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partialfc.backbones import BACKBONES
from partialfc.config.options import TrainConfig
from partialfc.core.errors import InputError, did_you_mean

_MOST_BYTES = 1 << 16
_MOST_DEPTH = 8  # of literals in literals, and of files that extend files
_LARGEST = 1e18  # of a number; products of large ones would take hours
_NAMED = 5  # lines in one message
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
# What the published base.py says, for a file that stands alone.
_BASE = {"margin_list": [1.0, 0.5, 0.0], "network": "r50", "embedding_size": 512, "sample_rate": 1, "fp16": False}
_BASE |= {"batch_size": 128, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "gradient_acc": 1}
_BASE |= {"verbose": 2000, "frequent": 10, "seed": 2048, "num_workers": 2, "warmup_epoch": 0}


@dataclass(frozen=True)
class Setting:
    """A value, and the `place` that says so: a file and a line."""

    value: Any
    place: str


class _Unreadable(Exception):
    """A statement that is no assignment of literals."""


# -- reading -----------------------------------------------------------------------------------------------------------


def read_published(path: Path) -> dict[str, Setting]:
    """The settings of a configuration file by name, those of the files that it extends among them.

    As in the published code, `base.py` beside the file comes first; what it lacks has its published values.

    Raises:
        InputError: a file cannot be read, or has lines that are no assignments of literals.
    """
    settings = {name: Setting(value, "the published base.py") for name, value in _BASE.items()}
    base = path.with_name("base.py")
    if path.name != base.name and base.is_file():
        _read_file(base, settings, 0)
    _read_file(path, settings, 0)
    return settings


def _read_file(path: Path, settings: dict[str, Setting], depth: int) -> None:
    """Add the settings of one file."""
    try:
        with path.open("rb") as file:
            encoded = file.read(_MOST_BYTES + 1)
        if len(encoded) > _MOST_BYTES:
            raise InputError(
                f"{path} has more than {_MOST_BYTES:,} bytes: it is no configuration of the published code."
            )
        tree, lines = ast.parse(encoded), encoded.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:  # ValueError: a null byte, or no UTF-8
        line = f" (line {error.lineno})" if isinstance(error, SyntaxError) and error.lineno else ""
        raise InputError(f"{path} is no Python file that can be read{line}: give a configuration file.") from error
    refused = []
    for statement in tree.body:
        try:
            _read_statement(statement, path, settings, depth)
        except _Unreadable as error:
            text = lines[statement.lineno - 1].strip()
            refused.append(f"line {statement.lineno}, `{text[:60]}{'…' if len(text) > 60 else ''}`, {error}")
    if refused:
        more = f", and {len(refused) - _NAMED} more" if len(refused) > _NAMED else ""
        raise InputError(
            f"{path} is read without being run, as assignments of literals to config: {'; '.join(refused[:_NAMED])}"
            f"{more}: write the values that the lines stand for."
        )


def _read_statement(statement: ast.stmt, path: Path, settings: dict[str, Setting], depth: int) -> None:
    match statement:
        case ast.Expr(value=ast.Constant()) | ast.ImportFrom(module="easydict", level=0):
            return
        case ast.Import(names=[ast.alias(name="easydict")]):
            return
        case ast.ImportFrom(module=str(module), names=[ast.alias(name="config", asname=None)]):
            name = module.removeprefix("configs.")
            base = path.with_name(f"{name}.py")
            if not (name.isidentifier() and base.is_file()):
                raise _Unreadable(f"extends {name}.py, which is not beside it")
            if depth == _MOST_DEPTH:
                raise _Unreadable("extends a file in too many steps")
            _read_file(base, settings, depth + 1)
        case ast.Assign(targets=targets, value=value) if _is_new_config(value):
            if not all((isinstance(one, ast.Name) and one.id == "config") or _name(one) for one in targets):
                raise _Unreadable("does not assign to config")
        case ast.Assign(targets=targets, value=value):
            names = [_name(target) for target in targets]
            if not all(names):
                raise _Unreadable("does not assign to an attribute of config")
            literal = _literal(value, settings, 0)
            settings |= {str(name): Setting(literal, f"{path.name}:{statement.lineno}") for name in names}
        case _:
            raise _Unreadable("is no assignment")


def _is_new_config(value: ast.expr) -> bool:
    """Whether an expression is `edict()`, under one of its names and without arguments."""
    match value:
        case ast.Call(func=ast.Name(id="edict" | "EasyDict"), args=[], keywords=[]):
            return True
        case ast.Call(func=ast.Attribute(value=ast.Name(id="easydict"), attr="EasyDict"), args=[], keywords=[]):
            return True
    return False


def _name(target: ast.expr) -> str | None:
    """`a.b` of an expression `config.a.b`; None for any other, and for names that begin with an underscore."""
    parts: list[str] = []
    while isinstance(target, ast.Attribute):
        parts.insert(0, target.attr)
        target = target.value
    is_plain = isinstance(target, ast.Name) and target.id == "config" and len(parts) <= _MOST_DEPTH
    return ".".join(parts) if is_plain and parts and not any(part.startswith("_") for part in parts) else None


def _literal(node: ast.expr, settings: Mapping[str, Setting], depth: int) -> Any:
    """The value of a literal; of arithmetic only numbers, which cannot grow without bound."""
    if depth > _MOST_DEPTH:
        raise _Unreadable("is nested too deeply")
    match node:
        case ast.Constant(value=None | bool() | str() as value):
            return value
        case ast.Constant(value=int() | float() as value):
            return _bounded(value)
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return [_literal(item, settings, depth + 1) for item in items]
        case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
            return {str(key.value): _literal(value, settings, depth + 1) for key, value in zip(keys, values)}  # type: ignore[union-attr]  # noqa: B905
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _number(operand, settings, depth + 1)
            return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _ARITHMETIC:
            pair = (_number(left, settings, depth + 1), _number(right, settings, depth + 1))
            try:
                return _bounded(_ARITHMETIC[type(sign)](*pair))
            except (ZeroDivisionError, OverflowError) as error:
                raise _Unreadable("has no finite value") from error
        case ast.Attribute() if (name := _name(node)) in settings:
            return _number_of(settings[str(name)].value)
    raise _Unreadable("is no literal")


def _number(node: ast.expr, settings: Mapping[str, Setting], depth: int) -> Any:
    return _number_of(_literal(node, settings, depth))


def _number_of(value: Any) -> Any:
    if type(value) not in (int, float):
        raise _Unreadable("is no literal and no arithmetic of numbers")
    return value


def _bounded(value: float) -> float:
    if not abs(value) <= _LARGEST:
        raise _Unreadable(f"has a number beyond {_LARGEST:g}")
    return value


# -- converting --------------------------------------------------------------------------------------------------------

# Settings that are ours under another name; a whole number is taken where a float is meant.
_SAME: dict[str, tuple[str, type]] = {
    "embedding_size": ("backbone.embedding_dim", int),
    "sample_rate": ("head.sample_rate", float),
    "lr": ("optimizer.lr", float),
    "momentum": ("optimizer.momentum", float),
    "weight_decay": ("optimizer.weight_decay", float),
    "num_epoch": ("schedule.epochs", float),
    "warmup_epoch": ("schedule.warmup_epochs", float),
    "frequent": ("output.log_every", int),
    "verbose": ("output.evaluate_every", int),
    "seed": ("seed", int),
    "num_workers": ("data.workers", int),
    "num_classes": ("data.num_classes", int),
    "rec": ("data.path", str),
}
_WITHOUT_MEANING = {
    "dali": "images are decoded by the processes of data.workers",
    "dali_aug": "data.augment has stronger augmentation",
    "num_image": "the images are counted",
    "resume": "the option --resume continues a run",
    "output": "the option --out names the folder of a run",
    "save_all_states": "every checkpoint is whole",
    "suffix_run_name": "a run has the name of its folder",
}
_OF_WANDB = ("wandb_key", "wandb_entity", "wandb_project", "wandb_log_all", "wandb_resume", "save_artifacts")
_USED_ELSEWHERE = ["margin_list", "loss", "network", "optimizer", "batch_size", "gradient_acc", "fp16", "val_targets"]
_USED_ELSEWHERE += ["interclass_filtering_threshold", "using_wandb"]


@dataclass(frozen=True)
class Conversion:
    """Our configuration, and what it does not hold.

    Attributes:
        notes: sentences about what became of the settings.
        accumulated: micro-batches of a process in one optimizer step, of which the published code counts each.
        benchmarks: names of the verification files.
    """

    config: TrainConfig
    notes: list[str]
    accumulated: int
    benchmarks: list[str]


def convert_published(settings: Mapping[str, Setting], *, world_size: int, compatible: bool) -> Conversion:
    """Our configuration of a published one.

    Args:
        settings: as `read_published` returns them.
        world_size: the number of processes, each of which had `batch_size` images.
        compatible: whether the head keeps what the published code computes differently from the paper.

    Raises:
        InputError: a value is of the wrong type, or nothing here computes it; the message has its place.
    """
    values: dict[str, Any] = {"optimizer.lr_scaling": "absolute", "optimizer.max_grad_norm": 5.0}
    notes: list[str] = []
    for name, (key, kind) in _SAME.items():
        if name in settings:
            values[key] = _typed(settings, name, kind)
    if values.get("schedule.warmup_epochs", 0.0) < 0:  # in the oldest files, -1 is none
        values["schedule.warmup_epochs"] = 0.0
    values |= _network(settings) | _margin(settings)
    optimizer = _typed(settings, "optimizer", str)
    if optimizer not in ("sgd", "adamw"):
        raise _refusal(settings, "optimizer", "and the optimizers here are sgd and adamw")
    values["optimizer.name"] = optimizer
    batch, parts = _typed(settings, "batch_size", int), _typed(settings, "gradient_acc", int)
    values["data.micro_batch_size"], values["data.global_batch_size"] = batch, batch * parts * world_size
    values["precision"] = "float16" if _typed(settings, "fp16", bool) else "float32"
    if "using_wandb" in settings and _typed(settings, "using_wandb", bool):
        values["output.wandb"] = "online"
    threshold = _typed(settings, "interclass_filtering_threshold", float)
    values["head.conflict_threshold"] = threshold or None
    published = _published_behaviour(values)
    values |= published if compatible else {}
    if published:
        what = ", ".join(f"{key} {str(value).lower()}" for key, value in published.items())
        kept = "set" if compatible else "not set; --compat insightface sets it"
        notes.append(f"what the published code computes: {what} ({kept})")
    for name, setting in settings.items():
        if name not in _SAME and name not in _USED_ELSEWHERE:
            meaning = _WITHOUT_MEANING.get(name)
            meaning = "set it by wandb's own environment variables" if name in _OF_WANDB else meaning
            hint = did_you_mean(name, [*_SAME, *_USED_ELSEWHERE])
            says = f"has no meaning here: {meaning}" if meaning else f"is not known and was left out.{hint}"
            notes.append(f"config.{name} ({setting.place}) {says}".rstrip("."))
    config = TrainConfig().with_values(values)
    try:
        config.check()
    except InputError as error:
        raise InputError(f"The converted configuration is refused: {error}") from error
    return Conversion(config, notes, parts, _typed(settings, "val_targets", list) if "val_targets" in settings else [])


def _typed(settings: Mapping[str, Setting], name: str, kind: type) -> Any:
    """A setting as a value of `kind`; that type's empty value for one that is not set."""
    if name not in settings:
        return 1 if name == "gradient_acc" else kind()
    value = settings[name].value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise _refusal(settings, name, f"which is no {kind.__name__}")
    return value


def _refusal(settings: Mapping[str, Setting], name: str, reason: str) -> InputError:
    setting = settings[name]
    return InputError(f"config.{name} ({setting.place}) is {setting.value!r}, {reason}: change it there.")


def _network(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The backbone and, of a ViT, what the suffixes of its name say: `vit_b_dp005_mask_005`."""
    text = _typed(settings, "network", str)
    name, _, suffix = text.partition("_dp")
    if name not in BACKBONES or name == "mini":
        raise _refusal(settings, "network", "which is no network here")
    if not name.startswith("vit"):
        return {"backbone.name": name}
    known = {"": (0.1, 0.1), "005_mask0": (0.05, 0.0), "005_mask_0": (0.05, 0.0), "005_mask_005": (0.05, 0.1)}
    if suffix not in known:
        raise _refusal(settings, "network", "whose drop path and mask are not known")
    # The published masks drop a tenth of the tokens whatever ratio is configured, and ViT-H has none.
    drop_path, mask_ratio = (0.0, 0.0) if name == "vit_h" and not suffix else known[suffix]
    large = name in ("vit_b", "vit_l", "vit_h")
    options = {"drop_path": drop_path, "mask_ratio": mask_ratio, "checkpointing": large}
    return {"backbone.name": name, **{f"backbone.{key}": value for key, value in options.items()}}


def _margin(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The margin of `margin_list` = (m1, m2, m3), cos(m1 θ + m2) − m3, or of the `loss` of older files."""
    if "loss" in settings:
        loss = _typed(settings, "loss", str)
        if loss not in ("cosface", "arcface"):
            raise _refusal(settings, "loss", "and the margins here are cosface and arcface")
        return {"head.margin": loss}
    match _typed(settings, "margin_list", list):
        case [1 | 1.0, 0 | 0.0, 0 | 0.0]:
            return {"head.margin": "none"}
        case [1 | 1.0, 0 | 0.0, int() | float() as m]:
            return {"head.margin": "cosface", "head.margin_value": float(m)}
        case [1 | 1.0, int() | float() as m, 0 | 0.0]:
            return {"head.margin": "arcface", "head.margin_value": float(m)}
        case [int() | float(), int() | float(), int() | float()] as three:
            options = [f"m{number}={float(m)}" for number, m in enumerate(three, 1)]
            return {"head.margin": "combined", "head.margin_options": options}
    raise _refusal(settings, "margin_list", "which is no list of three numbers")


def _published_behaviour(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options under which the head computes what the published code does, where that differs from the paper."""
    options: dict[str, Any] = {}
    if values["optimizer.name"] == "sgd" and values.get("head.sample_rate", 1.0) < 1:
        options["head.unsampled"] = "lazy_dense"
    if values["head.margin"] == "arcface":
        options["head.margin_gradient"] = "straight_through"
    if values["head.conflict_threshold"] is not None:
        options["head.conflict_as_zero_logit"] = True
    return options
