"""How a method starts its student, what it freezes of it, and what it makes of it in the end."""

from __future__ import annotations

from methods.fusion import fuse, fusion_rate
from methods.table import Method
from segmentation_module import IncrementalSegmentationModule


def start_student(method: Method, student: IncrementalSegmentationModule, step: int) -> None:
    """Prepare a student that has the weights it starts from: the teacher's at step > 0.

    The newest classifier gets MiB's balanced initialisation (Cermelli et al., CVPR 2020, eq. 10-11)
    where the method wants it; norms, body and old classifiers are frozen where it says so.
    """
    if step > 0 and method.init_balanced:
        student.init_balanced()
    if method.fix_bn:
        student.freeze_norms()
    if method.freeze:
        student.body.requires_grad_(False)
    if method.ewf:
        student.cls[:-1].requires_grad_(False)


def finish_student(
    method: Method,
    student: IncrementalSegmentationModule,
    teacher: IncrementalSegmentationModule | None,
) -> None:
    """Blend a student that has learned its step with the teacher where the method wants it (EWF).

    To be called once: a second call would blend again.
    """
    if not method.ewf or teacher is None:
        return
    rate = fusion_rate(student.classes_per_step[-1], sum(teacher.classes_per_step))
    student.load_state_dict(fuse(teacher.state_dict(), student.state_dict(), rate))
