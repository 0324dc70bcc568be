"""Synthetic data: the sample cohort, and the same cohort as DICOM."""
