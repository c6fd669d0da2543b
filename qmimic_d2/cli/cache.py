"""
Shows, checks, empties and fills a teacher cache, the folder of MODEL.QMIMIC.TEACHER.CACHE.

    cache show FOLDER
    cache fill --config-file student.yaml MODEL.QMIMIC.TEACHER.CACHE FOLDER

fill draws the training images as a training does, and lets the teacher make the maps that are not there yet; with
--shard, several processes or machines share the work. Exit status: 0; 1 where verify found a damaged entry, which it
removes; 2 for a mistake in the arguments or the config.
"""

import argparse
import os
from typing import Tuple

from qmimic_d2.cli.argument_types import positive
from qmimic_d2.cli.model_arguments import key_value_pairs
from qmimic_d2.cli.printable import printable, say
from qmimic_d2.cli.usage import usage_errors
from qmimic_d2.data.loading import load_dataset_dicts
from qmimic_d2.data.mapper import ImageMapper
from qmimic_d2.engine import load_config, with_measured_stride
from qmimic_d2.modeling.mimic.cached_teacher import build_teacher
from qmimic_d2.modeling.mimic.map_store import damaged_entries, remove_entries, stored_teachers
from qmimic_d2.progress import track
from qmimic_d2.randomness import mixed_seed, own_randomness


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, act, text in (
        ("show", _show, "whose maps it holds"),
        ("verify", _verify, "read every entry and remove the damaged ones"),
        ("empty", _empty, "remove every entry"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("folder", metavar="FOLDER")
        action.set_defaults(act=act)
    fill = actions.add_parser("fill", help="make the maps of the training images")
    fill.add_argument("--config-file", required=True, metavar="FILE", help="of the student")
    fill.add_argument("--draws", type=positive, default=8, metavar="N", help="of each image (default: %(default)s)")
    fill.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="the I-th of N parts, from 0 on")
    fill.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="at the end, over the config")
    fill.set_defaults(act=_fill)


def run(args: argparse.Namespace) -> int:
    with usage_errors():
        return args.act(args)


def _show(args: argparse.Namespace) -> int:
    teachers = stored_teachers(args.folder)
    for each in teachers:
        about = each.description
        say(
            f"{each.identity}: {each.num_entries:,} images, {each.num_bytes / 1e6:.1f} MB\n"
            f"    {printable(about.get('config', 'unknown'))}, {printable(about.get('weights', 'unknown'))}\n"
            f"    {printable(', '.join(map(str, about.get('features', []))))}; {printable(about.get('quantizer', ''))}"
        )
    say(f"{printable(args.folder)}: teachers: {len(teachers)}, {sum(each.num_bytes for each in teachers) / 1e6:.1f} MB")
    return 0


def _verify(args: argparse.Namespace) -> int:
    _check_folder(args.folder)
    num_entries, damaged = 0, []
    for path, is_damaged in track(damaged_entries(args.folder), "reading", total=0):
        num_entries += 1
        if is_damaged:
            damaged.append(path)
            os.remove(path)
            say(f"damaged, and removed: {printable(path)}")
    say(f"entries: {num_entries:,}, damaged: {len(damaged):,}")
    return 1 if damaged else 0


def _empty(args: argparse.Namespace) -> int:
    _check_folder(args.folder)
    say(f"removed: {remove_entries(args.folder):,} entries")
    return 0


def _fill(args: argparse.Namespace) -> int:
    cfg = load_config(args.config_file, key_value_pairs(args))
    node = cfg.MODEL.QMIMIC.TEACHER
    if not node.CACHE:
        raise ValueError("MODEL.QMIMIC.TEACHER.CACHE is ''; name the folder to fill")
    if not node.CONFIG_FILE:
        raise ValueError("MODEL.QMIMIC.TEACHER.CONFIG_FILE is ''; the config of a student names its teacher there")
    cfg = with_measured_stride(cfg)
    teacher, mapper = build_teacher(cfg), ImageMapper(cfg, is_train=True)
    first, step = args.shard
    dicts = load_dataset_dicts(list(cfg.DATASETS.TRAIN))[first::step]
    for number, each in enumerate(track(dicts, "teacher")):
        for draw in range(args.draws):
            with own_randomness(mixed_seed(cfg.SEED, number, draw)):
                teacher.features([mapper(each)])
    say(f"images: {len(dicts):,}, drawn {args.draws} times each. {teacher.summary()}")
    return 0


def _check_folder(folder: str) -> None:
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder!r}")


def _shard(text: str) -> Tuple[int, int]:
    first, _, step = text.partition("/")
    if not (first.isdigit() and step.isdigit() and int(first) < int(step)):
        raise argparse.ArgumentTypeError(f"{text!r}: give I/N with I below N, such as 0/2")
    return int(first), int(step)
