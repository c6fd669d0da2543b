"""
From your photographs to a detector for a small device: teacher, student, export and page in one go.

    distill --data faces/data.yaml --output runs/faces
    distill --train train.json photos/ --val val.json photos/ --output runs/x

It looks at the data, writes a YAML file for every model, with a reason for every number, and runs the commands that it
prints. Interrupted, the same command continues. You may edit the YAML files and run it again: what depends on an edited
file is made anew. Exit status: 0 when all went well, 1 when a command failed, 2 for a mistake in arguments or data.
"""

import argparse
import functools
import os
import sys
import tempfile
from typing import Any, Dict, List, Optional, Tuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone

from qmimic_d2 import __version__
from qmimic_d2.cli.argument_types import positive, positive_number
from qmimic_d2.cli.printable import command_text, printable, say
from qmimic_d2.cli.task_runner import Task, run_tasks
from qmimic_d2.cli.usage import usage_errors
from qmimic_d2.config import add_qmimic_config
from qmimic_d2.data.loading import load_dataset
from qmimic_d2.data.sources import Source, guess_sources, sources_config
from qmimic_d2.distill.choices import STUDENTS, Settings, choose_settings
from qmimic_d2.distill.data_statistics import DataStatistics, measure_data
from qmimic_d2.distill.outcome import (
    collect_rows,
    given_teacher,
    model_card,
    shipped_files,
    table_text,
    write_model_card,
)
from qmimic_d2.distill.plan import GivenTeacher, Step, config_texts, plan_steps, student_maps
from qmimic_d2.distill.step_seconds import measure_step_seconds, measure_teacher_seconds
from qmimic_d2.engine import load_config
from qmimic_d2.engine.checks.data import check_datasets
from qmimic_d2.engine.checks.output_folder import check_output_dir
from qmimic_d2.files import read_json, write_json, write_text
from qmimic_d2.image_file import read_bgr_image
from qmimic_d2.modeling.mimic.teacher import FrozenTeacher
from qmimic_d2.modeling.mimic.teacher_config import load_teacher_config
from qmimic_d2.progress import seconds_text, track

# The arguments of the folder's first run.
_RECORD = "distill.json"
# Share of --minutes for the trainings' own steps; evaluation, export, verification and page take the rest.
_SHARE_OF_STEPS = 0.6
_LEAST_ITERATIONS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="", metavar="PATH", help="data.yaml (YOLO), or a folder like Pascal VOC's")
    for name in ("train", "val"):
        parser.add_argument(
            f"--{name}", nargs=2, default=[], metavar=("JSON", "FOLDER"), help="COCO annotations and their images"
        )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of everything that is made")
    parser.add_argument(
        "--teacher", nargs=2, default=[], metavar=("CONFIG", "WEIGHTS"), help="a detector of yours (default: train one)"
    )
    parser.add_argument("--student", choices=list(STUDENTS), default="vgg-1-16", help="default: %(default)s")
    parser.add_argument("--compare", action="store_true", help="train a student without a teacher, too")
    parser.add_argument("--minutes", type=positive_number, default=0.0, metavar="N", help="time for everything")
    parser.add_argument("--iterations", type=positive, default=0, metavar="N", help="length of each training")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="", help="default: cuda where there is a GPU")
    parser.add_argument("--seed", type=positive, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")


def run(args: argparse.Namespace) -> int:
    with usage_errors():
        given = _given(args)
        output = given["output"]
        known = _known(output, given)
        sources = _sources(given)
        statistics = _look_at(sources)
        device = given["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
        steps = plan_steps(output, bool(given["teacher"]), sources[1].name, given["compare"])
        texts: Dict[str, str] = {}
        if not known:
            if not args.dry_run:
                check_output_dir(output)
            settings, texts, seconds = _settings(given, statistics, sources, device)
            _say_plan(statistics, settings, steps, seconds, device)
    if args.dry_run:
        return 0
    with usage_errors():
        if not known:
            os.makedirs(output, exist_ok=True)
            for name, text in texts.items():
                write_text(os.path.join(output, name), text)
            write_json(os.path.join(output, _RECORD), given)
        tasks = _tasks(steps, output)
    failed: List[str] = []
    for task in tasks:
        task.on_failure = functools.partial(_note_failure, failed, task.name)
    try:
        run_tasks(tasks, output, 1, {}, keeps_going=True)
    except KeyboardInterrupt:
        say("stopped; the same command continues from here", sys.stderr)
        return 130
    if not set(failed) & {step.name for step in steps if step.folder}:
        _say_outcome(output, steps, statistics, sources, given["seed"])
    return 1 if failed else 0


# --------------------------------------------------------------------------------------------- before the plan


def _given(args: argparse.Namespace) -> Dict[str, Any]:
    """The arguments that decide on the result, with absolute paths."""
    if bool(args.data) == bool(args.train or args.val):
        raise ValueError("give either --data, or --train and --val")
    if args.data == "" and not (args.train and args.val):
        raise ValueError(f"--{'val' if args.train else 'train'} is missing; COCO needs --train and --val")
    if args.minutes and args.iterations:
        raise ValueError("give --minutes or --iterations, not both")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and PyTorch sees no GPU here")
    weights = args.teacher[1] if args.teacher else ""
    return {
        "output": os.path.abspath(args.output),
        "data": os.path.abspath(args.data) if args.data else "",
        "train": [os.path.abspath(each) for each in args.train],
        "val": [os.path.abspath(each) for each in args.val],
        "teacher": [args.teacher[0], os.path.abspath(weights) if os.path.exists(weights) else weights]
        if args.teacher
        else [],
        "student": args.student,
        "compare": args.compare,
        "minutes": args.minutes,
        "iterations": args.iterations,
        "device": args.device,
        "seed": args.seed,
    }


def _known(output: str, given: Dict[str, Any]) -> bool:
    """
    Whether the folder holds an earlier run with the same arguments.

    Raises:
        ValueError: it had others; names them.
    """
    path = os.path.join(output, _RECORD)
    if not os.path.isfile(path):
        return False
    earlier = read_json(path)
    if not isinstance(earlier, dict):
        raise ValueError(f"{path!r} is damaged; choose another --output")
    changed = [key for key in given if earlier.get(key) != given[key]]
    if changed:
        texts = [f"--{key} was {earlier.get(key)!r} and is {given[key]!r}" for key in changed]
        raise ValueError(
            f"--output {output!r} holds a run with other arguments: {'; '.join(texts)}. Choose another folder"
        )
    return True


def _sources(given: Dict[str, Any]) -> Tuple[Source, Source]:
    """The training set and the test set, registered, with their classes."""
    name = "".join(each if each.isalnum() else "_" for each in os.path.basename(given["output"])) or "own"
    if given["data"]:
        (train,), (test,) = guess_sources(given["data"], name)
    else:
        train, test = (
            Source(f"{name}_{part}", "coco", given[part][0], "", given[part][1]) for part in ("train", "val")
        )
    cfg = sources_config([train], [test])
    check_datasets(cfg)
    train, test = (Source.from_entry(entry) for entry in cfg.DATASETS.SOURCES)
    return train, test


def _look_at(sources: Tuple[Source, Source]) -> DataStatistics:
    return measure_data(load_dataset(sources[0].name), sources[0].classes)


def _given_teacher(given: Dict[str, Any]) -> Tuple[GivenTeacher, FrozenTeacher]:
    """
    The user's teacher, with its weights.

    Raises:
        FileNotFoundError, ValueError: its files are missing or do not fit, or no student meets its maps.
    """
    config_file, weights = given["teacher"]
    cfg = get_cfg()
    add_qmimic_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE, cfg.MODEL.QMIMIC.TEACHER.WEIGHTS = config_file, weights
    cfg.MODEL.QMIMIC.MIMIC.QUANTIZE_TEACHER = False  # no stride is known yet
    config = load_teacher_config(cfg)
    teacher = GivenTeacher(config.path, weights, config.shapes())
    _, cfg.MODEL.QMIMIC.MIMIC.TEACHER_IN_FEATURES = student_maps(teacher)
    return teacher, FrozenTeacher(cfg)


def _own_teacher(cfg: CfgNode) -> FrozenTeacher:
    """The teacher that is to be trained by this config, with random weights."""
    node = cfg.MODEL
    formats = {"input_format": cfg.INPUT.FORMAT, "student_input_format": cfg.INPUT.FORMAT}
    numbers = {"pixel_mean": node.PIXEL_MEAN, "pixel_std": node.PIXEL_STD}
    return FrozenTeacher(backbone=build_backbone(cfg), features=node.RPN.IN_FEATURES, **numbers, **formats)


def _settings(
    given: Dict[str, Any], data: DataStatistics, sources: Tuple[Source, Source], device: str
) -> Tuple[Settings, Dict[str, str], Dict[str, float]]:
    """The settings, the texts of the configs, and the estimated seconds of the trainings by name."""
    teacher, frozen = _given_teacher(given) if given["teacher"] else (None, None)

    def choose(iterations: int) -> Tuple[Settings, Dict[str, str]]:
        settings = choose_settings(data, given["student"], device, iterations)
        return settings, config_texts(sources, settings, given["output"], teacher, device, given["seed"])

    settings, texts = choose(given["iterations"])
    seconds = _step_seconds(texts, frozen)
    if not given["compare"]:
        seconds.pop("scratch")
    if given["minutes"]:
        length = int(60.0 * given["minutes"] * _SHARE_OF_STEPS / sum(seconds.values()))
        if length < _LEAST_ITERATIONS:
            least = _LEAST_ITERATIONS * sum(seconds.values()) / _SHARE_OF_STEPS / 60.0
            raise ValueError(
                f"--minutes is {given['minutes']:g}, enough for {length} iterations here; {_LEAST_ITERATIONS} are the "
                f"least. Give {least:.0f} or more, or a smaller student"
            )
        settings, texts = choose(min(length, settings.iterations))
    return settings, texts, {name: each * settings.iterations for name, each in seconds.items()}


def _step_seconds(texts: Dict[str, str], teacher: Optional[FrozenTeacher]) -> Dict[str, float]:
    """Seconds of one step of each training; ``teacher`` is the user's."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            write_text(os.path.join(folder, name), text)
        names = ["scratch"] if teacher else ["scratch", "teacher"]
        configs = {name: load_config(os.path.join(folder, f"{name}.yaml")) for name in names}
    student = configs["scratch"]
    seconds = {name: measure_step_seconds(configs[name]) for name in track(names, "timing a step of each training")}
    teacher = (teacher or _own_teacher(configs["teacher"])).to(student.MODEL.DEVICE)
    seconds["student"] = 1.1 * (seconds["scratch"] + measure_teacher_seconds(student, teacher))
    return seconds


# -------------------------------------------------------------------------------------------------- the plan


def _say_plan(
    data: DataStatistics, settings: Settings, steps: List[Step], seconds: Dict[str, float], device: str
) -> None:
    counts = ", ".join(f"{printable(name)} {count:,}" for name, count in zip(data.classes, data.num_boxes))
    height, width = settings.input_size
    say(f"data: {data.num_images:,} images, {sum(data.num_boxes):,} boxes ({counts})")
    say(f"input: {width} x {height} pixels; {settings.iterations:,} iterations of {settings.batch} images on {device}")
    say(f"  {width} pixels: {printable(settings.why_size)}")
    for step in steps:
        about = f"  # about {seconds_text(seconds[step.name])}" if step.name in seconds else ""
        say(f"  {step.name}: {command_text(step.command)}{about}")
    total = seconds_text(sum(seconds.values()) / _SHARE_OF_STEPS)
    say(f"  all of it, with evaluation  # about {total}")
    if device == "cpu":
        reason = "--device is cpu" if torch.cuda.is_available() else "PyTorch sees none here"
        say(f"A GPU would allow a larger input and a wider teacher; {reason}.")


def _tasks(steps: List[Step], output: str) -> List[Task]:
    tasks: Dict[str, Task] = {}
    for step in steps:
        needed = [tasks[name] for name in step.needs]
        cfg: Optional[CfgNode] = load_config(os.path.join(output, f"{step.name}.yaml")) if step.folder else None
        tasks[step.name] = Task(
            name=step.name,
            command=list(step.command),
            output_dir=step.folder,
            needs=step.needs,
            cfg=cfg,
            inputs="".join(each.digest for each in needed),
            max_iter=cfg.SOLVER.MAX_ITER if cfg else 0,
            resumes=bool(step.folder),
            shows_output=step.name == "export",
        )
    return list(tasks.values())


# -------------------------------------------------------------------------------------------------- the outcome


def _note_failure(failed: List[str], name: str, reason: str) -> None:
    failed.append(name)


def _shipped_name(source: Source) -> str:
    """A data set, without the folders of its owner: "VOC2007 trainval", "faces/data.yaml train", "cells/train.json"."""
    names = source.path.split(os.sep)[-1 if os.path.isdir(source.path) else -2 :]
    return f"{os.path.join(*names)} {source.split}".strip()


def _say_outcome(
    output: str, steps: List[Step], data: DataStatistics, sources: Tuple[Source, Source], seed: int
) -> None:
    images = [read_bgr_image(each["file_name"]) for each in load_dataset(sources[1].name)[:10]]
    names, device = [step.name for step in steps if step.folder], os.path.join(output, "device")
    rows = ([] if "teacher" in names else given_teacher(device)) + collect_rows(output, names, images)
    train, test = map(_shipped_name, sources)
    text = f"Trained on {data.num_images:,} images of {train}, evaluated on {test}."
    made_by = f"qmimic_d2 {__version__} with seed {seed}"
    command = command_text([sys.executable, "-m", "qmimic_d2", *sys.argv[1:]])
    card = model_card(rows, shipped_files(device), data.classes, text, made_by, command)
    write_model_card(device, card)
    say("")
    say(table_text(rows))
    say("")
    say(f"to ship: {printable(device)} ({', '.join(sorted(os.listdir(device)))})")
    say(f"page:    {printable(os.path.join(output, 'report.html'))}")
