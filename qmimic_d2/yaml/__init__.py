"""YAML as data: files of anybody, and the Detectron2 configs among them. No code runs."""
