"""An explanation as DICOM objects that a PACS takes: a segmentation, a structured report and pictures.

They belong to the study of the series that was explained, and so repeat its patient's name and number. Nothing else that
ctclip writes does.
"""
