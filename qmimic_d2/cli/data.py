"""
Checks data sets before a training and shows their numbers and sizes; downloads Pascal VOC and WIDER FACE.

"data check" looks at every image, box and class as a training does before its first iteration. It takes a data.yaml of
YOLO or a folder in the layout of Pascal VOC, the annotation file of COCO and its folder of images, or a config. Nothing
is changed. Exit status: 0; 1 where a training would be refused; 2 for a mistake in the arguments.

"data download" puts Pascal VOC or WIDER FACE where the shipped configs read them, below the folder that the environment
variable DETECTRON2_DATASETS names (default: datasets), and checks them. What is there is not fetched again. Exit
status: 0; 1 where something could not be fetched, or a check fails.
"""

import argparse
import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from qmimic_d2.analysis.model_cost import build_for_measurement
from qmimic_d2.cli.data_text import figures_text, wrapped
from qmimic_d2.cli.model_arguments import key_value_pairs
from qmimic_d2.cli.printable import printable, say
from qmimic_d2.cli.usage import usage_errors
from qmimic_d2.config import add_qmimic_config
from qmimic_d2.config_files import changed
from qmimic_d2.data.download import VOC_PARTS, DownloadError, download_pascal_voc, download_wider_face
from qmimic_d2.data.figures import measure_dataset
from qmimic_d2.data.loading import load_dataset
from qmimic_d2.data.sources import Source, guess_sources, sources_config
from qmimic_d2.data.wider_face.registration import FOLDER, GROUND_TRUTH
from qmimic_d2.engine import load_config
from qmimic_d2.engine.checks.data import ModelClasses, inspect_datasets, model_classes
from qmimic_d2.error_text import describe_error
from qmimic_d2.evaluation import load_ground_truth
from qmimic_d2.folder_lock import alone_in
from qmimic_d2.near_names import check_registered

# To train on, and to evaluate on, by the shipped configs.
_VOC_SETS = (("voc_2007_trainval", "voc_2012_trainval"), ("voc_2007_test",))
_WIDER_FACE_SETS = (("wider_face_train",), ("wider_face_val",))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    check = actions.add_parser("check", help="look at data sets as a training does, and print a summary of each")
    add = check.add_argument
    add("path", nargs="?", default="", metavar="PATH", help="a data.yaml of YOLO, or a folder in VOC's layout")
    add(
        "--coco",
        nargs=2,
        action="append",
        default=[],
        metavar=("JSON", "FOLDER"),
        help="annotation file and folder of images; a second one is evaluated on",
    )
    add(
        "--config-file",
        default="",
        metavar="FILE",
        help="every set of its DATASETS.TRAIN and TEST; KEY VALUE pairs at the end override it",
    )
    check.set_defaults(act=_check, opts=[])
    download = actions.add_parser("download", help="fetch a data set to where the shipped configs read it")
    download.add_argument("dataset", choices=("voc", "widerface"), help="2.8 GB; 1.9 GB, which needs the package gdown")
    download.set_defaults(act=_download)


def run(args: argparse.Namespace) -> int:
    return args.act(args)


def _check(args: argparse.Namespace) -> int:
    with usage_errors():
        if bool(args.path) + bool(args.coco) + bool(args.config_file) != 1:
            raise ValueError("give one of PATH, --coco JSON FOLDER and --config-file FILE")
        if args.config_file:
            cfg, classes = _of_config(args)
            return check_and_show(cfg, classes)
        if args.opts:
            raise ValueError(f"KEY VALUE pairs need --config-file, got {' '.join(args.opts)}")
        train, test = _coco_sources(args.coco) if args.coco else _path_sources(args.path)
    try:
        return check_and_show(_config_of(train, test))
    except (FileNotFoundError, ValueError) as error:  # their classes cannot be read
        return _show_problems([str(error)])


def _download(args: argparse.Namespace) -> int:
    sets = _VOC_SETS if args.dataset == "voc" else _WIDER_FACE_SETS
    metadata = MetadataCatalog.get(sets[0][0])
    place = Path(metadata.dirname).parent if args.dataset == "voc" else Path(metadata.annotation_file).parents[2]
    root = os.path.abspath(place)
    try:
        os.makedirs(root, exist_ok=True)
        with alone_in(root):
            if args.dataset == "voc":
                for year, split in VOC_PARTS:
                    is_new = download_pascal_voc(root, year, split)
                    say(f"Pascal VOC {year} {split}: {'fetched' if is_new else 'there already'}")
            else:
                say(f"WIDER FACE: fetched {', '.join(download_wider_face(root)) or 'nothing, all is there'}")
        if args.dataset == "widerface":
            load_ground_truth(os.path.join(root, FOLDER, GROUND_TRUTH))
    except (DownloadError, OSError, ValueError) as error:
        say(describe_error(error), sys.stderr)
        return 1
    say(f"The shipped configs read it from {printable(root)}\n")
    cfg = get_cfg()
    add_qmimic_config(cfg)
    return check_and_show(changed(cfg, "DATASETS.TRAIN", sets[0], "DATASETS.TEST", sets[1]))


def check_and_show(cfg: CfgNode, classes: Optional[ModelClasses] = None) -> int:
    """
    Prints a summary of every data set of a config, what was repaired and what is wrong.

    Returns:
        0, or 1 where a training would be refused.
    """
    report = inspect_datasets(cfg, classes)
    for name in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        say(f"{printable(name)}: {_parts(cfg, name)}")
        say(f"{_figures(name, bool(report.problems))}\n")
    if report.notes:
        say("Repaired or worth knowing (no file is changed):")
        say("\n\n".join(map(wrapped, report.notes)) + "\n")
    if report.problems:
        return _show_problems(report.problems)
    say("All images, boxes and classes can be used.")
    return 0


def _show_problems(problems: Sequence[str]) -> int:
    say("A training would be refused:")
    say("\n\n".join(map(wrapped, problems)))
    return 1


def _of_config(args: argparse.Namespace) -> Tuple[CfgNode, Optional[ModelClasses]]:
    cfg = load_config(args.config_file, key_value_pairs(args), eval_only=True, device="cpu")
    for key, names in (("DATASETS.TRAIN", cfg.DATASETS.TRAIN), ("DATASETS.TEST", cfg.DATASETS.TEST)):
        check_registered(key, names, "DATASETS.SOURCES names your own (docs/own_data.md); --import MODULE registers")
    if not cfg.DATASETS.TRAIN and not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TRAIN and DATASETS.TEST are empty; name a data set")
    return cfg, model_classes(cfg, build_for_measurement(cfg))


def _path_sources(path: str) -> Tuple[List[Source], List[Source]]:
    path = os.path.abspath(os.path.expanduser(path))
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    return guess_sources(path, os.path.basename(folder), is_complete=False)


def _coco_sources(pairs: Sequence[Sequence[str]]) -> Tuple[List[Source], List[Source]]:
    sources = []
    for file, folder in pairs:
        file, folder = (os.path.abspath(os.path.expanduser(each)) for each in (file, folder))
        if not os.path.isfile(file):
            raise FileNotFoundError(f"--coco: there is no file {file!r}")
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"--coco: there is no folder {folder!r}")
        sources.append(Source(os.path.splitext(os.path.basename(file))[0], "coco", file, images=folder))
    return sources[:1], sources[1:]


def _with_free_names(sources: Sequence[Source]) -> List[Source]:
    """A data set of Detectron2's, or another file of the same name, may have the name."""
    named: List[Source] = []
    for source in sources:
        taken = {*DatasetCatalog, *(each.name for each in named)}
        names = itertools.chain([source.name], (f"{source.name}_{number}" for number in itertools.count(2)))
        named.append(replace(source, name=next(each for each in names if each not in taken)))
    return named


def _config_of(train: Sequence[Source], test: Sequence[Source]) -> CfgNode:
    sources = _with_free_names([*train, *test])
    return changed(sources_config(sources[: len(train)], sources[len(train) :]))


def _parts(cfg: CfgNode, name: str) -> str:
    keys = [key for key in ("TRAIN", "TEST") if name in cfg.DATASETS[key]]
    return " and ".join({"TRAIN": "to train on", "TEST": "to evaluate on"}[key] for key in keys)


def _figures(name: str, is_wrong: bool) -> str:
    try:
        dicts = load_dataset(name)
        if isinstance(dicts, (list, tuple)):
            return figures_text(measure_dataset(dicts, MetadataCatalog.get(name).get("thing_classes", ())))
    except Exception:  # whatever a function of the user's own does with data that the check refuses
        if not is_wrong:
            raise
        return "  cannot be loaded; see below"
    return "  a PyTorch data set of your own, which has no list of images"
