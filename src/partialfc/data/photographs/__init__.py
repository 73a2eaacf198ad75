"""From photographs of any size to aligned crops.

`face` has the protocol of detectors, which `mtcnn` implements and `detect` opens; `landmarks` reads points that others
have found. `files` lists and decodes photographs, `align` cuts the crops, and `contact_sheet` shows them.
"""
