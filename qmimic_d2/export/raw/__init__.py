"""The network of a one-stage detector alone, and the decoding of its outputs in numpy, C and JavaScript."""
