"""DICOM: series to volumes, and detections to objects that archives and viewers take."""
