"""Small Pascal VOC and WIDER FACE data sets in the official formats; benchmarks/miniature.py makes them."""
