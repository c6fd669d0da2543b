"""The registered meta-architectures: Detectron2's, with quantizer and mimic attached."""
