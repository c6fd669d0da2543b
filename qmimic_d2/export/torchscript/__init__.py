"""TorchScript: files, and the detector that runs them without Detectron2."""
