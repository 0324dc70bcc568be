"""The synthetic sample cohort."""

from bundle.samples.cohort import made_if_missing, make_sample_cohort

__all__ = ["made_if_missing", "make_sample_cohort"]
