"""The bundle inside other systems: DICOMweb and Orthanc, MONAI Label, MONAI Deploy."""
