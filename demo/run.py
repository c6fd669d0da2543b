#!/usr/bin/env python
"""
The main job from end to end on real images: teacher, quantized teacher, and four students of one budget
and seed. Every step is a command that can be typed by hand; it is printed before it runs.

    python demo/run.py [--output output/demo] [--jobs 2]

Interrupted, it continues where it stopped; finished, it only shows the results again.
"""

import argparse
import os
import signal
import sys

from detectron2.config import CfgNode

# Progress goes to a pipe or a file as well as to a screen; there it should appear line by line.
sys.stdout.reconfigure(line_buffering=True)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tools")]

from results import Model, write_results  # noqa: E402

from qmimic_d2.cli.task_runner import Task, run_tasks  # noqa: E402
from qmimic_d2.engine import load_config  # noqa: E402
from qmimic_d2.library_noise import hush_libraries  # noqa: E402

CONFIGS = "configs/Digits"
STUDENTS = {
    "student, from scratch": "scratch",
    "student, quantization only": "quant",
    "student, plain mimic": "mimic",
    "student, quantization mimic": "qmimic",
}


def main() -> None:
    hush_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/demo", help="folder for everything that is made")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes at a time")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="KEY VALUE pairs for every training, for example SOLVER.MAX_ITER 20 for a quick look",
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    os.chdir(ROOT)

    def config(name: str, *opts: str) -> CfgNode:
        return load_config(f"{CONFIGS}/{name}.yaml", [*opts, *args.opts])

    def training(name: str, config_name: str, needs=(), opts=()) -> Task:
        folder = f"{args.output}/{name}"
        opts = ["OUTPUT_DIR", folder, *opts]
        cfg = config(config_name, *opts)
        return Task(
            name=name,
            command=[*train_net(config_name), *opts, *args.opts],
            output_dir=folder,
            needs=needs,
            cfg=cfg,
            max_iter=cfg.SOLVER.MAX_ITER,
            resumes=True,
        )

    teacher_weights = f"{args.output}/teacher/model_final.pth"
    quant_teacher_opts = ["OUTPUT_DIR", f"{args.output}/teacher_quant", "MODEL.WEIGHTS", teacher_weights]
    mimic_opts = ["MODEL.QMIMIC.TEACHER.WEIGHTS", teacher_weights]
    teacher = training("teacher", "teacher_vgg_1_8")
    students = [
        training("student_scratch", "student_vgg_1_16_scratch"),
        training("student_quant", "student_vgg_1_16_quant"),
        training("student_mimic", "student_vgg_1_16_mimic", ["teacher"], mimic_opts),
        training("student_qmimic", "student_vgg_1_16_qmimic", ["teacher"], mimic_opts),
    ]
    calibration = Task(
        name="calibrate",
        command=[sys.executable, "-m", "qmimic_d2", "calibrate", "--config-file", f"{CONFIGS}/teacher_vgg_1_8.yaml"]
        + ["--weights", teacher_weights, "--strides", "0.25", "0.5", "1.0", "--eval"]
        + ["--json", f"{args.output}/calibration.json"],
        needs=["teacher"],
        inputs=teacher.digest,
        shows_output=True,
    )
    quant_teacher = Task(
        name="teacher_quant",
        command=[*train_net("teacher_vgg_1_8_quant"), "--eval-only", *quant_teacher_opts, *args.opts],
        needs=["teacher"],
        inputs=teacher.digest,
        cfg=config("teacher_vgg_1_8_quant", *quant_teacher_opts),
    )
    tasks = [teacher, *students, calibration, quant_teacher]
    try:
        # One thread each: two single-thread processes use two cores better than two threads of one.
        seconds = run_tasks(tasks, args.output, args.jobs, {"OMP_NUM_THREADS": "1"})
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues from here")

    tasks_of_label = {"teacher": teacher, "teacher, quantized": quant_teacher, **dict(zip(STUDENTS, students))}
    teachers = (teacher, quant_teacher)
    models = [
        Model(
            label=label,
            name=task.name,
            cfg=task.cfg,
            weights=teacher_weights if task in teachers else f"{args.output}/{task.name}/model_final.pth",
            seconds=seconds[task.name],
        )
        for label, task in tasks_of_label.items()
    ]
    write_results(models, args.output)


def train_net(config_name: str) -> list:
    return [sys.executable, "train_net.py", "--config-file", f"{CONFIGS}/{config_name}.yaml"]


if __name__ == "__main__":
    main()
