"""A model as files that other programs take, each compared with the model before it takes its place."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from partialfc.core.errors import InputError
from partialfc.core.files import fsync, output_errors, temporary_name, write_file
from partialfc.evaluation.statistics.thresholds import Thresholds, read_thresholds, write_thresholds
from partialfc.model import files
from partialfc.model.config import CONFIG_NAME, config_text
from partialfc.model.contract import contract_of, same_source
from partialfc.model.files import save_model, write_weights
from partialfc.model.onnx_file import OnnxNetwork
from partialfc.use import insightface
from partialfc.use.card import model_card, read_results
from partialfc.use.graph import (
    LEAST_COSINE,
    GraphNetwork,
    Parity,
    WeightType,
    compare,
    faces_for_checks,
    time_one_image,
    write_graph,
)
from partialfc.use.model import FaceModel
from partialfc.use.pictures import check_new

Target = Literal["onnx", "insightface", "insightface-server", "immich", "deepface", "safetensors", "hub"]
_WITHOUT_GRAPH = ("safetensors", "hub")
_OF_112_AND_512 = ("immich", "deepface")  # pixels and numbers: the former has a column for them in its database
_MFR_BYTES, _MFR_WIDTH, _MFR_WIDEST = 1 << 30, 512, 1024


@dataclass(frozen=True)
class ExportOptions:
    """What to write.

    Args:
        target: the program. For "insightface" a path that ends with .onnx is the plain file, any other the package; for
            "immich" it is a folder, for "deepface" a file.
        weights: of ONNX, how they are stored.
        mirror: of ONNX, add the embeddings of mirrored images in the graph.
        name: of the model in manifests and card; by default that of the path.
        detector: of "insightface-server", the detector beside the model.
        results: of "hub", a `results.json` of the model.
        mfr: of a plain ONNX file, refuse what the MFR challenge would not take.
    """

    target: Target = "onnx"
    weights: WeightType = "float32"
    mirror: bool = False
    name: str | None = None
    detector: Path | None = None
    results: Path | None = None
    mfr: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file or folder.
        bytes: of all its files.
        contract: of the embeddings that it gives.
        parity: its comparison with the model.
        notes: what the user should know, a sentence each, without its full stop.
    """

    path: Path
    bytes: int
    contract: str
    parity: Parity
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        parity = self.parity
        found = {"cosine": parity.cosine, "batches": list(parity.batches), "milliseconds": parity.milliseconds}
        return {"path": str(self.path), "bytes": self.bytes, "contract": self.contract, **found, "notes": self.notes}


def export(model: FaceModel, to: Path, options: ExportOptions) -> Exported:
    """Write a model for another program; nothing stays at `to` if a check fails.

    Raises:
        InputError: `to` exists or cannot be written, an option does not fit the target, or the program would not take
            the model.
        JobError: what was written does not compute what the model does.
    """
    check_new(to, "--to")
    is_plain = options.target in ("onnx", "deepface") or (options.target == "insightface" and to.suffix == ".onnx")
    _check_options(model, options, is_plain)
    suffix = ".onnx" if is_plain else ".safetensors" if options.target == "safetensors" else to.suffix
    if to.suffix != suffix:
        raise InputError(f"{to} would be a file that programs know by its suffix: give a name that ends in {suffix}.")
    work = temporary_name(to)
    with output_errors(to):
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            place = work / to.name
            if options.target == "safetensors":
                write_weights(place, model.backbone, model.config)
                contract, parity = contract_of(model), _compare_weights(model, place)
            elif options.target == "hub":
                contract, parity = _write_hub(place, model, options)
            elif is_plain:
                contract, parity = _write_onnx(place, model, options, is_plain=True)
            elif options.target == "immich":
                (place / "recognition").mkdir(parents=True)
                contract, parity = _write_onnx(place / "recognition" / "model.onnx", model, options, is_plain=True)
            else:
                place.mkdir()
                contract, parity = _write_package(place, model, options)
            written = [place, *place.rglob("*")]
            for path in written:
                fsync(path)
            size = sum(path.stat().st_size for path in written if path.is_file())
            place.rename(to)
            fsync(to.absolute().parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return Exported(to, size, contract, parity, _notes(model, options, is_plain))


def _check_options(model: FaceModel, options: ExportOptions, is_plain: bool) -> None:
    """Refuse options that do not fit the target, with an InputError."""
    target, is_onnx = options.target, options.target not in _WITHOUT_GRAPH
    for wrong, option, remedy in (
        (options.weights != "float32" and not is_onnx, "--weights", "the weights are stored as the model has them"),
        (options.mirror and not is_onnx, "--mirror", "the configuration says whether images are mirrored"),
        (options.results is not None and target != "hub", "--results", "only a model card shows results"),
        (options.detector is not None and target != "insightface-server", "--detector", "only the server takes one"),
        (options.mfr and not is_plain, "--check mfr", "a submission is one .onnx file"),
        (options.mfr and options.weights != "float32", "--weights float16", "a submission to MFR is in float32"),
    ):
        if wrong:
            raise InputError(f"{option} does not go with --for {target}: {remedy}.")
    config = model.config
    if options.mfr and (config.image_size != 112 or config.embedding_dim > _MFR_WIDEST):
        raise InputError(
            f"A submission to MFR takes images of 112 pixels and gives {_MFR_WIDEST} numbers at most, and {model.path} "
            f"has {config.image_size} and {config.embedding_dim}: choose another model."
        )
    if target in _OF_112_AND_512 and (config.image_size, config.embedding_dim) != (112, 512):
        raise InputError(
            f"{target} takes images of 112 pixels and embeddings of 512 numbers, and {model.path} has "
            f"{config.image_size} and {config.embedding_dim}: export a model that was trained with these."
        )
    if target.startswith("insightface"):
        insightface.check_size(config.image_size, str(model.path))
    if target == "insightface-server" and options.detector is None:
        raise InputError("--for insightface-server needs the detector that is to stand beside the model: --detector.")
    if isinstance(model.backbone, OnnxNetwork):
        if target == "onnx" or not is_onnx:
            raise InputError(
                f"{model.path} is an ONNX file already: it can be exported --for insightface, immich or deepface alone."
            )
        if options.weights != "float32" or options.mirror:
            raise InputError(f"{model.path} is an ONNX file and is copied as it is: leave out --weights and --mirror.")


def _thresholds(model: FaceModel) -> Thresholds | None:
    """The thresholds beside the model, None without any."""
    path = model.thresholds_path
    if not path.is_file():
        return None
    thresholds = read_thresholds(path)
    if not same_source(thresholds.contract, contract_of(model)):
        raise InputError(f"{path} was measured with another model: measure the thresholds again, or remove it.")
    return thresholds


def _write_onnx(path: Path, model: FaceModel, options: ExportOptions, *, is_plain: bool) -> tuple[str, Parity]:
    """Write or copy the graph and check it: the contract of its embeddings, and the comparison.

    Args:
        is_plain: no manifest beside it says how images are normalised.
    """
    source: nn.Module
    if isinstance(model.backbone, OnnxNetwork):
        name, source, contract = str(model.path), model.backbone, contract_of(model)
        shutil.copyfile(model.path, path)
    else:
        name, source = f"The export of {model.path}", GraphNetwork(model, options.mirror)
        contract = write_graph(path, model, source, options.weights)
    network = OnnxNetwork(path)
    if options.target != "onnx":
        insightface.check_recognizer(network, name)
    if options.mfr and (size := path.stat().st_size) > _MFR_BYTES:
        raise InputError(f"A submission to MFR has 1 GiB at most, and {name} {size:,} bytes: choose another model.")
    if options.mfr or (is_plain and options.target != "onnx"):
        insightface.check_plain(path, name)
    return contract, _compared(model, source, network, name, LEAST_COSINE[options.weights])


def _write_package(folder: Path, model: FaceModel, options: ExportOptions) -> tuple[str, Parity]:
    """Write the model and the manifest of an insightface package."""
    path = folder / insightface.MODEL_NAME
    contract, parity = _write_onnx(path, model, options, is_plain=False)
    name, width, inside = options.name or folder.name, model.config.embedding_dim, insightface.normalises(path)
    if options.detector is None:
        insightface.write_package(folder, name, size=model.config.image_size, width=width, embedded=inside)
        return contract, parity
    if inside or model.config.image_size != 112:
        raise InputError(
            f"{model.path} normalises its input itself or is not of 112 pixels, and InsightFace Server takes neither: "
            "export a model of 112 pixels from its weights."
        )
    insightface.write_server_package(folder, name, width=width, detector=options.detector, version=contract[:12])
    return contract, parity


def _write_hub(folder: Path, model: FaceModel, options: ExportOptions) -> tuple[str, Parity]:
    """Write a model folder with card, thresholds and contract."""
    thresholds = _thresholds(model)
    contract, name = contract_of(model), options.name or folder.name
    benchmarks = {} if options.results is None else read_results(options.results, contract)
    save_model(folder, model.backbone, model.config)
    write_file(folder / CONFIG_NAME, config_text(model.config, contract=contract))
    write_file(folder / "README.md", model_card(name, model.config, contract, benchmarks, thresholds))
    if thresholds is not None:
        write_thresholds(thresholds, folder)
    return contract, _compare_weights(model, folder)


def _compare_weights(model: FaceModel, place: Path) -> Parity:
    """The comparison of written weights, read again."""
    loaded = GraphNetwork(files.load_model(place), mirror=False)
    return _compared(model, GraphNetwork(model, mirror=False), loaded, "What was written", LEAST_COSINE["float32"])


def _compared(model: FaceModel, source: nn.Module, export: nn.Module, name: str, least: float) -> Parity:
    faces = faces_for_checks(model.config.image_size)
    return replace(compare(source, export, faces, least, name), milliseconds=time_one_image(export, faces[:1]))


def _notes(model: FaceModel, options: ExportOptions, is_plain: bool) -> list[str]:
    """What the user should know of an export."""
    notes = []
    is_onnx = options.target not in _WITHOUT_GRAPH
    if is_onnx and model.config.flip and not options.mirror:
        notes.append(
            "the graph computes f(x) and the thresholds are those of f(x) + f(mirrored x): measure them for a program "
            "that does not mirror with evaluate --no-flip, or export with --mirror"
        )
    if options.target == "immich":
        notes.append("it takes the place of recognition in the folder of a model; immich must detect all faces anew")
    if options.target == "deepface":
        notes.append("deepface aligns faces by a rule of its own: accuracy measured here does not carry over")
    if options.target.startswith("insightface") and not is_plain:
        notes.append(f"it has no {insightface.LICENSE}, which InsightFace issues, and counts as non-commercial there")
    if options.mfr and model.config.embedding_dim > _MFR_WIDTH:
        notes.append(f"more than {_MFR_WIDTH} numbers are for the unconstrained track of MFR alone")
    if options.mfr:
        notes.append("the limits of MFR on the time for an image are for its own GPU and were not checked")
    if model.config.saw_only_procedural:
        notes.append("the model has seen only procedural faces, and decides nothing about photographs")
    return notes
