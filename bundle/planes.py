"""The anatomical planes as radiologists look at them."""

PLANES = {
    # directions of rows, columns and slices
    "axial": "PLS",
    "coronal": "ILP",
    "sagittal": "IPL",
}
