"""How a method starts its student, and what it freezes of it."""

from __future__ import annotations

from methods.table import Method
from segmentation_module import IncrementalSegmentationModule


def start_student(method: Method, student: IncrementalSegmentationModule, step: int) -> None:
    """Prepare a student that has the weights it starts from: the teacher's at step > 0.

    The newest classifier gets MiB's balanced initialisation (Cermelli et al., CVPR 2020, eq. 10-11)
    where the method wants it; norms and body are frozen where it says so.
    """
    if step > 0 and method.init_balanced:
        student.init_balanced()
    if method.fix_bn:
        student.freeze_norms()
    if method.freeze:
        student.body.requires_grad_(False)
