"""From predictions to scores; nothing in here draws."""

from metrics.stream_metrics import Scores, StreamSegMetrics, score_rows, to_table

__all__ = ["Scores", "StreamSegMetrics", "score_rows", "to_table"]
