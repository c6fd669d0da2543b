"""Trained and exported detectors on images, folders and videos."""
