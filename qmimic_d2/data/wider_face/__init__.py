"""WIDER FACE as a Detectron2 data set; docs/wider_face.md says where its files go."""

from qmimic_d2.data.wider_face.registration import load_wider_face, register_wider_face

__all__ = ["load_wider_face", "register_wider_face"]
