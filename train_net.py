#!/usr/bin/env python
"""
Trains and evaluates the detectors of this project: teachers, quantized teachers and students.

    python train_net.py --config-file configs/Digits/student_vgg_1_16_qmimic.yaml [KEY VALUE ...]
    python train_net.py --config-file ... --resume
    python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
    torchrun --nnodes 2 --nproc-per-node 8 ... train_net.py --config-file ...
"""

import sys

import qmimic_d2  # noqa: F401  (before Detectron2, to hide what it warns of when imported)

# isort: split
from detectron2.evaluation.testing import verify_results
from detectron2.utils import comm

from qmimic_d2.engine import (
    MimicEvaluator,
    Trainer,
    argument_parser,
    check_run,
    describe_error,
    is_first_of_machine,
    launch_processes,
    load_config,
    load_evaluated_weights,
    num_processes,
    one_teacher,
    set_up_process,
    with_measured_stride,
)
from qmimic_d2.library_noise import hush_libraries

hush_libraries()


def main(args, cfg):
    cfg = set_up_process(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        load_evaluated_weights(model, cfg, resume=args.resume)
        results = Trainer.test(cfg, model)
        MimicEvaluator(cfg)(model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = argument_parser().parse_args()
    with one_teacher():
        try:
            cfg = load_config(
                args.config_file,
                args.opts,
                eval_only=args.eval_only,
                resume=args.resume,
                device="cpu" if args.num_processes else "",
            )
            cfg = with_measured_stride(cfg, resume=args.resume, eval_only=args.eval_only)
            check_run(cfg, num_processes(args), eval_only=args.eval_only, resume=args.resume)
        except (KeyError, ValueError, OSError) as error:
            sys.exit(describe_error(error) if is_first_of_machine() else 1)
        launch_processes(main, args, (args, cfg))
