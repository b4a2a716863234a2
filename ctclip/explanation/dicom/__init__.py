"""Write an explanation as DICOM objects for a PACS: a segmentation, a structured report and images.

The objects join the study of the explained series, and therefore contain the patient's name and ID. No other output of
ctclip contains them.
"""
